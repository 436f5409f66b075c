"""k-means inside each label's group of the training set: XProNet's initial prototypes."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

# Above so many members k-means reads them in batches; the whole group would be gone over dozens of times.
MOST_AT_ONCE = 20_000
COPY_NOISE = 0.1  # of each feature's standard deviation


def cluster_by_label(
    features: np.ndarray,
    labels: np.ndarray,
    num: int,
    *,
    classes: Sequence[str],
    seed: int,
    description: str = "k-means",
) -> tuple[np.ndarray, dict[str, int]]:
    """Centres (C, num, W) of the members' features (N, W) for each of the C columns of multi-hot ``labels`` (N, C).

    A class with fewer different members than ``num`` has a centre on each; the other rows are copies with noise, and
    around the mean of all features where it has no member. Also returns, by class, how many different members those
    with too few have.
    """
    rng = np.random.default_rng(seed)
    spread = features.std(axis=0)
    centres = np.empty((len(classes), num, features.shape[1]), np.float32)
    short: dict[str, int] = {}
    for row, name in enumerate(tqdm(classes, desc=description, unit="class")):
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


def mean_square(features: np.ndarray) -> float:
    """Of all entries, in float64."""
    return float(np.mean(np.square(features, dtype=np.float64)))
