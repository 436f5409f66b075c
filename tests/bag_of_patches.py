"""A backbone of one's own in one file, and one that learns from labels: what README's "Add a backbone" describes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.base import Backbone, BackboneSettings, Output


@dataclass(frozen=True)
class Settings(BackboneSettings):
    """Those that all backbones have; fields of its own would be flags of its own."""


class BagOfPatches(Backbone):
    """Words from the mean patch and the word before: the least that writes reports."""

    vocabulary_entry = "logit.weight"

    def __init__(self, *, visual_extractor, num_ids: int, settings: Settings):
        super().__init__()
        width = settings.d_model
        self.visual_extractor = visual_extractor
        self.image_dim, self.report_dim = visual_extractor.width, width
        self.look = nn.Linear(visual_extractor.width, width)
        self.words = nn.Embedding(num_ids, width)
        self.logit = nn.Linear(width, num_ids)

    def hidden(self, tokens, pooled):
        return torch.tanh(self.words(tokens) + self.look(pooled).unsqueeze(1))  # (B, T, width)

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None):
        features = self.extract(images, view_mask, features)
        hidden = self.hidden(tokens, features.pooled)
        return Output(self.logit(hidden[:supervised_rows]).log_softmax(-1), features.pooled, hidden)

    @torch.no_grad()
    def generate(self, images, *, view_mask=None, labels=None, features=None, decoding):
        features = self.extract(images, view_mask, features)
        token = torch.zeros(len(features.pooled), 1, dtype=torch.long, device=features.pooled.device)
        report = []
        for _ in range(decoding.max_seq_length):
            following = self.logit(self.hidden(token, features.pooled)).argmax(-1)
            # 0 is begin, end and padding at once: a report that has ended stays at its end.
            token = torch.where((token == 0) & (len(report) > 0), 0, following)
            report.append(token)
        return torch.cat(report, dim=1)


class LabelledPatches(BagOfPatches):
    """The same, learning from labels what a study shows; unlike XProNet it has no prototypes."""

    needs_labels = True

    def __init__(self, *, visual_extractor, num_ids: int, settings: Settings):
        super().__init__(visual_extractor=visual_extractor, num_ids=num_ids, settings=settings)
        self.head = nn.Linear(visual_extractor.width, 14)

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None):
        output = super().forward(
            images, tokens, view_mask=view_mask, features=features, supervised_rows=supervised_rows
        )
        if labels is not None:
            logits = self.head(output.image_features[:supervised_rows])
            output.auxiliary["shown"] = F.binary_cross_entropy_with_logits(logits, labels[:supervised_rows])
        return output
