"""The teacher-forced passes behind the losses: which report is read under which image, and with which gradient."""

import dataclasses
from typing import Any

import torch

from modules.image_feature import image_feature
from modules.report_context import join, others, rows_of


class TaughtPasses:
    """A module with a ``backbone`` (models/base.py) and the choices of an Objective."""

    def _teach(self, pair: Any, supervised_rows: int | None = None, features: Any = None) -> Any:
        """Teacher forcing: the inputs end one token before the targets [:, 1:] do."""
        return self.backbone(None if features is not None else pair.images, pair.tokens[:, :-1],
                             view_mask=pair.view_mask, labels=pair.labels, features=features,
                             supervised_rows=supervised_rows)

    def _outputs_under_others(self, pairs: list) -> list:
        """As ``_outputs``, but report features are made under the image of the row before, which says nothing of them.

        Log-probabilities, z and z- are what they are otherwise.
        """
        positive, count = pairs[0], len(pairs[0].tokens)
        both = join(*pairs, pad_id=self.backbone.pad_id) if len(pairs) == 2 else positive
        seen = self.backbone.extract(both.images, both.view_mask)
        output = self._teach(positive, features=rows_of(seen, slice(None, count)))
        chosen = others(count, len(both.tokens) // count, positive.tokens.device)
        labels = None if positive.labels is None else positive.labels[chosen]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.report_gradient):
            read = self._teach(dataclasses.replace(both, view_mask=both.view_mask[chosen.to(both.view_mask.device)],
                                                   labels=labels),
                               supervised_rows=0, features=rows_of(seen, chosen))
        parts = (slice(None, count), slice(count, None))[:len(pairs)]
        z = image_feature(self, seen)
        return [dataclasses.replace(output, image_features=z[part],
                                    report_features=read.report_features[part, :pair.tokens.shape[1] - 1])
                for pair, part in zip(pairs, parts, strict=True)]

    def _seen_and_taught(self, pair: Any, supervised_rows: int | None) -> Any:
        seen = self.backbone.extract(pair.images, pair.view_mask)
        output = self._teach(pair, supervised_rows, features=seen)
        return dataclasses.replace(output, image_features=image_feature(self, seen))

    def _outputs(self, pairs: list) -> list:
        """The backbone's Output for the positives and, if any, for their hard negatives, which are not supervised."""
        if len(pairs) == 1 or not self.rule.joint_pass:
            return [self._seen_and_taught(pair, None if i == 0 else 0) for i, pair in enumerate(pairs)]
        rows, outputs = len(pairs[0].tokens), []
        both = self._seen_and_taught(join(*pairs, pad_id=self.backbone.pad_id), supervised_rows=rows)
        for pair, part in zip(pairs, (slice(None, rows), slice(rows, None)), strict=True):
            length = pair.tokens.shape[1] - 1  # without the padding that came with joining
            outputs.append(dataclasses.replace(
                both, log_probs=both.log_probs[part, :length], image_features=both.image_features[part],
                report_features=both.report_features[part, :length]))
        return outputs
