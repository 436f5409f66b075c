"""XProNet's initial prototypes: k-means over the training studies of each label.

Shapes: N studies, C classes, W feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modules.runtime.run_log import Bar

# Above this many members, mini-batch k-means: the full algorithm passes over all of them dozens of times.
MOST_AT_ONCE = 20_000
COPY_NOISE = 0.1  # of each feature's standard deviation


@dataclass(frozen=True)
class Prototypes:
    """Prototypes (C * num, W_image + W_text), the factor of the text features, and the classes with too few members.

    ``too_few`` maps a class to (number of different members, number needed).
    """

    prototypes: np.ndarray
    text_scale: float
    too_few: dict[str, tuple[int, int]]


def make_prototypes(
    sides: Sequence[np.ndarray], texts: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, num: int, seed: int
) -> Prototypes:
    """``num`` prototypes per class from image features (N, W_image) and report features (N, W_text).

    With two ``sides``, the features of the images and of their mirror images, each gives half of the prototypes.
    Report features are scaled to the root mean square of the image features. ``labels`` (N, C) are multi-hot.
    """
    scale = (_mean_square(sides[0]) / max(_mean_square(texts), 1e-12)) ** 0.5
    shares = [num] if len(sides) == 1 else [num - num // 2, num // 2]
    parts, too_few = [], {}
    for number, (images, share) in enumerate(zip(sides, shares, strict=True)):
        centres, found = cluster_by_label(
            np.concatenate([images, scale * texts], axis=1),
            labels,
            share,
            classes=classes,
            seed=seed + number,
            description=("k-means", "k-means, mirrored")[number],
        )
        parts.append(centres)
        too_few |= {name: (count, share) for name, count in found.items()}
    return Prototypes(np.concatenate(parts, axis=1).reshape(len(classes) * num, -1), scale, too_few)


def cluster_by_label(
    features: np.ndarray,
    labels: np.ndarray,
    num: int,
    *,
    classes: Sequence[str],
    seed: int,
    description: str = "k-means",
) -> tuple[np.ndarray, dict[str, int]]:
    """k-means centres (C, num, W) of ``features`` (N, W), one clustering per column of multi-hot ``labels`` (N, C).

    A class with fewer different members than ``num`` has a centre on each member and noisy copies of them, or, without
    any member, noise around the mean of all features. The second result is the number of different members of those
    classes.
    """
    rng = np.random.default_rng(seed)
    spread = features.std(axis=0)
    centres = np.empty((len(classes), num, features.shape[1]), np.float32)
    short: dict[str, int] = {}
    for row, name in enumerate(Bar(classes, description)):
        members = features[labels[:, row] > 0]
        different = len({hash(member.tobytes()) for member in members})
        if different < num:
            short[name] = different
        found = _centres(members, min(num, different), seed)
        missing = num - len(found)
        noise = rng.standard_normal((missing, features.shape[1])) * spread
        if len(found):
            copies = found[np.arange(missing) % len(found)] + COPY_NOISE * noise
        else:
            copies = features.mean(axis=0) + noise
        centres[row] = np.concatenate([found, copies])
    return centres, short


def _centres(members: np.ndarray, num: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if num == 0:
        return members[:0]
    if len(members) > MOST_AT_ONCE:
        kmeans = MiniBatchKMeans(num, random_state=seed, batch_size=4096, n_init=3)
    else:
        kmeans = KMeans(num, random_state=seed)
    return kmeans.fit(members).cluster_centers_


def _mean_square(features: np.ndarray) -> float:
    """Mean of the squared entries, computed in float64."""
    return float(np.mean(np.square(features, dtype=np.float64)))
