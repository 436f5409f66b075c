"""Two training-free baselines: the commonest training report, and the report of the nearest training image.

Training reports are expected in the form of generated ones (cleaned, cut to max_seq_length), so that the comparison is
fair.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

COMMONEST, NEAREST = "commonest training report", "nearest training image"


def commonest_report_baseline(train_reports: Sequence[str], num_images: int) -> list[str]:
    """The commonest training report (the first of equals), repeated for each of ``num_images`` images."""
    [(report, _)] = Counter(train_reports).most_common(1)
    return [report] * num_images


def nearest_image_baseline(
    train_features: np.ndarray, train_reports: Sequence[str], features: np.ndarray, *, block_size: int = 1024
) -> list[str]:
    """For each of M images the report of the most similar training image.

    ``train_features`` (N, C) and ``features`` (M, C) are pooled visual features; similarity is their cosine, and the
    first of equals wins. Needs block_size * N float32 numbers at a time.
    """
    train_features = _normalise(train_features)  # (N, C)
    reports: list[str] = []
    for start in tqdm(range(0, len(features), block_size), desc="nearest training image", leave=False, disable=None):
        block = _normalise(features[start : start + block_size])  # (block, C)
        reports.extend(train_reports[row] for row in (block @ train_features.T).argmax(axis=1))
    return reports


def _normalise(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
