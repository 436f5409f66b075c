"""Patch features of a frozen visual extractor, computed once: training then costs the encoder-decoder alone.

Shapes: S patches of an image, C their width. Each image is seen once, as in evaluation (no crop, no flip).
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor, nn

from modules.data.images import PIXELS, ImageFolder
from modules.data.loaders import GuardedLoader
from modules.data.transforms import Transform
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_MAPPED, require_regular
from modules.runtime.memory import freed_memory_kept

logger = logging.getLogger("ithn")

FORMAT = 2  # of what a file's name is made from
SECONDS_BETWEEN_LOOKS = 1.0  # at whether another training is done


@dataclass
class FeatureCache:
    """A data set's ``read_image`` (path -> features (S, C)) and ``transform`` (which changes nothing) in one."""

    file: Path
    rows: dict[str, int]  # image path -> row of the file
    folder: ImageFolder
    shape: tuple[int, int]  # (S, C)
    _features: np.ndarray | None = field(default=None, repr=False)

    def __call__(self, path: str) -> Tensor:
        """Features (S, C) float32 of the image at ``path``."""
        if self._features is None:  # each loader process maps the file itself
            self._features = _mapped(self.file)
        return torch.from_numpy(self._features[self.rows[path]].astype(np.float32))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_features": None}

    def locate(self, path: str) -> str:
        """Where the image itself is; see ImageFolder."""
        return self.folder.locate(path)

    def blank(self, num_views: int) -> Tensor:
        """(N, S, C) of zeros, for a sample's views."""
        return torch.zeros(num_views, *self.shape)

    def pixels(self, features: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """The features (S, C) unchanged: nothing is random."""
        return features


def build_feature_cache(
    folder: Path,
    images: ImageFolder,
    paths: Sequence[str],
    *,
    extractor: nn.Module,
    transform: Transform,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Iterable, str], Iterable],
    workers: int = 0,
    dtype: str = "float32",
) -> FeatureCache:
    """Features of the images at ``paths``: from ``folder`` where it has them, else computed, shared by all processes.

    The file's name is a hash of the extractor's weights and grid, the transform, the type, the images' folder and their
    paths, sizes and times: a change of any of them leads to another file, their order does not. An interrupted one is
    continued. S * C numbers of ``dtype`` per image; images are decoded by ``workers`` processes. Of several programs
    that need the same file one makes it and the others wait. InputError for an unreadable image, a full disk, and a
    damaged file.
    """
    kind, paths = np.dtype(dtype), sorted(paths)  # the splits and folds of the same images share one file
    key = _key(images, paths, extractor, transform, kind)
    file = folder / f"features-{key}.npy"
    rows = {path: row for row, path in enumerate(paths)}
    shape = (extractor.patches_per_view, extractor.width)
    if not distributed.broadcast_object(file.is_file()):
        try:
            with contextlib.ExitStack() as opened:
                target = None
                if distributed.is_main_process():
                    target = opened.enter_context(_Partial(file, (len(paths), *shape), kind))
                # Together, as no process may wait for an answer of another as long as the features can take.
                while distributed.broadcast_object(target and target.waits()):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                done = distributed.broadcast_object(target and target.begin())
                own = _batches(len(paths), done, batch_size)
                pixels = _decoded([paths[row] for batch in own for row in batch], images, transform, workers)
                opened.enter_context(freed_memory_kept())
                _compute(
                    target, own, pixels, len(paths) - done, shape, extractor, transform, device, batch_size, progress
                )
                if target is not None:
                    target.publish()
        except OSError as error:
            raise InputError(
                f"--feature_cache {folder}: {error.strerror or error}; {len(paths)} images need "
                f"{kind.itemsize * len(paths) * shape[0] * shape[1] / 2**30:.1f} GiB"
            ) from error
        distributed.broadcast_object(None)
        if not file.is_file():
            raise InputError(
                f"--feature_cache {folder}: the first process wrote {file.name}, which this machine does not "
                "see; give a folder that all machines share"
            )
    _require_whole(file, (len(paths), *shape), kind)
    return FeatureCache(file, rows, images, shape)


def _mapped(path: Path) -> np.ndarray:
    require_regular(path, MAX_MAPPED)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _require_whole(file: Path, shape: tuple[int, int, int], kind: np.dtype) -> None:
    try:
        found = _mapped(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"--feature_cache: {file} is damaged ({' '.join(str(error).split())[:150]}); "
            "delete it to have it made again"
        ) from error
    if found.shape != shape or found.dtype != kind:
        raise InputError(
            f"--feature_cache: {file} holds {found.dtype} of shape {found.shape}, expected {kind} of "
            f"{shape}; delete it to have it made again"
        )


def _key(images: ImageFolder, paths: Sequence[str], extractor: nn.Module, transform: Transform, kind: np.dtype) -> str:
    # An extractor's weights do not tell its activations; a function among them shows where it lies in memory.
    layers = re.sub(r" at 0x[0-9a-f]+", "", repr(extractor))
    digest = hashlib.sha256(f"{FORMAT}\0{PIXELS}\0{PIL.__version__}\0{transform!r}\0{layers}".encode())
    # Two versions of the same uncompressed images may differ in nothing but where they lie.
    digest.update(f"{images.root}\0".encode(errors="surrogateescape"))
    if kind != np.float32:
        digest.update(kind.name.encode())
    if transform.jpeg_draft:
        digest.update(b"JPEG drafts")
    if grid := getattr(extractor, "grid", 0):
        digest.update(f"grid {grid}".encode())
    for name, value in extractor.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    for path in paths:
        status = os.stat(images.locate(path))
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


class _Partial:
    """A feature file that is being written, row by row, in the order of the images: what is there need not be made
    again. Rows are appended rather than mapped, whose pages would be faulted in one by one. One program writes at a
    time; the next one finds the rows, or the finished ``file``.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], kind: np.dtype):
        self.path, self.file, self._kind = file.with_name(f".{file.name}.partial"), file, kind
        header = io.BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        self._header, self._row = header.getvalue(), kind.itemsize * shape[1] * shape[2]
        self._count, self.rows, self._told = shape[0], 0, False

    def __enter__(self) -> "_Partial":
        self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        return self

    def waits(self) -> bool:
        """Whether another program writes; else nobody but this one does from now on."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self._told:
                logger.info("--feature_cache: another training computes these features; this one waits for them")
            self._told = True
            return True
        except OSError:
            pass  # cluster file systems may have no locks: there one training at a time may begin
        return False

    def begin(self) -> int:
        """How many rows are there already; the next ones are appended behind them."""
        if self.file.is_file():  # whose writer was waited for
            self.rows = self._count
            return self.rows
        if self._file.read(len(self._header)) == self._header:
            self.rows = (self._file.seek(0, os.SEEK_END) - len(self._header)) // self._row
        else:
            self._file.seek(0)
            self._file.write(self._header)
        self._file.truncate(len(self._header) + self.rows * self._row)
        self._file.seek(0, os.SEEK_END)
        return self.rows

    def append(self, features: Tensor) -> None:
        """Features (n, S, C) of the next n images."""
        with np.errstate(over="ignore"):
            values = features.numpy().astype(self._kind)
        if self._kind == np.float16 and np.isinf(values).any():
            largest = float(features.abs().max())
            raise InputError(f"--feature_dtype float16: a feature of {largest:.4g} is beyond its range; give float32")
        self._file.write(values.tobytes())

    def publish(self) -> None:
        """Give the finished file its name, unless another program made it."""
        self._file.flush()
        if self.file.is_file():
            self.path.unlink(missing_ok=True)
        else:
            os.replace(self.path, self.file)

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # processes that decode images have the file too
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _batches(count: int, done: int, batch_size: int) -> list[range]:
    """The rows from ``done`` on that this process computes: the processes take the batches in turn."""
    together = batch_size * distributed.world_size()
    own = (start + distributed.rank() * batch_size for start in range(done, count, together))
    return [range(min(first, count), min(first + batch_size, count)) for first in own]


class _Decoding(torch.utils.data.Dataset):
    """Pixels of images, or the InputError of one that cannot be read."""

    def __init__(self, paths: Sequence[str], images: ImageFolder, transform: Transform):
        self.paths, self.images, self.transform = paths, images, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            return self.transform.pixels(self.images(self.paths[index]))
        except InputError as error:
            return error


def _decoded(paths: Sequence[str], images: ImageFolder, transform: Transform, workers: int) -> Iterator[Tensor]:
    """The pixels of ``paths`` in order, decoded by ``workers`` processes; InputError for an unreadable image."""
    dataset = _Decoding(paths, images, transform)
    with contextlib.closing(iter(GuardedLoader(dataset, batch_size=None, num_workers=workers))) as decoded:
        for found in decoded:
            if isinstance(found, InputError):
                raise found
            yield found


@torch.inference_mode()
def _compute(
    target: _Partial | None,
    own: Sequence[range],
    pixels: Iterator[Tensor],
    count: int,
    shape: tuple[int, int],
    extractor: nn.Module,
    transform: Transform,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Iterable, str], Iterable],
) -> None:
    """Append the features of ``count`` images to ``target``, the main process's; ``own`` are this one's batches, of
    ``pixels``.
    """
    extractor.eval()
    for batch in progress(own, "features of the frozen visual extractor"):
        features = torch.zeros(batch_size, *shape)
        if part := list(itertools.islice(pixels, len(batch))):
            patches, _, _ = extractor(transform.normalise(torch.stack(part).to(device)).unsqueeze(1))  # one view each
            features[: len(part)] = patches.float().cpu()
        gathered = distributed.gather(features)
        if target is not None:
            target.append(gathered[:count])
        count -= len(gathered)
