"""Generates the reports of a split and scores them; processes share the generation, the main process scores.

Shapes: B studies, N views, T tokens, C visual width.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modules.decoding.options import DecodingOptions
from modules.evaluation.metric_table import SELECTION, tagged
from modules.runtime import distributed
from modules.runtime.environment import autocast
from modules.runtime.errors import InputError


@dataclass
class Predictions:
    """What the model generated for a split, in the order of the data set."""

    ids: list[str] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)  # as in the R2Gen family: cleaned, <unk>, cut
    full_references: list[str] = field(default_factory=list)  # cleaned only
    reports: list[str] = field(default_factory=list)  # unchanged, from the annotation
    nll: Tensor | None = None  # (samples, 2) float64: a reference's negative log-likelihood, and its tokens
    visual_features: Tensor | None = None  # (studies, C) pooled, on the CPU


class Tester:
    """Generates reports with a trained objective's backbone and scores them.

    ``clean`` maps a raw report to its cleaned text; ``score(predictions)`` returns the metrics by name;
    ``progress(iterable, description)`` shows a bar. ``score_tag`` becomes part of the names of all scores.
    ``collapse_repeats`` writes a word that immediately repeats itself once. What is drawn at random for a study depends
    on ``seed`` and its id alone. ``training_studies`` are batches of the training split, not augmented, whose mean
    image ``decoding`` with guidance needs.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        tokenizer: Any,
        decoding: DecodingOptions,
        device: torch.device,
        precision: str,
        clean: Callable[[str], str],
        score: Callable[[Predictions], Mapping],
        progress: Callable[[Iterable, str], Iterable],
        score_tag: str = "",
        collapse_repeats: bool = False,
        seed: int = 0,
        training_studies: Iterable | None = None,
    ):
        self.objective, self.tokenizer, self.decoding = objective, tokenizer, decoding
        self.device, self.precision, self.seed = device, precision, seed
        self.clean, self.score, self.progress, self.score_tag = clean, score, progress, score_tag
        self.collapse_repeats, self.training_studies = collapse_repeats, training_studies

    @torch.inference_mode()
    def predict(self, loader: Iterable, description: str) -> Predictions | None:
        """Generate a report for every study of ``loader``; the visual extractor sees each image once.

        Every process goes through its batches of the split (modules.data.sample_order); the main process gets all
        predictions in the order of the data set, the others None.
        """
        was_training = self.objective.training
        self.objective.eval()
        if self.decoding.guidance:
            self.find_mean_image()
        texts, rows = [], []
        for batch in self.progress(loader, description):
            pair = batch.to(self.device).positive
            drawn = {}
            if self.decoding.sample_method == "sample":
                from modules.decoding.sampling import study_seed

                drawn["seeds"] = [study_seed(self.seed, name) for name in batch.ids]
            with autocast(self.device, self.precision):
                features = self.objective.extract(pair)
                tokens = self.objective.backbone.generate(
                    None,
                    view_mask=pair.view_mask,
                    labels=pair.labels,
                    features=features,
                    decoding=self.decoding,
                    **drawn,
                )
                nll = self.objective.report_nll(pair, features)
            counts = pair.token_mask[:, 1:].sum(1)
            rows.append(
                torch.cat([torch.stack([nll.double(), counts.double()], dim=1), features.pooled.double()], dim=1).cpu()
            )  # (B, 2 + C)
            texts.append(self._texts(batch, tokens))
        self.objective.train(was_training)
        gathered = distributed.gather_batches(texts, rows)
        return None if gathered is None else _joined(*gathered)

    @property
    def lacks_mean_image(self) -> bool:
        """Whether decoding needs the mean training image and none is known of the present weights."""
        return bool(self.decoding.guidance) and self.objective.backbone.mean_patches is None

    @torch.inference_mode()
    def find_mean_image(self) -> None:
        """Give the backbone the mean training image, as its present weights see it."""
        was_training, studies = self.objective.training, self.progress(self.training_studies, "mean training image")
        self.objective.eval()
        self.objective.backbone.mean_patches = mean_patches(
            self.objective.backbone, studies, self.device, self.precision
        )
        self.objective.train(was_training)

    def _texts(self, batch: Any, tokens: Tensor) -> dict[str, list[str]]:
        """The batch's texts; ``tokens`` (B, L) are each study's likeliest report."""
        generated = self.tokenizer.decode_batch(tokens.tolist())
        if self.collapse_repeats:
            from modules.data.captions import collapse_repeats

            generated = list(map(collapse_repeats, generated))
        return {
            "ids": batch.ids,
            "generated": generated,
            "references": self.tokenizer.decode_batch(batch.positive.tokens[:, 1:].tolist()),
            "full_references": [self.clean(report) for report in batch.reports],
            "reports": batch.reports,
        }

    @torch.inference_mode()
    def likelihood(self, loader: Iterable, description: str) -> dict[str, float | None]:
        """The metric ``nll`` of a split alone, under the name that ``evaluate`` gives it: nothing is generated."""
        was_training = self.objective.training
        self.objective.eval()
        self.objective.backbone.mean_patches = None  # that of other weights
        rows = []
        for batch in self.progress(loader, description):
            pair = batch.to(self.device).positive
            with autocast(self.device, self.precision):
                nll = self.objective.report_nll(pair)
            rows.append(torch.stack([nll.double(), pair.token_mask[:, 1:].sum(1).double()], dim=1).cpu())  # (B, 2)
        self.objective.train(was_training)
        gathered = distributed.gather_batches([None] * len(rows), rows)
        mean = None if gathered is None else mean_nll(Predictions(nll=torch.cat(gathered[1])))
        return {tagged("nll", self.score_tag): distributed.broadcast_object(mean)}

    def evaluate(self, loader: Iterable, description: str) -> tuple[dict[str, float | None], Predictions | None]:
        """Metrics by name, ``nll`` among them, and the predictions that they were computed from.

        The main process computes the metrics; all return the same, so that they decide alike.
        """
        found = self.predict(loader, description)
        scores = None
        if found is not None:
            scores = dict(self.score(found))
            scores["nll"] = mean_nll(found)
        scores = distributed.broadcast_object(scores)
        names = {name: name if name == SELECTION else tagged(name, self.score_tag) for name in scores}
        return {names[name]: value for name, value in scores.items()}, found


def mean_patches(backbone: Any, batches: Iterable, device: torch.device, precision: str) -> Tensor:
    """(S, C): the mean of every patch over the studies of ``batches`` that have its view.

    Where less than a sixteenth of the studies have a view, its mean would be that of a few patients: the mean of all
    patches is used instead. InputError where it is not finite.
    """
    total, count = 0.0, 0.0
    for batch in batches:
        pair = batch.to(device).positive
        with torch.no_grad(), autocast(device, precision):
            features = backbone.extract(pair.images, pair.view_mask)
        patches = features.patches.double()
        there = torch.ones_like(patches[..., :1])
        if features.patch_mask is not None:
            there = features.patch_mask.unsqueeze(-1).to(there)
        total, count = total + (patches * there).sum(0), count + there.sum(0)
    mean = torch.where(16 * count < count.max(), total.sum(0) / count.sum(), total / count.clamp(min=1)).float()
    if not mean.isfinite().all():
        raise InputError(
            "--guidance: the mean training image is not finite; with --precision float16, try bfloat16 or float32"
        )
    return mean


def _joined(texts: list[dict[str, list[str]]], rows: list[Tensor]) -> Predictions:
    found = Predictions()
    for part in texts:
        for name, values in part.items():
            getattr(found, name).extend(values)
    table = torch.cat(rows)
    found.nll, found.visual_features = table[:, :2].clone(), table[:, 2:].float()
    return found


def mean_nll(found: Predictions) -> float:
    """Mean negative log-likelihood per reference token."""
    total, tokens = found.nll.sum(0).tolist()
    return total / max(tokens, 1)
