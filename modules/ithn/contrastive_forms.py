"""Forms of the contrastive loss, and the table of them: what an anchor pays for its partner and its negatives.

A form is ``f(anchors, options) -> (B,)`` over B anchors, such as images, whose partners are the reports of their own
studies; ``anchors`` are their scores S/tau with everything that they are compared with. A new form is a function and a
line of FORMS: --contrastive_form, its help text and the checks of its options read the table, which is why this file
does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """B anchors and their scores with M candidates; scores are cosines times ``scale`` = 1/tau."""

    own: Tensor  # (B,) score with the partner
    scores: Tensor  # (B, M) with all candidates, the partner of anchor i in column i
    negatives: Tensor  # (B, M) bool, without the partner
    candidates: Tensor  # (B, M) bool, the negatives and the partner
    scale: Tensor | float


@dataclass(frozen=True)
class FormOptions:
    """Numbers that some of the forms take."""

    bias: Tensor | float = 0.0  # b of the sigmoid form
    positive_prior: float = 0.0  # tau+, how likely a negative is a positive in truth, in [0, 1)
    hardness_beta: float = 0.0  # concentration on hard negatives
    margin: float = 0.2  # of the triplet forms


def _log_sum(scores: Tensor, counted: Tensor) -> Tensor:
    """log sum over the counted columns of exp(scores), (B,); -inf, with a gradient of 0, where none is."""
    return scores.masked_fill(~counted, -math.inf).logsumexp(1)


def _softplus(x: Tensor) -> Tensor:
    return x.logaddexp(x.new_zeros(()))


def standard(anchors: Anchors, options: FormOptions) -> Tensor:
    """InfoNCE, Eq. 12 of ITHN: the cross entropy whose target is the partner, (B,)."""
    return _log_sum(anchors.scores, anchors.candidates) - anchors.own


def decoupled(anchors: Anchors, options: FormOptions) -> Tensor:
    """Eq. 8 of ITHN as printed, the partner left out of the denominator, (B,) (Yeh et al., arXiv 2110.06848)."""
    return _log_sum(anchors.scores, anchors.negatives) - anchors.own


def sigmoid(anchors: Anchors, options: FormOptions) -> Tensor:
    """SigLIP (Zhai et al., arXiv 2303.15343): every pair is a yes or a no, with a learned bias, (B,)."""
    against = _softplus(anchors.scores + options.bias).masked_fill(~anchors.negatives, 0.0).sum(1)
    return _softplus(-anchors.own - options.bias) + against


def debiased(anchors: Anchors, options: FormOptions) -> Tensor:
    """Chuang et al. (arXiv 2007.00224), Eq. 8: positives among the negatives are subtracted, (B,).

    Of N negatives, N tau+ are taken for positives like the partner; their sum is at least N exp(-1/tau).
    """
    return _against(anchors, options, anchors.negatives.to(anchors.scores.dtype))


def hardness_weighted(anchors: Anchors, options: FormOptions) -> Tensor:
    """Robinson et al. (arXiv 2010.04592), Eq. 4: negatives count by exp(beta S/tau), (B,); debiased as above."""
    weights = (options.hardness_beta * anchors.scores).masked_fill(~anchors.negatives, -math.inf).softmax(1)
    weights = weights.masked_fill(~anchors.negatives, 0.0)  # rows without a negative are NaN otherwise
    return _against(anchors, options, weights * anchors.negatives.sum(1, keepdim=True).to(weights.dtype))


def _against(anchors: Anchors, options: FormOptions, weights: Tensor) -> Tensor:
    """-log of the partner's share beside its debiased negatives, of which each counts by its weight (B, M); (B,)."""
    # exp(100) is more than float32 holds, so everything is divided by the largest.
    largest = anchors.scores.masked_fill(~anchors.candidates, -math.inf).amax(1).detach()
    largest = largest.where(anchors.candidates.any(1), anchors.own.detach())
    positive = (anchors.own - largest).exp()
    exponentials = (anchors.scores - largest.unsqueeze(1)).masked_fill(~anchors.negatives, -math.inf).exp()
    count = anchors.negatives.sum(1).to(anchors.scores.dtype)
    negative = (weights * exponentials).sum(1) - count * options.positive_prior * positive
    least = count * (-anchors.scale - largest).exp()
    negative = (negative / (1 - options.positive_prior)).maximum(least)
    return (positive + negative).log() + largest - anchors.own


def triplet(anchors: Anchors, options: FormOptions) -> Tensor:
    """VSE++ (Faghri et al., arXiv 1707.05612), Eq. 6: the hinge of the cosines with the hardest negative, (B,)."""
    hardest = anchors.scores.masked_fill(~anchors.negatives, -math.inf).amax(1)
    return (options.margin + (hardest - anchors.own) / anchors.scale).clamp(min=0)


def paper_triplet(image: Tensor, report: Tensor, harder_negative: Tensor, margin: float) -> Tensor:
    """Eq. 4 of ITHN as a loss, max(|z - u|^2 - |z - u~|^2 + m, 0), (B,); all features are (B, D)."""
    near, far = ((image - other).square().sum(-1) for other in (report, harder_negative))
    return (near - far + margin).clamp(min=0)


@dataclass(frozen=True)
class Form:
    """A value of --contrastive_form: its function, its line in the help text, and which settings it reads."""

    of_anchor: Callable[[Anchors, FormOptions], Tensor] | None  # None: of the samples' own negatives alone
    meaning: str
    options: tuple[str, ...] = ()  # settings that this form reads
    temperature: bool = True  # whether cosines are divided by a learned tau
    weighs: bool = False  # negatives may count more or less than once (--same_label_weight)


FORMS: dict[str, Form] = {
    "standard": Form(standard, "cross entropy, as CLIP", weighs=True),
    "decoupled": Form(decoupled, "Eq. 8 as printed, with the positive left out of the denominator", weighs=True),
    "sigmoid": Form(sigmoid, "SigLIP: each pair by itself, with a learned bias"),
    "debiased": Form(debiased, "Chuang 2020: negatives that may be positives are subtracted", ("positive_prior",)),
    "hardness_weighted": Form(
        hardness_weighted, "Robinson 2021: hard negatives count more", ("positive_prior", "hardness_beta")
    ),
    "triplet": Form(
        triplet, "VSE++: hinge with the hardest negative of the batch", ("triplet_margin",), temperature=False
    ),
    "paper_triplet": Form(
        None, "Eq. 4 as a loss: hinge with the harder negative", ("triplet_margin",), temperature=False
    ),
}
CONTRASTIVE_FORMS = tuple(FORMS)
OPTIONS = tuple(dict.fromkeys(name for form in FORMS.values() for name in form.options))
