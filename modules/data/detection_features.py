"""Region features of an object detector in HDF5, in captioning's usual layout: ``<image id>_features`` (n, C) each.

Shapes: B studies, R = the most detections read of an image, C their width.
"""

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.data.annotations import Study
from modules.data.hdf5 import Refused, own_dataset, require_plain_matrix
from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular


class DetectionFeatures:
    """A data set's ``read_image`` (path -> features (R, C)) and ``transform`` (which changes nothing) in one.

    ``ids`` maps an image's path in the annotation to the id that names its features. At most ``max_detections`` rows
    of an image are read, in the file's order; fewer are padded with rows of zeros, which ``DetectionExtractor`` masks.
    Features are read when a sample needs them, by each process through its own handle. InputError for a file that
    cannot be read, and for an image without features in it.
    """

    def __init__(self, file: str, ids: Mapping[str, str], max_detections: int):
        self.file, self.ids, self._handle = file, ids, None
        self._max_detections = max_detections
        _READERS.add(self)
        self.shape = (max_detections, self._matrix(next(iter(ids))).shape[1])
        self.close()

    def __call__(self, path: str) -> Tensor:
        """Features (R, C) float32 of the image at ``path``."""
        matrix = self._matrix(path)
        if matrix.shape[1] != self.shape[1]:
            raise InputError(
                f"--detection_features {self.file}: '{matrix.name[1:]}' has {matrix.shape[1]} columns, "
                f"but the first image has {self.shape[1]}"
            )
        try:
            rows = torch.from_numpy(matrix[: self.shape[0]].astype("float32"))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"--detection_features {self.file}: '{matrix.name[1:]}' is damaged ({_one_line(error)})"
            ) from error
        features = torch.zeros(self.shape)
        features[: len(rows)] = rows
        return features

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _READERS.add(self)

    def locate(self, path: str) -> str:
        """Name of the image's features in the file; InputError where there are none."""
        return self._matrix(path).name

    def blank(self, num_views: int) -> Tensor:
        """(N, R, C) of zeros, for a sample's views."""
        return torch.zeros(num_views, *self.shape)

    def pixels(self, features: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """The features (R, C) unchanged: nothing is random."""
        return features

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    def _matrix(self, path: str) -> Any:
        """The h5py.Dataset of the image at ``path``, not read yet."""
        import h5py

        if path not in self.ids:
            raise InputError(
                f"--detection_features {self.file}: no record of the annotation has {path!r} as its first "
                "image, so its id, and with it its features, are not known"
            )
        name = f"{self.ids[path]}_features"
        try:
            if self._handle is None:
                require_regular(self.file)
                self._handle = h5py.File(self.file, "r", locking="best-effort")
            dataset = own_dataset(self._handle, name)
            if dataset is not None:
                require_plain_matrix(dataset, self._max_detections)
        except Refused as error:
            raise InputError(f"--detection_features {self.file}: '{name}' {error}") from error
        except Exception as error:  # damaged bytes lead the reader to all kinds of exceptions
            reason = "no such file" if isinstance(error, FileNotFoundError) else _one_line(error)
            raise InputError(f"--detection_features {self.file}: cannot be read: {reason}") from error
        if dataset is None:
            raise InputError(
                f"--detection_features {self.file}: has no '{name}'; every record of "
                "the annotation needs a matrix (n, width) that its id names"
            )
        return dataset


def detections_of(file: str, splits: Mapping[str, Sequence[Study]], max_detections: int) -> DetectionFeatures:
    """The features of an annotation's records, one image each, before ``split_captions``."""
    ids = {study.image_paths[0]: study.id for studies in splits.values() for study in studies}
    return DetectionFeatures(file, ids, max_detections)


# HDF5 keeps state of an open file that a forked process must not share: no reader is open while a fork happens.
_READERS: "weakref.WeakSet[DetectionFeatures]" = weakref.WeakSet()


def _close_readers() -> None:
    for reader in list(_READERS):
        reader.close()


os.register_at_fork(before=_close_readers)


class DetectionExtractor(nn.Module):
    """Takes the place of a backbone's visual extractor; detections become its patch features."""

    def __init__(self, max_detections: int, width: int):
        super().__init__()
        self.patches_per_view, self.width = max_detections, width

    def forward(self, images: Tensor, view_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Detections (B, 1, R, C) -> patches (B, R, C), their mask (B, R), and their mean over the present ones (B, C).

        A row of zeros is padding; an image's first row always counts.
        """
        patches = images.flatten(1, 2)
        present = (patches != 0).any(dim=2)
        present[:, 0] = True
        pooled = patches.sum(dim=1) / present.sum(dim=1, keepdim=True)
        return patches, present, pooled


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
