"""Where synthesised negatives lie among the real report features: what is nearest to them, and how far it is.

Shape legend: M real samples (the bank), N anchors among them that have a hard negative, E the joint embedding, D the
decoder's width. Features are rows of unit length in float64, distances are Euclidean: 0 to 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.ithn.losses import normalise
from modules.ithn.synthesis import STRATEGIES

CHUNK = 1024  # rows of similarities at a time


@dataclass(frozen=True)
class Bank:
    """Real samples. u- has no forward pass of its own: it is the row of the neighbour's report with its own image."""

    image: Tensor  # (M, E) z
    report: Tensor  # (M, E) u
    key: Tensor  # (M,) int64, equal for the same text and for the same study
    anchor: Tensor  # (N,) rows of the samples that have a hard negative
    negative: Tensor  # (N,) rows of these


def harder_negatives(bank: Bank, strategy: str, hardness: float, *, clamp_segment: bool = False) -> Tensor:
    """u~ (N, E) of unit length, from u-; ``clamp_segment`` keeps a projection between u- and u."""
    row = STRATEGIES[strategy]
    assert row.synthesise is not None
    options = {"clamp_segment": clamp_segment} if row.is_projection else {}
    z, u, negative = bank.image[bank.anchor], bank.report[bank.anchor], bank.report[bank.negative]
    return normalise(row.synthesise(z, u, negative, hardness, **options))


def nearest(points: Tensor, points_key: Tensor | None, bank: Bank) -> tuple[Tensor, Tensor]:
    """Distance (N,) from ``points`` (N, E) to the nearest report of the bank, and its row (N,).

    With ``points_key`` (N,) reports of the same key are left out; the distance is infinite where none is left.
    """
    distances, rows = [], []
    for start in range(0, len(points), CHUNK):
        part = points[start : start + CHUNK]
        cosine = part @ bank.report.T  # (n, M)
        if points_key is not None:
            cosine = cosine.masked_fill(points_key[start : start + CHUNK, None] == bank.key, -torch.inf)
        best, row = cosine.max(1)
        # sqrt(2 - 2 cos) would turn the rounding of a cosine of 1 into a distance.
        distance = torch.linalg.vector_norm(part - bank.report[row], dim=1)
        distances.append(torch.where(best.isfinite(), distance, torch.inf))
        rows.append(row)
    return torch.cat(distances), torch.cat(rows)


def spread(values: Tensor) -> dict[str, float]:
    """Median, quartiles and mean of ``values`` (N,)."""
    q1, median, q3 = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "mean": values.double().mean().item()}


def similarities(bank: Bank) -> dict:
    """What does not depend on the synthesis: distances between real reports, cosines, retrieval within the bank."""
    z = bank.image[bank.anchor]
    between, _ = nearest(bank.report, bank.key, bank)
    _, found = nearest(z, None, bank)
    return {
        "distance_between_real": spread(between),
        "distance_to_negative": spread(_length(bank.report[bank.anchor] - bank.report[bank.negative])),
        "cos_positive": spread((z * bank.report[bank.anchor]).sum(1)),
        "cos_negative": spread((z * bank.report[bank.negative]).sum(1)),
        "retrieval_accuracy": (bank.key[found] == bank.key[bank.anchor]).double().mean().item(),
    }


def positions(bank: Bank, harder: Tensor) -> dict:
    """Where ``harder`` = u~ (N, E) lies: distance to the nearest real report, whose that is, and cos(z, u~).

    A text that is identical counts as the sample's own; where u and u- share theirs, it counts as u.
    """
    distance, row = nearest(harder, None, bank)
    own = bank.key[row] == bank.key[bank.anchor]
    negative = (bank.key[row] == bank.key[bank.negative]) & ~own
    shares = {"u": own, "negative": negative, "other": ~(own | negative)}
    return {
        "distance": spread(distance),
        "nearest": {name: share.double().mean().item() for name, share in shares.items()},
        "cos_harder": spread((bank.image[bank.anchor] * harder).sum(1)),
    }


def moves(step: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """The shortest shift (N, D) of a report's hidden states whose projection is ``step`` = u~ - u- (N, E).

    ``mean`` (N, D) is the mean hidden state of u-, ``projection`` (E, D) the text projection W. u- = W m / |W m|, so
    the shift is W^+ step |W m|: W (m + shift) = |W m| u~. Where W has no preimage (E > D) it is least squares.
    """
    length = _length(mean @ projection.T).unsqueeze(1)
    return (length * step) @ torch.linalg.pinv(projection).T


def _length(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)
