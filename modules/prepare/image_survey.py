"""Decodes every image once, in parallel, and reports its size and mode, or what is wrong with it."""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from modules.data.images import ImageFolder, blank_problem
from modules.runtime.errors import ImageError, InputError
from modules.runtime.input_files import open_regular

_AT_ONCE = 16  # images handed to a process at a time


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image file; it can be trained on where there is no ``problem``."""

    path: str  # as in the annotation
    size: tuple[int, int] = (0, 0)  # width, height, upright; (0, 0) where it cannot be read
    mode: str = ""  # "L" or "RGB", as the network sees it
    sha256: str = ""  # of the file's bytes, where it was asked for
    problem: str = ""
    kind: str = ""  # of the problem

    @property
    def is_readable(self) -> bool:
        """Whether it could be decoded; a blank image can."""
        return self.size != (0, 0)


class _Look:
    """Reads one image; a class, as it has to be pickled for other processes."""

    def __init__(self, folder: ImageFolder, hashed: bool):
        self.folder, self.hashed = folder, hashed

    def __call__(self, path: str) -> ImageFacts:
        try:
            image = self.folder(path)
            digest = ""
            if self.hashed:
                with open_regular(self.folder.locate(path)) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except ImageError as error:
            return ImageFacts(path, problem=str(error), kind=error.kind)
        except MemoryError:
            return ImageFacts(path, problem=f"image {path!r}: not enough memory to decode it", kind="out of memory")
        kind, reason = blank_problem(image) or ("", "")
        problem = f"image {path!r} {reason}" if reason else ""
        return ImageFacts(path, image.size, image.mode, digest, problem, kind)


def survey_images(folder: ImageFolder, paths: Sequence[str], *, workers: int, hashed: bool) -> Iterator[ImageFacts]:
    """Facts about each of ``paths``, in their order, read by ``workers`` processes (0: in this one).

    InputError, with the first image that has no result, where such a process is killed.
    """
    look = _Look(folder, hashed)
    if workers == 0:
        yield from map(look, paths)
        return
    pool = ProcessPoolExecutor(workers, initializer=_ignore_interrupt)
    done = 0
    try:
        for facts in pool.map(look, paths, chunksize=_AT_ONCE):
            yield facts
            done += 1
    except BrokenProcessPool as error:
        raise InputError(
            f"a process that reads images was killed, at {paths[done]!r} or one of the images after it; "
            "where it ran out of memory, lower --num_workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # waits: Python 3.11's exit trips over a pool that is still closing


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole process group; the main process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
