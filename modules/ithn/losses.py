"""Losses of a report generator trained with ITHN (Voutharoja, Wang, Zhou, ECAI 2023, arXiv 2305.07176).

Shape legend: B samples, T decoder positions, K token ids (vocabulary + 1), D joint embedding width.
Features are rows of unit length. Everything is computed in float32 at least, whatever autocast says outside:
call these functions with autocast disabled, because it would turn the matrix products into half precision.
"""

import torch
from torch import Tensor

from modules.ithn.variants import CONTRASTIVE_FORMS

EPS = 1e-6


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalise(x: Tensor) -> Tensor:
    """The rows of ``x`` (..., D) divided by their length, (..., D); rows shorter than 1e-6 stay as they are."""
    x = _at_least_float32(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # The safe denominator is inside: a `where` on the quotient would leave 0/0 in the gradient.
    return x / torch.where(length >= EPS, length, 1.0)


def token_nll(log_probs: Tensor, targets: Tensor, mask: Tensor, token_count: Tensor | float | None = None) -> Tensor:
    """L_CE: summed negative log-likelihood of the kept tokens divided by their number, a scalar.

    ``log_probs`` (B, T, K), ``targets`` (B, T) int64, ``mask`` (B, T) bool, True where a token counts (eos does,
    padding does not). ``token_count`` replaces the number of kept tokens where the normaliser is that of a larger
    batch: all accumulation steps and all processes.
    """
    if token_count is None:
        token_count = mask.sum().clamp(min=1)
    return _kept_nll(log_probs, targets, mask).sum() / token_count


def _kept_nll(log_probs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    nll = -_at_least_float32(log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1))  # (B, T)
    return torch.where(mask, nll, 0.0)


def report_nll(log_probs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Summed negative log-likelihood (B,) of each report's kept tokens; arguments as in ``token_nll``."""
    return _kept_nll(log_probs, targets, mask).sum(1)


def cosine_loss(image: Tensor, negative_image: Tensor, rows: Tensor | None = None, absolute: bool = False) -> Tensor:
    """L_CS, Eq. 1: mean cosine between an image and its hard-negative image, both (B, D) of unit length; a scalar.

    Only the samples in ``rows`` (B,) bool count, and the mean of none is 0; ``absolute`` takes the cosine's absolute
    value, as the released code does.
    """
    cosine = (_at_least_float32(image) * _at_least_float32(negative_image)).sum(-1)  # (B,)
    if absolute:
        cosine = cosine.abs()
    if rows is None:
        return cosine.mean()
    return torch.where(rows, cosine, 0.0).sum() / rows.sum().clamp(min=1)


def clip_scores(image: Tensor, report: Tensor, scale: Tensor | float) -> Tensor:
    """CLIP's similarity S_1/tau: ``scale`` * cos(z_i, u_j), (B, B); image z and report u (B, D) of unit length."""
    return scale * (_at_least_float32(image) @ _at_least_float32(report).T)


@torch.no_grad()
def alignment(image: Tensor, report: Tensor, rows: Tensor | None = None, **others: Tensor) -> dict[str, Tensor]:
    """What to log of the features (B, D) of unit length: scalars by name, without gradient.

    Mean cosine of each image with its report and with ``others`` (B, D), over the samples in ``rows`` (B,) bool, and
    how often an image's nearest report of the batch is its own.
    """
    hits = clip_scores(image, report, 1.0).argmax(1) == torch.arange(len(image), device=image.device)
    cosines = {name: cosine_loss(image, normalise(other), rows) for name, other in others.items()}
    return {"cos_positive": cosine_loss(image, report, rows), **cosines, "retrieval_accuracy": hits.float().mean()}


def modified_scores(
    image: Tensor,
    report: Tensor,
    negative_image: Tensor,
    negative_report: Tensor,
    harder_negative: Tensor,
    scale: Tensor | float,
    harder_scale: Tensor | float | None = None,
    keep_off_diagonal: bool = True,
) -> Tensor:
    """S/tau, Eq. 9-11: (S_1 + S_2 + S_3') / 3 times ``scale`` = 1/tau, (B, B).

    S_1 = cos(z_i, u_j) of the positives, S_2 = cos(z-_i, u-_j) of the hard negatives, S_3 = <z_i, u~_j> with the
    harder negative; S_3' is S_3 with its diagonal negated. All features are (B, D) of unit length, except u~, whose
    length is used as it is. The released code departs twice: ``harder_scale`` is a scale of its own for S_3', and
    ``keep_off_diagonal=False`` sets everything off the diagonal of S_3' to 0.
    """
    s1 = clip_scores(image, report, scale)
    s2 = clip_scores(negative_image, negative_report, scale)
    s3 = clip_scores(image, harder_negative, scale if harder_scale is None else harder_scale)
    diagonal = torch.eye(len(s3), dtype=torch.bool, device=s3.device)
    s3 = torch.where(diagonal, -s3, s3 if keep_off_diagonal else 0.0)
    return (s1 + s2 + s3) / 3


def contrastive_loss(
    scores: Tensor, form: str = "standard", rows: Tensor | None = None, excluded: Tensor | None = None
) -> Tensor:
    """L_CP, Eq. 12: mean of the row-wise and the column-wise contrastive loss of ``scores`` = S/tau (B, B), a scalar.

    ``standard`` is the cross entropy with target i; ``decoupled`` is Eq. 8 as printed, whose denominator leaves the
    positive out: -S_ii/tau + log sum_{j != i} exp(S_ij/tau), which may be negative. ``rows`` (B,) bool are the samples
    that take part, as rows and as columns. ``excluded`` (B, B) bool, symmetric, are off-diagonal pairs left out of the
    denominators. A sample that has nothing to be compared with (as in a batch of one) counts 0 with a zero gradient.
    ValueError for an unknown form.
    """
    if form not in CONTRASTIVE_FORMS:
        raise ValueError(f"contrastive form {form!r} is unknown: one of {', '.join(CONTRASTIVE_FORMS)}")
    scores = _at_least_float32(scores)
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    candidates = torch.ones_like(own) if form == "standard" else ~own
    if excluded is not None:
        candidates = candidates & (own | ~excluded)
    count: Tensor | int = len(scores)
    if rows is not None:
        candidates = candidates & rows.unsqueeze(0) & rows.unsqueeze(1)
        count = rows.sum().clamp(min=1)
    both = _one_direction(scores, candidates) + _one_direction(scores.T, candidates.T)
    return both / (2 * count)


def _one_direction(scores: Tensor, candidates: Tensor) -> Tensor:
    """Sum over rows of log sum_{j candidate} exp(S_ij) - S_ii; rows without a candidate count 0."""
    log_sum = scores.masked_fill(~candidates, -torch.inf).logsumexp(1)  # -inf, with a gradient of 0, for such a row
    return torch.where(candidates.any(1), log_sum - scores.diagonal(), 0.0).sum()
