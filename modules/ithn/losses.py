"""Losses of a report generator trained with ITHN (Voutharoja, Wang, Zhou, ECAI 2023, arXiv 2305.07176).

Shape legend: B samples, T decoder positions, K token ids (vocabulary + 1), D joint embedding width.
Features are rows of unit length. Everything is computed in float32 at least, whatever autocast says outside:
call these functions with autocast disabled, because it would turn the matrix products into half precision.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.ithn.contrastive_forms import CONTRASTIVE_FORMS, FORMS, Anchors, FormOptions

EPS = 1e-6


@dataclass(frozen=True)
class FurtherColumns:
    """M negatives besides those of the batch, as scores S/tau, and which of them count."""

    of_images: Tensor  # (B, M) every image with the negative reports
    of_reports: Tensor  # (B, M) every report with the negative images
    count: Tensor  # (M,) or (B, M) bool


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalise(x: Tensor) -> Tensor:
    """The rows of ``x`` (..., D) divided by their length, (..., D); rows shorter than 1e-6 stay as they are."""
    x = _at_least_float32(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # The safe denominator is inside: a choice of quotients would leave 0/0 in the gradient.
    return x / length.masked_fill(length < EPS, 1.0)


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
    return mean_over(cosine.abs() if absolute else cosine, rows)


def mean_over(values: Tensor, rows: Tensor | None) -> Tensor:
    """Mean of ``values`` (..., B) over ``rows`` (B,) bool, or over all, (...); that of none is 0."""
    if rows is None:
        return values.mean(-1)
    return values.masked_fill(~rows, 0.0).sum(-1) / rows.sum().clamp(min=1)


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
    named = {"cos_positive": report, **{name: normalise(other) for name, other in others.items()}}
    cosines = (_at_least_float32(image) * torch.stack([_at_least_float32(other) for other in named.values()])).sum(
        -1
    )  # (others, B)
    means = mean_over(cosines, rows)
    return {**dict(zip(named, means.unbind(), strict=True)), "retrieval_accuracy": hits.float().mean()}


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
    scores: Tensor,
    form: str = "standard",
    rows: Tensor | None = None,
    excluded: Tensor | None = None,
    *,
    further: FurtherColumns | None = None,
    log_weights: Tensor | None = None,
    targets: Tensor | None = None,
    scale: Tensor | float = 1.0,
    options: FormOptions | None = None,
) -> Tensor:
    """L_CP, Eq. 12: mean of the row-wise and the column-wise contrastive loss of ``scores`` = S/tau (B, B), a scalar.

    ``form`` is one of modules/ithn/contrastive_forms.py, with its ``options`` and ``scale`` = 1/tau. ``rows`` (B,) bool
    are the samples that take part, as rows and as columns. ``excluded`` (B, B) bool, symmetric, are off-diagonal pairs
    left out of the denominators; ``log_weights`` (B, B), symmetric, are added to the scores off the diagonal.
    ``further`` are negatives besides those of the batch. ``targets`` (B, B), rows of sum 1, replace the partner as the
    target of form standard. A sample that has nothing to be compared with (as in a batch of one) counts 0 with a zero
    gradient. ValueError for an unknown form or a form without anchors.
    """
    of_anchor = FORMS[form].of_anchor if form in FORMS else None
    if of_anchor is None:
        raise ValueError(f"contrastive form {form!r} is unknown: one of {', '.join(CONTRASTIVE_FORMS)}")
    scores = _at_least_float32(scores)
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    negatives = ~own
    if excluded is not None:
        negatives = negatives & ~excluded
    if log_weights is not None:
        scores = scores + log_weights.masked_fill(own, 0.0)
    count: Tensor | int = len(scores)
    if rows is not None:
        own = own & rows.unsqueeze(1)
        negatives = negatives & rows.unsqueeze(0) & rows.unsqueeze(1)
        count = rows.sum().clamp(min=1)
    options = options or FormOptions()
    total = scores.new_zeros(())
    for image_to_report in (True, False):
        square, others = (scores, negatives) if image_to_report else (scores.T, negatives.T)
        partner = own
        partners = square.diagonal()
        if further is not None:
            more = further.of_images if image_to_report else further.of_reports
            square = torch.cat([square, _at_least_float32(more)], dim=1)
            others = torch.cat([others, further.count.expand(len(scores), -1)], dim=1)
            partner = F.pad(partner, (0, more.shape[1]))
        anchors = Anchors(partners, square, others, others | partner, scale)
        each = of_anchor(anchors, options) if targets is None else _against_targets(anchors, targets)
        total = total + torch.where(others.any(1), each, 0.0).sum()
    return total / (2 * count)


def _against_targets(anchors: Anchors, targets: Tensor) -> Tensor:
    """Cross entropy (B,) of the anchors' candidates with ``targets`` (B, B), what is no candidate left out of them."""
    wanted = torch.where(anchors.candidates[:, : len(targets)], targets, 0.0)
    wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=EPS)
    log_sum = anchors.scores.masked_fill(~anchors.candidates, -torch.inf).logsumexp(1)
    return log_sum - (wanted * anchors.scores[:, : len(targets)]).sum(1)


def soft_targets(features: Tensor, temperature: float) -> Tensor:
    """Targets (B, B), rows of sum 1: softmax of the cosines of ``features`` (B, F) (MedCLIP, arXiv 2210.10163, Eq. 3).

    A row without features is like itself alone. A small ``temperature`` leaves the partner only.
    """
    features = normalise(features)
    cosines = features @ features.T
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    return (cosines.masked_fill(own, 1.0) / temperature).softmax(1)


def equal_rows(features: Tensor, others: Tensor | None = None) -> Tensor:
    """(B, M) bool: which rows of ``features`` (B, F) equal which of ``others`` (M, F), or of themselves, each with
    itself left out.
    """
    equal = (features.unsqueeze(1) == (features if others is None else others).unsqueeze(0)).all(-1)
    if others is not None:
        return equal
    return equal & ~torch.eye(len(features), dtype=torch.bool, device=features.device)


def tf_idf(tokens: Tensor, mask: Tensor, idf: Tensor) -> Tensor:
    """(B, V) words of ``tokens`` (B, T) int64 where ``mask`` (B, T) is True: (1 + log tf) times ``idf`` (V,)."""
    counts = idf.new_zeros(len(tokens), len(idf)).scatter_add_(1, tokens, mask.to(idf.dtype))
    return torch.where(counts > 0, 1 + counts.clamp(min=1).log(), 0.0) * idf
