"""Scores the reports of a run: words, clinical labels, optional encoders; with intervals and per-report statistics."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from modules.config import Config
from modules.data.captions import captions_by_sample
from modules.data.datasets import ReportDataset
from modules.evaluation.bootstrap import intervals
from modules.evaluation.clinical_scores import class_table, clinical_scores
from modules.evaluation.diversity import ngram_counts
from modules.evaluation.meteor import TOKENISER, ptb_tokenise
from modules.evaluation.metric_table import CLINICAL_MONITORED, XPRONET_SELECTION, XPRONET_SUM
from modules.evaluation.metrics import Metrics, measure
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables, digest
from modules.evaluation.score_names import FULL
from modules.evaluation.tester import Predictions, mean_nll
from modules.labels.labeler import label_reports

RULE, CHEXBERT = "rule", "chexbert"


@dataclass
class Scored:
    """What the reports of several systems (the model, the baselines) came to, by system."""

    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    statistics: dict[str, ReportStatistics] = field(default_factory=dict)
    labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # labeler -> text -> (N, 14)
    meteor_error: str | None = None  # why some system has no METEOR


class Scoring:
    """The scorers that a run's flags ask for. Optional models are read at once: a wrong path ends a run at its start.

    The captions of ``datasets`` are their images' references where images have several; they are tokenised at once.
    Use it as a context manager: METEOR's process and its memory end with it.
    """

    def __init__(self, config: Config, device: torch.device, datasets: Iterable[ReportDataset] = ()):
        self.metrics = Metrics(timeout=config.meteor_timeout)
        self._captions = captions_by_sample(datasets) if config.captioning else None
        self._tokenised = _tokenised(self._captions or {})
        self._config, self._device = config, device
        self._chexbert, self._encoders = None, []
        if config.chexbert_path:
            from modules.labels.chexbert import Chexbert

            self._chexbert = Chexbert(config.chexbert_path, config.chexbert_encoder)
        if config.bertscore_path:
            from modules.evaluation.bertscore import BertScore

            self._encoders.append(BertScore(config.bertscore_path, config.bertscore_layer))
        if config.radgraph_path:
            from modules.evaluation.radgraph import RadGraph

            self._encoders.append(RadGraph(config.radgraph_path, config.radgraph_python))

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *_) -> None:
        self.metrics.close()

    @property
    def tokenisation(self) -> str:
        """How the texts are split into the words that are scored."""
        split = (
            f"{TOKENISER}, captions and generated texts alike"
            if self._config.captioning
            else "white space, after the data set's cleaning; no Penn Treebank tokenisation"
        )
        return split + ("; immediately repeated words collapsed" if self._config.collapse_repeats else "")

    def captions(self, sample: str) -> Sequence[str]:
        """All captions of a sample's image; none where images have one report each."""
        return self._captions[sample] if self._captions is not None else ()

    def validation(self, found: Predictions) -> dict[str, float | None]:
        """While training only what model selection and the curves need; the full references come with the test."""
        references = self._references(found)[""]
        scores = self.metrics.compute(references, self._words(found.generated), with_meteor=self._config.meteor)
        if self._config.monitor_metric in [score.name for score in CLINICAL_MONITORED]:
            clinical = clinical_scores(label_reports(references), label_reports(found.generated), RULE)
            scores |= {score.name: clinical[score.name] for score in CLINICAL_MONITORED}
        if self._config.monitor_metric == XPRONET_SUM.name and scores["METEOR"] is not None:
            scores[XPRONET_SUM.name] = sum(weight * scores[name] for name, weight in XPRONET_SELECTION.items())
        return scores

    def test(self, found: Predictions, systems: Mapping[str, Sequence[str]], tags: Mapping[str, str]) -> Scored:
        """Score each system's reports against all forms of the references; ``tags`` mark the names of its scores.

        Reports are scored against both forms, cut and full, captions against all captions of their image. The model's
        are ``found.generated`` itself, which alone has a likelihood.
        """
        references = self._references(found)
        digests = [digest(found.ids, references[form if form in references else ""]) for form in ("", FULL)]
        # Whole references are labelled as in the annotation: cleaning removes commas, colons and slashes.
        originals = references if self._captions is not None else references | {FULL: found.reports}
        scored = Scored(labels=self._labels(originals, systems))
        for system, generated in systems.items():
            scores, tables = measure(
                self.metrics,
                references[""],
                references.get(FULL),
                self._words(generated),
                with_meteor=self._config.meteor,
            )
            scored.meteor_error = scored.meteor_error or self.metrics.meteor_error
            if generated is found.generated:
                scores["nll"], tables["nll"] = mean_nll(found), found.nll.numpy()
            tables["diversity"] = ngram_counts(generated)
            for suffix, texts in references.items():
                for labeler, labels in scored.labels.items():
                    pair = labels[f"references{suffix}"], labels[system]
                    scores |= _suffixed(clinical_scores(*pair, labeler), suffix)
                    tables |= _suffixed(clinical_tables(*pair, labeler), suffix)
                whole = [self._captions[sample] for sample in found.ids] if self._captions is not None else texts
                for encoder in self._encoders:
                    own = _suffixed(_best(encoder.to(self._device), whole, generated), suffix)
                    encoder.to("cpu")
                    scores |= {name: float(values.mean()) for name, values in own.items()}
                    tables |= own
            statistics = ReportStatistics(tables, *digests, tag=tags.get(system, ""))
            scored.scores[system], scored.statistics[system] = scores, statistics
            scored.intervals[system] = intervals(statistics)
        return scored

    def _references(self, found: Predictions) -> dict[str, Sequence[str] | Sequence[Sequence[str]]]:
        if self._captions is None:
            return {"": found.references, FULL: found.full_references}
        return {"": [self._tokenised[sample] for sample in found.ids]}

    def _words(self, generated: Sequence[str]) -> Sequence[str]:
        return generated if self._captions is None else ptb_tokenise(generated)

    def _labels(
        self, references: Mapping[str, Sequence[str]], systems: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Labels (N, 14) by labeler, of both forms of the references and of each system's reports."""
        texts = {f"references{suffix}": reports for suffix, reports in references.items()} | dict(systems)
        found = {}
        if self._config.labels_by_rules:
            found[RULE] = {name: label_reports(reports) for name, reports in texts.items()}
        if self._chexbert is not None:
            self._chexbert.to(self._device)
            found[CHEXBERT] = {name: self._chexbert.label(reports) for name, reports in texts.items()}
            self._chexbert.to("cpu")
        return found


def class_tables(scored: Scored, system: str) -> dict[str, list[dict[str, Any]]]:
    """Precision, recall and F1 of each class by labeler, against whole references, uncertain labels as negative."""
    return {
        labeler: class_table(labels[f"references{FULL}"], labels[system]) for labeler, labels in scored.labels.items()
    }


def _tokenised(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The tokens of every caption of each sample, all of them by one process."""
    flat = iter(ptb_tokenise([text for texts in captions.values() for text in texts]))
    return {sample: [next(flat) for _ in texts] for sample, texts in captions.items()}


def _best(
    encoder: Any, references: Sequence[str] | Sequence[Sequence[str]], generated: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each score of each text against its best reference, as BERTScore's published tool takes several."""
    listed = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    counts = [len(texts) for texts in listed]
    scores = encoder.score(
        [text for texts in listed for text in texts],
        [text for text, count in zip(generated, counts, strict=True) for _ in range(count)],
    )
    starts = np.cumsum([0, *counts[:-1]])
    return {name: np.maximum.reduceat(values, starts, axis=0) for name, values in scores.items()}


def _suffixed(values: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    return {f"{name}{suffix}": value for name, value in values.items()}
