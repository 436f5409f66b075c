"""Strategies that synthesise a harder negative report (ITHN, arXiv 2305.07176, Sec. 3.4), and the table of them.

A strategy is ``f(image, report, negative, hardness) -> harder negative``: image z, report u and negative report u-
are (B, D) of unit length, hardness is the lambda of the paper in [0, 1], and the result is (B, D) in float32 (float64
for float64). ``negative`` is the point that the step starts from: the prior hard negative u-, or the harder negative
of the previous epoch. The result is not normalised, and gradients flow through it: the objective decides whether to
cut them.

The hinge of the triplet loss (Eq. 4) max(|z-u|^2 - |z-u~|^2 + m, 0) is taken as active, so its gradient in u~ is
2(z - u~), and one ascent step of size lambda/2 leads from u~ towards z.

A new strategy is a function and a line of STRATEGIES: --strategy, its help text and the probes read the table, which
is why this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-6


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [x.float() if x.dtype.itemsize < 4 else x for x in tensors]


def project(image: Tensor, report: Tensor, negative: Tensor, clamp_segment: bool = False) -> Tensor:
    """Eq. 6: the point p (B, D) nearest to z on the line through u~ and u, per sample.

    p = u~ + t (u - u~) with t = <z - u~, u - u~> / |u - u~|^2; where |u - u~|^2 < 1e-6 there is no line and p = u~.
    ``clamp_segment`` keeps t in [0, 1], so that p stays between u~ and u. All tensors are (B, D).
    """
    image, report, negative = _at_least_float32(image, report, negative)
    line = report - negative
    squared_length = (line * line).sum(-1, keepdim=True)  # (B, 1)
    along = ((image - negative) * line).sum(-1, keepdim=True)
    has_line = squared_length >= EPS
    # The safe denominator is inside: a `where` on p alone gives a finite value and a NaN gradient.
    t = (along / squared_length.where(has_line, 1.0)).where(has_line, 0.0)
    if clamp_segment:
        t = t.clamp(0, 1)
    return negative + t * line


def ithn(image: Tensor, report: Tensor, negative: Tensor, hardness: float, clamp_segment: bool = False) -> Tensor:
    """Eq. 7: (1 - lambda) u~ + lambda p, the projected gradient step of Eq. 5, (B, D); p is that of ``project``."""
    image, report, negative = _at_least_float32(image, report, negative)
    p = project(image, report, negative, clamp_segment)
    return (1 - hardness) * negative + hardness * p


def mochi(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """Eq. 2: (1 - lambda) u- + lambda u, (B, D): the mixing of MoCHi, with u- of one of the k nearest neighbours."""
    report, negative = _at_least_float32(report, negative)
    return (1 - hardness) * negative + hardness * report


def prior(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """u- itself, (B, D): the ablation without synthesis."""
    return _at_least_float32(negative)[0]


def unconstrained(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """The step of Eq. 5 without the projection, (1 - lambda) u~ + lambda z, (B, D): the ablation of Sec. 3.4."""
    image, negative = _at_least_float32(image, negative)
    return (1 - hardness) * negative + hardness * image


def released(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """The released code's ``ithn``, (B, D), whose projection mixes the batch: p_i = u-_i + sum_j <z_i - u-_i, b_j> c_j.

    b_j = u_j - u-_j and c_j = b_j / |b_j|: only one of the two factors has unit length. The step is that of Eq. 7.
    """
    image, report, negative = _at_least_float32(image, report, negative)
    lines = report - negative
    unit_lines = lines / lines.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    p = negative + ((image - negative) @ lines.T) @ unit_lines
    return (1 - hardness) * negative + hardness * p


@dataclass(frozen=True)
class Strategy:
    """A value of --strategy: its function, its line in the help text, and what else depends on it."""

    synthesise: Callable[..., Tensor] | None  # None: no hard negative takes part, S is S_1 alone
    meaning: str
    released: Callable[..., Tensor] | None = None  # the function of --ithn_variant released, where that is another
    draws_neighbour: bool = False  # u- is drawn from --num_neighbours neighbours; else it is the nearest
    is_step: bool = False  # a step from a starting point, which --previous_epoch_start can choose
    is_projection: bool = False  # takes clamp_segment
    has_queue: bool = False  # negatives are those of earlier batches
    as_columns: bool = False  # u~ is a further column of the softmax, whatever --negatives_as says


STRATEGIES: dict[str, Strategy] = {
    "ithn": Strategy(ithn, "the paper's projected gradient step", released=released, is_step=True, is_projection=True),
    "mochi": Strategy(mochi, "a neighbour mixed with the report itself", draws_neighbour=True),
    "prior": Strategy(prior, "the nearest neighbour as it is"),
    "columns": Strategy(prior, "the nearest neighbour as a further column of the softmax (NegCLIP)", as_columns=True),
    "unconstrained": Strategy(unconstrained, "the gradient step without the projection", is_step=True),
    "mochi_queue": Strategy(
        None, "MoCHi as published: a queue of earlier batches and mixtures of its hardest, no mining", has_queue=True
    ),
    "contrastive": Strategy(None, "no negatives, the contrastive loss compares images with reports only"),
}
# Names by what they need and do; the probes compare those that make a negative of their own.
NEEDING_NEGATIVES = tuple(name for name, strategy in STRATEGIES.items() if strategy.synthesise is not None)
DRAWING_NEIGHBOURS = tuple(name for name, strategy in STRATEGIES.items() if strategy.draws_neighbour)
SYNTHESISED = tuple(name for name in NEEDING_NEGATIVES if STRATEGIES[name].synthesise is not prior)
