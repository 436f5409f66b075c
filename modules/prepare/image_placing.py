"""Brings a data set's images to the folder that training reads: linked, copied or made smaller, by several processes.

An image appears under its name when it is complete, and one that is there is left alone: an interrupted run goes on
where it stopped.
"""

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from modules.runtime.errors import InputError
from modules.runtime.records import private_folder, write_private

WAYS = ("link", "copy", "none")
MISSING = "no such file"
_SETTINGS = ".preparation.json"
_CHUNK = 64


@dataclass(frozen=True)
class Placing:
    """``way``: "link" (hard link: no disk), "copy", or "none" (left where it is). ``resize``: shorter side in pixels,
    0 for none; images are then written anew, smaller ones at their own size, as PNG or JPEG by the target's name."""

    way: str
    resize: int = 0

    def place(self, source: Path, target: Path) -> str | None:
        """Bring one image to ``target``; returns None, or the reason why there is none."""
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
            f"{target}: is on another file system than {source}, where hard links cannot lead; give --place copy, "
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
    image.save(target, **({"quality": 95} if target.suffix == ".jpg" else {}))


def place_all(placing: Placing, pairs: Sequence[tuple[Path, Path]], workers: int) -> Iterator[tuple[Path, str | None]]:
    """Place (source, target) pairs by ``workers`` processes; yields (target, None or why it is not there) of each."""
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    if workers == 1:
        yield from chain.from_iterable(_place_chunk(placing, chunk) for chunk in chunks)
        return
    if placing.resize:
        import modules.data.images  # noqa: F401  # once, before the processes are made, instead of in each
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from chain.from_iterable(pool.map(_place_chunk, [placing] * len(chunks), chunks))


def _place_chunk(placing: Placing, pairs: Sequence[tuple[Path, Path]]) -> list[tuple[Path, str | None]]:
    return [(target, placing.place(source, target)) for source, target in pairs]


def keep_settings(out: Path, placing: Placing) -> None:
    """Write down how the images of folder ``out`` are placed; InputError where an earlier run placed them otherwise."""
    path, settings = out / _SETTINGS, asdict(placing)
    if path.is_file() and (out / "images").is_dir():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            earlier = None
        if earlier != settings:
            raise InputError(
                f"{out / 'images'}: an earlier run placed images otherwise ({earlier}, now {settings}); "
                "give its --place and --resize to go on, another --out, or remove that folder"
            )
    write_private(path, json.dumps(settings) + "\n")
