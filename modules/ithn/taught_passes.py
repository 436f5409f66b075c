"""The teacher-forced passes behind the losses: which report is read under which image, and with which gradient."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def join(positive: Any, negative: Any, pad_id: int) -> Any:
    """Two modules.data.datasets.Pair of B rows as one of 2B; the shorter tokens are filled up with ``pad_id``."""
    width = max(positive.tokens.shape[1], negative.tokens.shape[1])

    def filled(name: str, value: int) -> Tensor:
        parts = [getattr(pair, name) for pair in (positive, negative)]
        return torch.cat([F.pad(part, (0, width - part.shape[1]), value=value) for part in parts])

    return dataclasses.replace(
        positive,
        images=torch.cat([positive.images, negative.images]),
        view_mask=torch.cat([positive.view_mask, negative.view_mask]),
        tokens=filled("tokens", pad_id),
        token_mask=filled("token_mask", False),
        labels=None if positive.labels is None else torch.cat([positive.labels, negative.labels]),
    )


def rows_of(features: Any, chosen: Tensor) -> Any:
    """The VisualFeatures of some rows."""
    mask = features.patch_mask
    return dataclasses.replace(
        features,
        patches=features.patches[chosen],
        pooled=features.pooled[chosen],
        patch_mask=None if mask is None else mask[chosen],
    )


class TaughtPasses:
    """A module with a ``backbone`` (models/base.py) and, of an Objective, ``rule`` and ``on_encoder``."""

    def _teach(self, pair: Any, supervised_rows: int | None = None, features: Any = None) -> Any:
        """Teacher forcing: the shift of the inputs against the targets [:, 1:] is made here and nowhere else."""
        return self.backbone(
            None if features is not None else pair.images,
            pair.tokens[:, :-1],
            view_mask=pair.view_mask,
            labels=pair.labels,
            features=features,
            supervised_rows=supervised_rows,
        )

    def _outputs(self, pairs: list) -> list:
        """The backbone's Output for the positives and, if any, for their hard negatives, which are not supervised."""
        if self.on_encoder:
            return [self._output_on_encoder(*pairs)]
        if len(pairs) == 1 or not self.rule.joint_pass:
            return [self._teach(pair, None if i == 0 else 0) for i, pair in enumerate(pairs)]
        rows, outputs = len(pairs[0].tokens), []
        both = self._teach(join(*pairs, pad_id=self.backbone.pad_id), supervised_rows=rows)
        for pair, part in zip(pairs, (slice(None, rows), slice(rows, None)), strict=True):
            length = pair.tokens.shape[1] - 1  # without the padding that came with joining
            outputs.append(
                dataclasses.replace(
                    both,
                    log_probs=both.log_probs[part, :length],
                    image_features=both.image_features[part],
                    report_features=both.report_features[part, :length],
                )
            )
        return outputs

    def _output_on_encoder(self, pair: Any) -> Any:
        """Output with image features of the encoder, and report features that are made under another study's image.

        The decoder attends to the image while it reads the report, so that a report feature made under its own image
        carries that image, and an image can be matched with it without a look at the report. Under the image of the
        row before it can only say what the report says. No gradient comes from there: the decoder is not trained by
        being a reader. Log-probabilities are what they are otherwise.
        """
        seen = self.backbone.extract(pair.images, pair.view_mask)
        output = self._teach(pair, features=seen)
        chosen = torch.arange(len(pair.tokens), device=pair.tokens.device).roll(1)
        with torch.no_grad():
            read = self._teach(
                dataclasses.replace(
                    pair,
                    view_mask=pair.view_mask.roll(1, 0),
                    labels=None if pair.labels is None else pair.labels[chosen],
                ),
                supervised_rows=0,
                features=rows_of(seen, chosen),
            )
        return dataclasses.replace(output, image_features=self._encoded(seen), report_features=read.report_features)

    def _encoded(self, seen: Any) -> Tensor:
        """Mean of the encoder's output over the tokens of the views that are there, (B, D)."""
        tokens = self.backbone.encode(seen)[0]
        tokens = tokens if tokens.dim() == 3 else tokens[:, -1]  # the last of VisualGPT's levels
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if seen.patch_mask is None:
            return tokens.mean(1)
        there = seen.patch_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * there).sum(1) / there.sum(1)
