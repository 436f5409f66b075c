"""Patch features of a frozen visual extractor, computed once: training then costs the encoder-decoder alone.

Shapes: S patches of an image, C their width. Each image is seen once, as in evaluation (no crop, no flip).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modules.data.images import ImageFolder
from modules.data.transforms import Transform
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_MAPPED, require_regular


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
        return torch.from_numpy(np.array(self._features[self.rows[path]]))

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
) -> FeatureCache:
    """Features of the images at ``paths``: from ``folder`` where it has them, else computed, shared by all processes.

    The file's name is a hash of the extractor's weights, the transform, and the images' paths, sizes and times: a
    change of any of them leads to another file. 4 * S * C bytes per image. InputError for an unreadable image, a full
    disk, and a damaged file.
    """
    key = _key(images, paths, extractor, transform)
    file = folder / f"features-{key}.npy"
    rows = {path: row for row, path in enumerate(paths)}
    shape = (extractor.patches_per_view, extractor.width)
    if not distributed.broadcast_object(file.is_file()):
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            target = None
            if distributed.is_main_process():
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
                target = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(paths), *shape))
            _compute(target, images, paths, shape, extractor, transform, device, batch_size, progress)
            if target is not None:
                target.flush()
                os.replace(temporary, file)
        except OSError as error:
            raise InputError(
                f"--feature_cache {folder}: {error.strerror or error}; {len(paths)} images need "
                f"{4 * len(paths) * shape[0] * shape[1] / 2**30:.1f} GiB"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        distributed.broadcast_object(None)
        if not file.is_file():
            raise InputError(
                f"--feature_cache {folder}: the first process wrote {file.name}, which this machine does not "
                "see; give a folder that all machines share"
            )
    _require_whole(file, (len(paths), *shape))
    return FeatureCache(file, rows, images, shape)


def _mapped(path: Path) -> np.ndarray:
    require_regular(path, MAX_MAPPED)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _require_whole(file: Path, shape: tuple[int, int, int]) -> None:
    try:
        found = _mapped(file)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"--feature_cache: {file} is damaged ({' '.join(str(error).split())[:150]}); "
            "delete it to have it made again"
        ) from error
    if found.shape != shape or found.dtype != np.float32:
        raise InputError(
            f"--feature_cache: {file} holds {found.dtype} of shape {found.shape}, expected float32 of "
            f"{shape}; delete it to have it made again"
        )


def _key(images: ImageFolder, paths: Sequence[str], extractor: nn.Module, transform: Transform) -> str:
    digest = hashlib.sha256(repr(transform).encode())
    for name, value in extractor.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    for path in paths:
        status = os.stat(images.locate(path))
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def _compute(
    target: np.ndarray | None,
    images: ImageFolder,
    paths: Sequence[str],
    shape: tuple[int, int],
    extractor: nn.Module,
    transform: Transform,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Iterable, str], Iterable],
) -> None:
    """Fill ``target`` (paths, S, C) of the main process; the processes take the batches in turn."""
    extractor.eval()
    together = batch_size * distributed.world_size()
    for start in progress(range(0, len(paths), together), "features of the frozen visual extractor"):
        first = start + distributed.rank() * batch_size
        features = torch.zeros(batch_size, *shape)
        if part := paths[first : min(first + batch_size, start + together)]:
            pixels = torch.stack([transform.pixels(images(path)) for path in part])
            patches, _, _ = extractor(transform.normalise(pixels.to(device)).unsqueeze(1))  # one view each
            features[: len(part)] = patches.float().cpu()
        gathered = distributed.gather(features)
        if target is not None:
            target[start : start + together] = gathered[: len(paths) - start].numpy()
