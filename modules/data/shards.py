"""Images in tar shards (WebDataset's layout), read and written, for data sets on slow or distant storage.

A shard holds the images of some records and, with each record, those of its hard negatives, so that reading one shard
after another is enough. ``shards.json`` says which record is in which shard. Shards are patients' data.
"""

import importlib.util
import io
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modules.data.annotations import Study
from modules.data.images import MAX_BYTES, MAX_PIXELS, Draft, ImageFolder, decode_image, open_image
from modules.data.sample_order import LANES, ORDER, keyed_generator
from modules.data.transforms import size_by_shorter_side
from modules.runtime.archive_files import tar_members
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_TEXT, open_regular, read_bytes
from modules.runtime.records import write_private

logger = logging.getLogger("ithn")

FORMAT = "ithn-shards-1"
MANIFEST = "shards.json"
MAX_SHARD = 2**32  # bytes; --shard_mb makes them far smaller
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,200}\.tar", re.ASCII)
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

    ``negatives`` says whose negative images are in them: "annotation" (the annotation's own), or the SHA-256 of the
    neighbours' rows; there are ``num_neighbours`` of them for each record.
    """

    annotation_sha256: str
    negatives: str
    num_neighbours: int
    splits: Mapping[str, tuple[Shard, ...]]
    resize: int | None = None  # shorter side of the training images, 0: as they were; None: an older program's, unknown

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1)

    @classmethod
    def load(cls, root: str) -> "Manifest":
        """The manifest below ``root``, a folder or an address; InputError where there is none."""
        content = read_file(root, MANIFEST, MAX_TEXT)
        try:
            return cls._of(json.loads(content))
        except Exception as error:  # whatever the file holds instead
            raise InputError(
                f"--shards {root}: its {MANIFEST} is damaged or of another version "
                f"({' '.join(str(error).split())[:100]}); make it again with scripts/make_shards.py"
            ) from error

    @classmethod
    def _of(cls, content: Any) -> "Manifest":
        """The manifest in the JSON ``content``; any exception where it is none."""
        if content.pop("format") != FORMAT:
            raise ValueError("another version")
        splits = {
            name: tuple(Shard(**(shard | {"rows": tuple(shard["rows"])})) for shard in shards)
            for name, shards in content.pop("splits").items()
        }
        manifest = cls(**content, splits=splits)
        if not isinstance(manifest.annotation_sha256, str) or not isinstance(manifest.negatives, str):
            raise ValueError("its hashes are not texts")
        if type(manifest.num_neighbours) is not int or manifest.num_neighbours < 0:
            raise ValueError("num_neighbours is not a count")
        if manifest.resize is not None and (type(manifest.resize) is not int or manifest.resize < 0):
            raise ValueError("resize is not a number of pixels")
        for shard in (shard for shards in splits.values() for shard in shards):
            if not isinstance(shard.file, str) or not _FILE_NAME.fullmatch(shard.file):
                raise ValueError(f"{shard.file!r} is not the name of a shard")
            if type(shard.size) is not int or not 0 <= shard.size <= MAX_SHARD:
                raise ValueError(f"{shard.file} has a size of {shard.size!r}; at most {MAX_SHARD} bytes are read")
            if not all(type(row) is int and row >= 0 for row in shard.rows):
                raise ValueError(f"the rows of {shard.file} are not counts")
        return manifest

    def check(self, root: str, annotation_sha256: str, negatives: str | None, num_neighbours: int) -> None:
        """InputError unless the shards were made from this annotation and, if training needs them, these negatives."""
        if self.annotation_sha256 != annotation_sha256:
            raise InputError(
                f"--shards {root}: made from another annotation than --ann_path; make them again with "
                "scripts/make_shards.py"
            )
        if negatives is not None and (self.negatives != negatives or self.num_neighbours < num_neighbours):
            raise InputError(
                f"--shards {root}: the images of these hard negatives are not in them (they hold those of "
                f"{self.num_neighbours} neighbours); make them again with scripts/make_shards.py "
                f"--negative_index FILE --num_neighbours {num_neighbours}"
            )

    def check_size(self, root: str, shorter_side: int) -> None:
        """InputError where training images were made smaller than the ``shorter_side`` that they are trained at."""
        if self.resize and self.resize < shorter_side:
            raise InputError(
                f"--shards {root}: made with --resize {self.resize}, and --image_size needs {shorter_side} pixels; "
                f"make them again with --resize {shorter_side} or 0"
            )
        if self.resize is None:
            logger.info(
                "--shards %s: made before validation and test images stayed as they are; if with --resize, make them "
                "again to have the scores of the files",
                root,
            )

    def shards_of(self, root: str, split: str, count: int) -> tuple[Shard, ...]:
        """The shards of a ``split`` of ``count`` records; InputError unless each record is in one of them."""
        shards = self.splits.get(split, ())
        if sorted(row for shard in shards for row in shard.rows) != list(range(count)):
            raise InputError(
                f"--shards {root}: its {MANIFEST} does not place each of the {count} records of '{split}' in one "
                "shard; make the shards again"
            )
        return shards


def neighbours_sha256(neighbours: np.ndarray, num_neighbours: int) -> str:
    """Identifies the first ``num_neighbours`` hard negatives of every record, of neighbours (N, k)."""
    return sha256(np.ascontiguousarray(neighbours[:, :num_neighbours], dtype=np.int32).tobytes()).hexdigest()


def require_library() -> None:
    """InputError where what writes shards is not installed."""
    if importlib.util.find_spec("webdataset") is None:
        raise InputError("tar shards need webdataset: pip install -r requirements/shards.txt")


# ---- reading


def is_address(root: str) -> bool:
    """Whether ``root`` is an address that fsspec must fetch from (https://, s3://) instead of a folder."""
    return "://" in root


def read_file(root: str, name: str, max_bytes: int) -> bytes:
    """The bytes of ``name`` below ``root``; InputError where it cannot be read, or has more than ``max_bytes``."""
    import fsspec

    path = f"{root.rstrip('/')}/{name}"
    for attempt in range(TRIES):
        try:
            # A folder's name must not be taken for a chain of fsspec's protocols.
            with fsspec.open(path, "rb") if is_address(root) else open_regular(path, max_bytes) as file:
                content = file.read(max_bytes + 1)
            break
        except (FileNotFoundError, ImportError, ValueError) as error:
            raise InputError(f"--shards {root}: {name} cannot be read: {error}") from error
        except OSError as error:
            if attempt == TRIES - 1 or not is_address(root):
                raise InputError(f"--shards {root}: {name} cannot be read: {error.strerror or error}") from error
        time.sleep(SECONDS_BETWEEN_TRIES)
    if len(content) > max_bytes:
        raise InputError(f"--shards {root}: {name} has more than {max_bytes} bytes; copy or make it again")
    return content


@dataclass
class ShardImages:
    """The images of one split: ``of_record(row)`` reads those kept with the record at ``row``, its own and its
    negatives'; called with a path, it reads a record's own image. The last ``keep`` shards stay in memory.
    """

    root: str
    shards: tuple[Shard, ...]
    paths: Sequence[Sequence[str]]  # of each row's own images
    max_pixels: int = MAX_PIXELS
    draft: Draft | None = None  # as in ImageFolder
    keep: int = 2 * LANES  # where a lane passes from one shard to the next, it reads both
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
        return self.of_record(self._row_of[path])(path)

    def locate(self, path: str) -> str:
        """The shard that holds the record's own image ``path``; InputError where none does."""
        if path not in self._row_of or self._row_of[path] not in self._shard_of:
            raise InputError(f"image {path!r}: in no shard of {self.root}; make the shards again")
        return self.shards[self._shard_of[self._row_of[path]]].file

    def of_record(self, row: int) -> Callable[[str], Image.Image]:
        """A reader of the images kept with the record at ``row``."""

        def read(path: str) -> Image.Image:
            content = self._content(self._shard_of[row]).get((row, path))
            if content is None:
                raise InputError(
                    f"image {path!r}: not with its record in {self.root}; make the shards again, with "
                    "this --negative_index"
                )
            return decode_image(io.BytesIO(content), path, self.max_pixels, self.draft)

        return read

    def _content(self, number: int) -> dict[tuple[int, str], bytes]:
        """A shard's images by row and path."""
        if number not in self._held:
            shard = self.shards[number]
            content = read_file(self.root, shard.file, shard.size)
            if len(content) != shard.size or sha256(content).hexdigest() != shard.sha256:
                raise InputError(
                    f"--shards {self.root}: {shard.file} is not what {MANIFEST} says (its size or SHA-256 "
                    "differs); copy or make it again"
                )
            # The reader would unpack a compressed one, however large it becomes.
            if content[257:262] != b"ustar":
                raise InputError(f"--shards {self.root}: {shard.file} is not a plain tar file; make the shards again")
            self._held[number] = _unpack(content, f"--shards {self.root}: {shard.file}")
            if len(self._held) > self.keep:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]


def _unpack(content: bytes, where: str) -> dict[tuple[int, str], bytes]:
    """(row, path) -> bytes of each image in a tar file of WebDataset's layout; InputError for another file."""
    try:
        members = {
            name: read()
            for name, size, read in tar_members(io.BytesIO(content))
            if size is not None and size <= len(content)
        }
        images = {}
        for name in members:
            row, _, rest = name.partition(".")
            if rest == "json":
                for image, path in json.loads(members[name])["images"].items():
                    images[int(row), path] = members[f"{row}.{image}"]
        return images
    except Exception as error:  # damaged bytes lead the readers to all kinds of exceptions
        raise InputError(
            f"{where} is not a shard of scripts/make_shards.py ({type(error).__name__}); make the shards again"
        ) from error


# ---- writing


@dataclass(frozen=True)
class Packing:
    """How shards are made: of about ``shard_bytes`` each, training images no larger than ``resize`` (0: as they are).

    Images of other splits stay as they are: a test resizes them in one step.
    """

    folder: Path
    images: ImageFolder
    shard_bytes: int
    resize: int
    seed: int


def write_split(
    packing: Packing,
    split: str,
    studies: Sequence[Study],
    negatives: Sequence[Sequence[str]],
    progress: Callable[[Iterable, str], Iterable],
) -> tuple[Shard, ...]:
    """Write the shards of a split; ``negatives`` are the paths of each record's negative images.

    Training records are dealt to shards at random, by ``seed``, as an epoch mixes only what it holds at a time;
    others keep their order. InputError for an image that cannot be read.
    """
    import torch
    import webdataset

    rows = list(range(len(studies)))
    if split == "train":
        rows = torch.randperm(len(rows), generator=keyed_generator(packing.seed, ORDER)).tolist()
    shards: list[Shard] = []
    pending: list[int] = []
    buffer, writer = None, None

    def close() -> None:
        writer.close()
        content = buffer.getvalue()
        name, digest = f"{split}-{len(shards):06d}.tar", sha256(content).hexdigest()
        shards.append(Shard(name, len(content), digest, tuple(pending)))
        write_private(packing.folder / name, content)
        pending.clear()

    for row in progress(rows, f"shards of {split}"):
        if not pending:
            buffer = io.BytesIO()
            writer = webdataset.TarWriter(buffer, encoder=False, mtime=0)
        writer.write(_sample(packing, row, studies[row], negatives[row]))
        pending.append(row)
        if buffer.tell() >= packing.shard_bytes:
            close()
    if pending:
        close()
    return tuple(shards)


def _sample(packing: Packing, row: int, study: Study, negatives: Sequence[str]) -> dict[str, str | bytes]:
    """A record in WebDataset's form: its row, every image once, and JSON that names them."""
    files, names = {}, {}
    for path in dict.fromkeys((*study.image_paths, *negatives)):
        try:
            resize = packing.resize if study.split == "train" else 0
            suffix, content = packed_image(packing.images.locate(path), resize)
        except InputError as error:
            raise InputError(f"split '{study.split}', study {study.id!r}: {error}") from error
        name = f"{len(files)}.{suffix}"
        files[name], names[name] = content, path
    about = {"id": study.id, "report": study.report, "split": study.split, "images": names}
    return {"__key__": f"{row:08d}", "json": json.dumps(about, ensure_ascii=False).encode(), **files}


def packed_image(path: str, resize: int) -> tuple[str, bytes]:
    """Suffix and bytes for the file at ``path``: its own for PNG and JPEG of no more than ``resize``, else a PNG.

    With ``resize`` the shorter side becomes that many pixels, which is the training transform's first step.
    """
    image = open_image(path)
    content = read_bytes(path, MAX_BYTES)
    if resize and min(image.size) > resize:
        image = image.resize(size_by_shorter_side(*image.size, resize), Image.Resampling.BILINEAR)
    elif content.startswith(b"\x89PNG"):
        return "png", content
    elif content.startswith(b"\xff\xd8"):
        return "jpg", content
    packed = io.BytesIO()
    image.save(packed, format="PNG")
    return "png", packed.getvalue()
