"""Links, copies or shrinks a data set's images into the folder that training reads, in several processes.

An image gets its name once it is complete, and existing ones are left alone, so an interrupted run can be repeated.
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from modules.runtime.cores import usable_cores
from modules.runtime.errors import InputError
from modules.runtime.input_files import read_json
from modules.runtime.records import private_folder, write_private

WAYS = ("link", "copy", "none")
MISSING = "no such file"
_SETTINGS = ".preparation.json"
_CHUNK = 64


@dataclass(frozen=True)
class Placing:
    """How images are placed.

    ``way``: "link" (a hard link, which takes no disk space), "copy", or "none" (left where they are). ``resize``: the
    shorter side in pixels, or 0; images are then re-encoded as PNG or JPEG, by the target's suffix, and never enlarged.
    ``source``: the folder or archive that they come from, for the record of a run.
    """

    way: str
    resize: int = 0
    source: str = ""

    def place(self, source: Path, target: Path) -> str | None:
        """Place one image at ``target``; returns None, or why it could not be read. InputError where writing fails."""
        if target.is_file():
            return None
        if not source.is_file():
            return MISSING
        if self.way == "none" and not self.resize:
            return None
        temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        private_folder(target.parent)
        try:
            if self.resize:
                _write_smaller(source, temporary, self.resize)
            elif self.way == "link":
                os.link(os.path.realpath(source), temporary)
            else:
                shutil.copyfile(source, temporary)
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(_advice(error, source, target)) from error
        except ValueError as error:  # InputError of the decoder
            return str(error)
        finally:
            temporary.unlink(missing_ok=True)
        return None


def _advice(error: OSError, source: Path, target: Path) -> str:
    if error.errno == errno.EXDEV:
        return (
            f"{target}: is on another file system than {source}, so it cannot be a hard link; give --place copy, "
            "--place none (images stay where they are) or --resize 256"
        )
    return f"{target}: cannot be written: {error.strerror}"


def _write_smaller(source: Path, target: Path, resize: int) -> None:
    from PIL import Image

    from modules.data.images import open_image

    image = open_image(source)
    scale = resize / min(image.size)
    if scale < 1:
        size = tuple(max(resize, round(side * scale)) for side in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    image.save(target, **({"quality": 95} if target.suffix.lower() in (".jpg", ".jpeg") else {}))


def place_all(placing: Placing, pairs: Sequence[tuple[Path, Path]], workers: int) -> Iterator[tuple[Path, str | None]]:
    """Place (source, target) pairs by ``workers`` processes; yields (target, None or why it is missing) for each."""
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    if workers == 1:
        yield from chain.from_iterable(_place_chunk(placing, chunk) for chunk in chunks)
        return
    if placing.resize:
        import modules.data.images  # noqa: F401  # once here, not in every process
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from chain.from_iterable(pool.map(_place_chunk, [placing] * len(chunks), chunks))


def _place_chunk(placing: Placing, pairs: Sequence[tuple[Path, Path]]) -> list[tuple[Path, str | None]]:
    return [(target, placing.place(source, target)) for source, target in pairs]


def place_images(
    out: Path, placing: Placing, pairs: Sequence[tuple[Path, Path]], workers: int
) -> dict[Path, str | None]:
    """Place (source, target) pairs in the folder ``out``: target -> None, or why it is missing.

    What is left out is counted on stderr, with the first reason. InputError where writing fails, or an earlier run
    placed images otherwise.
    """
    from modules.runtime.run_log import Bar

    keep_settings(out, placing)
    reasons = dict(Bar(place_all(placing, pairs, workers), "images", total=len(pairs)))
    kinds = Counter("missing" if reason == MISSING else "unreadable" for reason in reasons.values() if reason)
    if kinds:
        first = next(reason for reason in reasons.values() if reason)
        counts = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        reason = "" if first == MISSING else f"; {first}"
        print(f"warning: of {len(pairs)} images left out: {counts}{reason}", file=sys.stderr)
    return reasons


def add_placing_flags(add: Callable[..., object], ways: Sequence[str] = WAYS) -> None:
    """--place, --resize and --workers; ``add`` is a parser's add_argument."""
    none = ", or none (they stay where they are)" if "none" in ways else ""
    add("--place", choices=ways, default="link", help=f"images: hard links, copies{none}; default %(default)s")
    add("--resize", type=int, default=0, metavar="PX", help="re-encode images with this shorter side, e.g. 256")
    add("--workers", type=int, default=usable_cores(), metavar="W", help="processes that place images (default: cores)")


def check_placing(resize: int, workers: int) -> None:
    """InputError for values that cannot work."""
    if resize and not 32 <= resize <= 4096:
        raise InputError(f"--resize {resize}: must lie between 32 and 4096 pixels")
    if workers < 1:
        raise InputError(f"--workers {workers}: must be 1 or more")


def keep_settings(out: Path, placing: Placing) -> None:
    """Record how the images of folder ``out`` are placed; InputError where an earlier run placed them differently, or
    others.
    """
    path, settings = out / _SETTINGS, asdict(placing)
    if path.is_file() and (out / "images").is_dir():
        try:
            earlier = read_json(path)
        except (OSError, ValueError):
            earlier = None
        # A record of older versions names no source.
        if not isinstance(earlier, dict) or settings | earlier != settings:
            raise InputError(
                f"{out / 'images'}: an earlier run placed images otherwise ({earlier}, now {settings}); give its "
                "--images, --place and --resize to continue it, another --out, or remove that folder (only "
                f"{path} where the same --images are now in another place)"
            )
    write_private(path, json.dumps(settings) + "\n")
