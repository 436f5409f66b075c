"""Features of single words and patches in place of pooled ones: late interaction (FILIP, Yao et al., ICLR 2022).

Shapes: B samples, S visual tokens, T report tokens, E joint embedding; all tokens of unit length.
"""

from typing import Any

import torch
from torch import Tensor

from modules.losses import contrastive_loss, cosine_loss, normalise
from modules.negatives import project


def token_scores(image: Tensor, image_mask: Tensor, report: Tensor, report_mask: Tensor) -> Tensor:
    """(B, B) of image i and report j: the mean over j's tokens of the cosine to the patch of i that is nearest.

    ``image`` (B, S, E) with ``image_mask`` (B, S) bool, ``report`` (B, T, E) with ``report_mask`` (B, T) bool.
    """
    cosines = torch.einsum("ise,jte->ijts", image, report)  # (B, B, T, S)
    best = cosines.masked_fill(~image_mask[:, None, None, :], -torch.inf).amax(-1)  # (B, B, T)
    return torch.where(report_mask, best, 0.0).sum(-1) / report_mask.sum(-1).clamp(min=1)


def harder_tokens(image: Tensor, image_mask: Tensor, report: Tensor, report_mask: Tensor, negative: Tensor,
                  hardness: float | Tensor) -> Tensor:
    """Eq. 7 for every token of the negative report (B, T', E), of unit length.

    The token's u is the nearest token of the own report, its z the nearest patch of the own image.
    """
    def nearest(candidates: Tensor, mask: Tensor) -> Tensor:
        cosines = (negative @ candidates.transpose(1, 2)).masked_fill(~mask.unsqueeze(1), -torch.inf)  # (B, T', S)
        chosen = cosines.argmax(-1, keepdim=True)  # (B, T', 1)
        return candidates.gather(1, chosen.expand(-1, -1, candidates.shape[-1]))

    p = project(nearest(image, image_mask), nearest(report, report_mask), negative)
    return normalise((1 - hardness) * negative + hardness * p)


def contrast_tokens(objective: Any, batch: Any, pairs: list, outputs: list, epoch: int) -> dict[str, Tensor]:
    """The contrastive terms of a modules.objective.Objective with ``token_level``, in one process."""
    scale = objective.temp_1.clamp(max=objective.rule.max_log_scale).exp()
    images = torch.cat([output.image_features for output in outputs])
    projected = objective.img_projection(images[..., :-1])
    means, patches, present = projected[:, 0], projected[:, 1:], images[:, 1:, -1] > 0
    hidden = [output.report_features for output in outputs]
    words = [objective.text_projection(h if objective.report_gradient else h.detach()) for h in hidden]
    masks = [pair.token_mask[:, 1:] for pair in pairs]
    rows = len(words[0])
    own = patches[:rows], present[:rows]
    scores = token_scores(*own, words[0], masks[0])
    right = scores.argmax(1) == torch.arange(rows, device=scores.device)
    terms = {"cos_positive": scores.diagonal().mean(), "retrieval_accuracy": right.float().mean()}
    has_negative, column = None, None
    if len(pairs) == 2:
        has_negative = batch.has_negative
        with torch.no_grad():
            harder = words[1] if objective.strategy == "prior" else harder_tokens(
                *own, words[0], masks[0], words[1], objective.hardness(epoch))
        column = token_scores(*own, harder, masks[1]).diagonal().unsqueeze(1)
        terms |= {"cos_harder": column.mean(), "cosine": cosine_loss(means[:rows], means[rows:], has_negative)}
        column = scale * column
    loss = contrastive_loss(scale * scores, objective.contrastive_form, has_negative, None, for_images=column)
    return terms | {"contrastive": loss, "temperature": 1 / scale}
