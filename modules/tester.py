"""Generates the reports of a split and scores them.

Shapes: B studies, N views, T tokens, C visual width.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modules.captions import collapse_repeats
from modules.decoding import DecodingOptions
from modules.score_names import tagged

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Predictions:
    """What the model wrote for a split, in the order of the data set."""

    ids: list[str] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)  # as the R2Gen family scores: cleaned, <unk>, cut
    full_references: list[str] = field(default_factory=list)  # cleaned only
    reports: list[str] = field(default_factory=list)  # as the annotation has them
    nll: Tensor | None = None  # (samples, 2) float64: a reference's negative log-likelihood, and its tokens
    visual_features: Tensor | None = None  # (studies, C) pooled, on the CPU


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of a ``--precision``; float32 is none."""
    dtype = AUTOCAST[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class Tester:
    """Writes reports with a trained objective's backbone and scores them.

    ``clean`` maps a raw report to its cleaned text; ``score(predictions)`` returns the metrics by name;
    ``progress(iterable, description)`` shows a bar. ``score_tag`` becomes part of the names of all scores.
    ``collapse_repeats`` writes a word that immediately repeats itself once.
    """

    def __init__(self, objective: nn.Module, *, tokenizer: Any, decoding: DecodingOptions, device: torch.device,
                 precision: str, clean: Callable[[str], str], score: Callable[[Predictions], Mapping],
                 progress: Callable[[Iterable, str], Iterable], score_tag: str = "", collapse_repeats: bool = False):
        self.objective, self.tokenizer, self.decoding = objective, tokenizer, decoding
        self.device, self.precision = device, precision
        self.clean, self.score, self.progress, self.score_tag = clean, score, progress, score_tag
        self.collapse_repeats = collapse_repeats

    @torch.inference_mode()
    def predict(self, loader: Iterable, description: str) -> Predictions:
        """Generate a report for every study of ``loader``; the visual extractor sees each image once."""
        was_training = self.objective.training
        self.objective.eval()
        found, pooled = Predictions(), []
        likelihoods = []
        for batch in self.progress(loader, description):
            pair = batch.to(self.device).positive
            with autocast(self.device, self.precision):
                features = self.objective.backbone.extract(pair.images, pair.view_mask)
                tokens = self.objective.backbone.generate(None, view_mask=pair.view_mask, labels=pair.labels,
                                                          features=features, decoding=self.decoding)
                nll = self.objective.report_nll(pair, features)
            likelihoods.append(torch.stack([nll.double(), pair.token_mask[:, 1:].sum(1).double()], dim=1).cpu())
            pooled.append(features.pooled.float().cpu())
            self._collect(found, batch, tokens)
        self.objective.train(was_training)
        found.nll = torch.cat(likelihoods)
        found.visual_features = torch.cat(pooled)
        return found

    def _collect(self, found: Predictions, batch: Any, tokens: Tensor) -> None:
        found.ids += batch.ids
        generated = self.tokenizer.decode_batch(tokens.tolist())  # (B, L): the likeliest of each study
        found.generated += map(collapse_repeats, generated) if self.collapse_repeats else generated
        found.references += self.tokenizer.decode_batch(batch.positive.tokens[:, 1:].tolist())
        found.full_references += [self.clean(report) for report in batch.reports]
        found.reports += batch.reports

    def evaluate(self, loader: Iterable, description: str) -> tuple[dict[str, float | None], Predictions]:
        """Metrics by name, ``nll`` among them, and the predictions that they were computed from."""
        found = self.predict(loader, description)
        scores = dict(self.score(found))
        scores["nll"] = mean_nll(found)
        return {tagged(name, self.score_tag): value for name, value in scores.items()}, found


def mean_nll(found: Predictions) -> float:
    """Mean negative log-likelihood of a reference token."""
    total, tokens = found.nll.sum(0).tolist()
    return total / max(tokens, 1)
