"""Images resized once: one memory-mapped file of bytes replaces decoding PNG and JPEG files in every epoch.

It holds the results of Transform.resized, before the random crop, so that training and evaluation see the same tensors
as without it. An image that has changed since (size or time of its file) is read again.

The file: one ROW per image, in the order of the paths, then the pixels of all images as planes (1 or 3, H, W).
"""

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from torch import Tensor
from torch.utils.data import Dataset

from modules.data.images import PIXELS, ImageFolder, stored_shape
from modules.data.loaders import GuardedLoader
from modules.data.transforms import Transform
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_MAPPED, open_regular

logger = logging.getLogger("ithn")
FORMAT = 1  # of the file; part of its name
# Offset and shape of the planes, and the image file's size and time of change; no planes: unreadable.
ROW = np.dtype([(name, "<i8") for name in ("offset", "planes", "height", "width", "size", "changed")])
Progress = Callable[[Iterable, str], Iterable]


@dataclass
class ImageCache:
    """Maps a path to its resized image (1 or 3, H, W) uint8; replaces ImageFolder in a data set.

    A path that is not in the file, or whose image changed, is read from ``folder``, with its errors.
    """

    file: Path
    rows: dict[str, int]  # image path -> row of the file
    folder: ImageFolder
    transform: Transform
    _index: np.ndarray = field(init=False, repr=False)  # (images,) ROW
    _pixels: np.ndarray = field(init=False, repr=False)  # the whole file's bytes

    def __post_init__(self) -> None:
        self._map()

    def _map(self) -> None:
        try:
            self._index, self._pixels = _read(self.file, len(self.rows))
        except (OSError, ValueError) as error:
            raise InputError(f"image cache {str(self.file)!r} cannot be read: {error}") from error

    def __call__(self, path: str) -> np.ndarray:
        """(1 or 3, H, W) uint8, as Transform.resized returns it; InputError as from ImageFolder."""
        row = self.rows.get(path)
        if row is not None:
            offset, planes, height, width, *state = self._index[row].item()
            if planes and tuple(state) == _state(os.path.join(self.folder.root, path)):
                return self._pixels[offset : offset + planes * height * width].reshape(planes, height, width)
        return self.transform.resized(self.folder(path))

    def locate(self, path: str) -> str:
        """Where the image itself is; InputError also for one that could not be decoded."""
        if path in self.rows and not self._index[self.rows[path]]["planes"]:
            self.folder(path)
        return self.folder.locate(path)

    def __getstate__(self) -> dict:  # each loader process maps the file itself
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def build_image_cache(
    folder: Path, images: ImageFolder, paths: Sequence[str], *, transform: Transform, workers: int, progress: Progress
) -> ImageCache:
    """The cache of ``paths`` (distinct) in ``folder``; only images that are new or changed are decoded.

    ``workers`` processes share that work (0: this one does it). Of several programs that need the same file one makes
    it and the others wait. InputError for a full disk.
    """
    file = folder / f"images-{_key(images, paths, transform)}.bin"
    try:
        with _alone(file):
            _bring_up_to_date(file, images, paths, transform, workers, progress)
    except OSError as error:
        raise InputError(f"--image_cache {folder}: {error.strerror or error}") from error
    return ImageCache(file, {path: row for row, path in enumerate(paths)}, images, transform)


def _key(images: ImageFolder, paths: Sequence[str], transform: Transform) -> str:
    """Hash of all that determines the resized pixels, or which images may be read, except the image files."""
    size = transform.size if transform.resize is None else f"shorter side {transform.resize}"
    settings = (FORMAT, PIXELS, PIL.__version__, size, images.root, images.max_pixels, images.follow_links)
    if images.draft is not None:
        settings += ("JPEG drafts",)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update("\0".join(paths).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other process makes ``file``; remove what a killed one left."""
    handle = os.open(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # cluster file systems may have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        for left in file.parent.glob(f".{file.name}.*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _read(file: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and bytes of ``file``; ValueError for one that is shorter than its rows say."""
    with open_regular(file, MAX_MAPPED) as opened:
        pixels = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    index = pixels[: count * ROW.itemsize].view(ROW)
    ends = index["offset"] + index["planes"] * index["height"] * index["width"]
    if len(index) != count or ends.max(initial=0) > len(pixels):
        raise ValueError("it is cut off")
    return index, pixels


def _state(path: str) -> tuple[int, int]:
    """Size and time of change of an image file, (0, 0) where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _bring_up_to_date(
    file: Path, images: ImageFolder, paths: Sequence[str], transform: Transform, workers: int, progress: Progress
) -> None:
    index = np.zeros(len(paths), ROW)
    for row, path in enumerate(progress(paths, "looking for changed images")):
        index[row]["size"], index[row]["changed"] = _state(os.path.join(images.root, path))
    try:
        old_index, old_pixels = _read(file, len(paths))
        same = (old_index["size"] == index["size"]) & (old_index["changed"] == index["changed"])
        if same.all():
            return
    except (OSError, ValueError):
        old_index, old_pixels, same = index, np.zeros(0, np.uint8), np.zeros(len(paths), bool)
    new = [path for path, known in zip(paths, same, strict=True) if not known]
    most = old_pixels.nbytes + sum(_most_bytes(images, path, transform) for path in progress(new, "measuring images"))
    logger.info(
        "image cache: %d images to decode once, at most %.1f GiB in %s (%.1f GiB free)",
        len(new),
        most / 2**30,
        file.parent,
        shutil.disk_usage(file.parent).free / 2**30,
    )
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")  # mode 0600
    try:
        loader = GuardedLoader(_Decoded(new, images, transform), batch_size=None, num_workers=workers)
        with open(handle, "wb") as opened, contextlib.closing(iter(loader)) as decoded:
            _write(opened, index, same, old_index, old_pixels, decoded, progress)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    unreadable = int((index["planes"] == 0).sum())
    if unreadable:
        logger.warning("image cache: %d of %d images could not be read", unreadable, len(paths))


def _most_bytes(images: ImageFolder, path: str, transform: Transform) -> int:
    width, height, planes = stored_shape(os.path.join(images.root, path))
    if not planes or width * height > images.max_pixels:
        return 0
    width, height = transform.resized_size(width, height)
    return planes * width * height


def _write(
    opened: BinaryIO,
    index: np.ndarray,
    same: np.ndarray,
    old_index: np.ndarray,
    old_pixels: np.ndarray,
    decoded: Iterator[Tensor],
    progress: Progress,
) -> None:
    """Fill ``index`` and write it with the pixels: old ones for rows that are the ``same``, ``decoded`` ones else."""
    opened.write(index.tobytes())  # the place for it
    for row in progress(range(len(index)), "resizing images"):
        if same[row]:
            offset, planes, height, width, *_ = old_index[row].item()
            values = old_pixels[offset : offset + planes * height * width].reshape(planes, height, width)
        else:
            values = next(decoded).numpy()
        for name, value in zip(("offset", "planes", "height", "width"), (opened.tell(), *values.shape), strict=True):
            index[row][name] = value
        opened.write(values.tobytes())
    opened.seek(0)
    opened.write(index.tobytes())


class _Decoded(Dataset):
    """The resized image of each path, one plane where all three are equal; (0, 0, 0) for an unreadable one."""

    def __init__(self, paths: Sequence[str], images: ImageFolder, transform: Transform):
        self.paths, self.images, self.transform = paths, images, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> np.ndarray:
        try:
            planes = self.transform.resized(self.images(self.paths[row]))
        except InputError:
            return np.zeros((0, 0, 0), np.uint8)
        return planes[:1] if (planes == planes[:1]).all() else planes
