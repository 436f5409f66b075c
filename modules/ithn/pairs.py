"""Positives and hard negatives as one batch through the network, and its output taken apart again.

A pair is a modules.data.batches.Pair of B rows: images (B, N, 3, H, W), view_mask (B, N), tokens and token_mask
(B, T + 1), labels (B, 14) or None. Output and features are those of models/base.py.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def of_any_size(batch: Any, pad_id: int | None) -> Any:
    """``batch`` for a compiled graph that takes any number of rows and any length of reports.

    With ``pad_id`` both pairs get the length of the longer one, as joining them would give it. The masks of
    views are left out where every view is present.
    """
    pairs = {name: pair for name in ("positive", "negative") if (pair := getattr(batch, name)) is not None}
    width = max(pair.tokens.shape[1] for pair in pairs.values())
    all_present = all(bool(pair.view_mask.all()) for pair in pairs.values())
    for name, pair in pairs.items():
        missing = width - pair.tokens.shape[1] if pad_id is not None else 0
        pairs[name] = dataclasses.replace(
            pair,
            tokens=F.pad(pair.tokens, (0, missing), value=pad_id or 0),
            token_mask=F.pad(pair.token_mask, (0, missing), value=False),
            view_mask=None if all_present else pair.view_mask,
        )
    batch = dataclasses.replace(batch, **pairs)
    for record in (batch, *pairs.values()):
        for field in dataclasses.fields(record):
            if isinstance(value := getattr(record, field.name), Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
                if field.name in ("tokens", "token_mask"):
                    torch._dynamo.maybe_mark_dynamic(value, 1)
    return batch


def join_pairs(positive: Any, negative: Any, pad_id: int) -> Any:
    """Two pairs of B rows as one of 2B, positives first; the shorter tokens are filled up with ``pad_id``."""
    width = max(positive.tokens.shape[1], negative.tokens.shape[1])

    def joined(name: str, fill: int) -> Tensor:
        parts = [getattr(pair, name) for pair in (positive, negative)]
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])

    return dataclasses.replace(
        positive,
        images=torch.cat([positive.images, negative.images]),
        view_mask=None if positive.view_mask is None else torch.cat([positive.view_mask, negative.view_mask]),
        tokens=joined("tokens", pad_id),
        token_mask=joined("token_mask", False),
        labels=None if positive.labels is None else torch.cat([positive.labels, negative.labels]),
        context=None if positive.context is None else _joined_contexts(positive.context, negative.context),
    )


def _joined_contexts(positive: Any, negative: Any) -> Any:
    width = max(positive.tokens.shape[1], negative.tokens.shape[1])
    joined = {
        name: torch.cat(
            [F.pad(part, (0, width - part.shape[1])) for part in (getattr(positive, name), getattr(negative, name))]
        )
        for name in ("tokens", "kinds")
    }
    return dataclasses.replace(positive, **joined)


def split_output(output: Any, positive: Any, negative: Any) -> list[Any]:
    """The Output of ``join_pairs`` as one for each pair, without the padding that joining added."""
    rows, outputs = len(positive.tokens), []
    for pair, part in ((positive, slice(None, rows)), (negative, slice(rows, None))):
        length = pair.tokens.shape[1] - 1
        outputs.append(
            dataclasses.replace(
                output,
                log_probs=output.log_probs[part, :length],
                image_features=output.image_features[part],
                report_features=output.report_features[part, :length],
            )
        )
    return outputs


def rolled_features(features: Any) -> Any:
    """The VisualFeatures of every row's predecessor in the batch; of the last row for the first."""
    mask = features.patch_mask
    return dataclasses.replace(
        features,
        patches=features.patches.roll(1, 0),
        pooled=features.pooled.roll(1, 0),
        patch_mask=None if mask is None else mask.roll(1, 0),
    )


def rolled_studies(pair: Any) -> Any:
    """``pair`` with each report next to the views and labels of its predecessor; images are left as they are."""
    return dataclasses.replace(
        pair,
        view_mask=None if pair.view_mask is None else pair.view_mask.roll(1, 0),
        labels=None if pair.labels is None else pair.labels.roll(1, 0),
    )
