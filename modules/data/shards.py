"""Images in tar shards (WebDataset's layout), for data sets that lie on slow or distant storage.

A shard holds the images of some records, and beside each record those of its hard negatives, so that reading one
shard after another is enough. ``shards.json`` says which record is where. Shards are patients' data.
"""

import importlib.util
import io
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from modules.data.images import MAX_PIXELS, decode_image
from modules.data.sample_order import LANES
from modules.runtime.errors import InputError

FORMAT = "ithn-shards-1"
MANIFEST = "shards.json"
TRIES, SECONDS_BETWEEN_TRIES = 3, 2.0  # of reading from an address


@dataclass(frozen=True)
class Shard:
    """A tar file, its size and SHA-256, and the rows of the split whose images it holds, in order."""

    file: str
    size: int
    sha256: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The shards of every split, and what they were made from.

    ``negatives`` maps a record's negative images to where they stand: "annotation", or the SHA-256 of the neighbours'
    rows; ``num_neighbours`` of them are there for each record.
    """

    annotation_sha256: str
    negatives: str
    num_neighbours: int
    splits: Mapping[str, tuple[Shard, ...]]

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1)

    @classmethod
    def load(cls, root: str) -> "Manifest":
        """The manifest below ``root``, a folder or an address; InputError where there is none."""
        require_library()
        try:
            content = json.loads(read_file(root, MANIFEST))
            if content.pop("format") != FORMAT:
                raise ValueError("another version")
            splits = {
                name: tuple(Shard(**(shard | {"rows": tuple(shard["rows"])})) for shard in shards)
                for name, shards in content.pop("splits").items()
            }
            for shard in (shard for shards in splits.values() for shard in shards):
                if PurePosixPath(shard.file).name != shard.file:
                    raise ValueError(f"{shard.file!r} is no name of a file")
            return cls(**content, splits=splits)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"--shards {root}: its {MANIFEST} is damaged or of another version "
                f"({' '.join(str(error).split())[:100]}); make it again with scripts/make_shards.py"
            ) from error


def require_library() -> None:
    """InputError where what reads and writes shards is not installed."""
    if importlib.util.find_spec("webdataset") is None:
        raise InputError("tar shards need webdataset: pip install -r requirements/shards.txt")


def is_address(root: str) -> bool:
    """Whether ``root`` names something that fsspec must fetch (https://, s3://) instead of a folder."""
    return "://" in root


def read_file(root: str, name: str) -> bytes:
    """The bytes of ``name`` below ``root``; InputError where it cannot be read."""
    import fsspec

    path = f"{root.rstrip('/')}/{name}"
    for attempt in range(TRIES):
        try:
            # A folder's name must not be taken for a chain of fsspec's protocols.
            with fsspec.open(path, "rb") if is_address(root) else open(path, "rb") as file:
                return file.read()
        except (FileNotFoundError, ImportError, ValueError) as error:
            raise InputError(f"--shards {root}: {name} cannot be read: {error}") from error
        except OSError as error:
            if attempt == TRIES - 1 or not is_address(root):
                raise InputError(f"--shards {root}: {name} cannot be read: {error.strerror or error}") from error
        time.sleep(SECONDS_BETWEEN_TRIES)
    raise AssertionError("unreachable")


@dataclass
class ShardImages:
    """The images of one split: ``beside(row)`` reads those that stand with the record at ``row``, its own and its
    negatives'; called with a path, it reads a record's own image. The last ``keep`` shards stay in memory.
    """

    root: str
    shards: tuple[Shard, ...]
    paths: Sequence[Sequence[str]]  # of each row's own images
    max_pixels: int = MAX_PIXELS
    keep: int = 2 * LANES  # while a lane goes from one to the next it is in both
    _shard_of: dict[int, int] = field(init=False, repr=False)
    _row_of: dict[str, int] = field(init=False, repr=False)
    _held: "OrderedDict[int, dict[tuple[int, str], bytes]]" = field(init=False, repr=False)

    def __post_init__(self):
        self._shard_of = {row: number for number, shard in enumerate(self.shards) for row in shard.rows}
        self._row_of = {path: row for row, paths in enumerate(self.paths) for path in paths}
        self._held = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}

    def __call__(self, path: str) -> Image.Image:
        return self.beside(self._row_of[path])(path)

    def locate(self, path: str) -> str:
        """The shard that holds the record's own image ``path``; InputError where none does."""
        if path not in self._row_of or self._row_of[path] not in self._shard_of:
            raise InputError(f"image {path!r}: in no shard of {self.root}; make the shards again")
        return self.shards[self._shard_of[self._row_of[path]]].file

    def beside(self, row: int) -> Callable[[str], Image.Image]:
        """A reader of the images that stand with the record at ``row``."""

        def read(path: str) -> Image.Image:
            content = self._content(self._shard_of[row]).get((row, path))
            if content is None:
                raise InputError(
                    f"image {path!r}: not with its record in {self.root}; make the shards again, with "
                    "this --negative_index"
                )
            return decode_image(io.BytesIO(content), path, self.max_pixels)

        return read

    def _content(self, number: int) -> dict[tuple[int, str], bytes]:
        """A shard's images by row and path."""
        if number not in self._held:
            shard = self.shards[number]
            content = read_file(self.root, shard.file)
            if len(content) != shard.size or sha256(content).hexdigest() != shard.sha256:
                raise InputError(
                    f"--shards {self.root}: {shard.file} is not what {MANIFEST} says (its size or SHA-256 "
                    "differs); copy or make it again"
                )
            # The reader would unpack a compressed one, however large it becomes.
            if content[257:262] != b"ustar":
                raise InputError(f"--shards {self.root}: {shard.file} is no plain tar file; make the shards again")
            self._held[number] = _unpack(content)
            if len(self._held) > self.keep:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


def _unpack(content: bytes) -> dict[tuple[int, str], bytes]:
    """(row, path) -> bytes of each image in a tar file; nothing is written to disk."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    images = {}
    members = tar_file_expander([{"url": "", "stream": io.BytesIO(content)}])
    for sample in group_by_keys(members, keys=_row_and_rest):
        for name, path in json.loads(sample["json"])["images"].items():
            images[int(sample["__key__"]), path] = sample[name]
    return images


def _row_and_rest(name: str) -> tuple[str, str]:
    row, _, rest = name.partition(".")
    return row, rest


def check_manifest(
    manifest: Manifest, root: str, annotation_sha256: str, negatives: str | None, num_neighbours: int
) -> None:
    """InputError unless the shards were made from this annotation and, where training needs them, these negatives."""
    if manifest.annotation_sha256 != annotation_sha256:
        raise InputError(
            f"--shards {root}: made from another annotation than --ann_path; make them again with "
            "scripts/make_shards.py"
        )
    if negatives is not None and (manifest.negatives != negatives or manifest.num_neighbours < num_neighbours):
        raise InputError(
            f"--shards {root}: the images of these hard negatives are not in them (they hold those of "
            f"{manifest.num_neighbours} neighbours); make them again with scripts/make_shards.py "
            f"--negative_index FILE --num_neighbours {num_neighbours}"
        )


def neighbours_sha256(neighbours: np.ndarray, num_neighbours: int) -> str:
    """Names the first ``num_neighbours`` hard negatives of every record."""
    return sha256(np.ascontiguousarray(neighbours[:, :num_neighbours], dtype=np.int32).tobytes()).hexdigest()
