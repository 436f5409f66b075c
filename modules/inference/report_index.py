"""Training reports indexed by their images' features: shows what was written about similar images.

The file contains patients' reports, as the annotation does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modules.runtime.errors import InputError
from modules.runtime.input_files import open_safetensors
from modules.runtime.records import write_private

FORMAT = "ithn-report-index-1"


@dataclass(frozen=True)
class ReportIndex:
    """``features`` (M, C) float32 of norm 1, pooled visual features of M training samples; their ``reports``.

    ``model_sha256`` identifies the visual extractor that computed the features.
    """

    features: np.ndarray
    reports: tuple[str, ...]
    model_sha256: str

    @classmethod
    def of(cls, features: np.ndarray, reports: Sequence[str], model_sha256: str) -> "ReportIndex":
        """Normalise ``features`` (M, C)."""
        return cls(_normalise(features), tuple(reports), model_sha256)

    def nearest(self, features: np.ndarray, count: int) -> list[tuple[float, str]]:
        """(cosine, report) of the ``count`` most similar different reports, for one image's features (C,)."""
        cosines = self.features @ _normalise(features[None])[0]  # (M,)
        found: dict[str, float] = {}
        for row in np.argsort(-cosines, kind="stable"):
            found.setdefault(self.reports[row], float(cosines[row]))
            if len(found) == count:
                break
        return [(cosine, report) for report, cosine in found.items()]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file of mode 0600."""
        from safetensors.numpy import save

        metadata = {"format": FORMAT, "model_sha256": self.model_sha256, "reports": json.dumps(self.reports)}
        write_private(path, save({"features": self.features}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "ReportIndex":
        """Read what ``save`` wrote; InputError for anything else."""
        from safetensors import SafetensorError

        if not Path(path).is_file():
            raise InputError(f"--index {path}: no such file; scripts/index_reports.py makes one")
        try:
            with open_safetensors(path) as file:
                header = file.metadata() or {}
                features = file.get_tensor("features")
            reports = json.loads(header["reports"])
            model = header["model_sha256"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"--index {path}: not an index of scripts/index_reports.py, or damaged") from error
        strings = isinstance(reports, list) and all(isinstance(report, str) for report in reports)
        if header.get("format") != FORMAT or not strings or features.ndim != 2 or len(features) != len(reports):
            raise InputError(f"--index {path}: not an index of scripts/index_reports.py, or damaged")
        return cls(features, tuple(reports), model)

    def check(self, path: str, model_sha256: str, width: int) -> None:
        """InputError unless the model of ``model_sha256`` and visual ``width`` made this index."""
        if self.model_sha256 != model_sha256 or self.features.shape[1] != width:
            raise InputError(
                f"--index {path}: made with another visual extractor than the checkpoint's; make it again "
                "with scripts/index_reports.py --load"
            )


def _normalise(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
