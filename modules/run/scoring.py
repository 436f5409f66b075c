"""Scores the reports of a run: words, clinical labels, optional encoders; with intervals and per-report statistics."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from modules.config import Config
from modules.data.datasets import ReportDataset
from modules.data.tokenizers import UNKNOWN
from modules.evaluation.bootstrap import intervals
from modules.evaluation.clinical_scores import class_table, clinical_scores
from modules.evaluation.diversity import UNK_SHARE, ngram_counts, unk_share
from modules.evaluation.labeler_fit import misfit
from modules.evaluation.meteor import TOKENISER, ptb_tokenise
from modules.evaluation.metric_table import CLINICAL_MONITORED, NEED_JAVA, XPRONET_SELECTION, XPRONET_SUM
from modules.evaluation.metrics import Metrics, measure
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables, digest, numbered
from modules.evaluation.score_names import FULL, SELECTION
from modules.evaluation.tester import Predictions, mean_nll
from modules.labels.labeler import label_reports
from modules.runtime.errors import InputError

logger = logging.getLogger("ithn")
RULE, CHEXBERT = "rule", "chexbert"
_NO_WORD = "unkgenerated"  # in place of a generated <unk>: no reference has it
_NO_LABELS = np.full((1, 14), np.nan)


@dataclass
class Scored:
    """What the reports of several systems (the model, the baselines) came to, by system."""

    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    statistics: dict[str, ReportStatistics] = field(default_factory=dict)
    labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # labeler -> text -> (N, 14)
    missing: dict[str, str] = field(default_factory=dict)  # METEOR, ce_rule, ce_chexbert: why its scores are null
    seen: np.ndarray | None = None  # (N,) bool: references that are training reports word for word


class Scoring:
    """The scorers that a run's flags ask for. Optional models are read at once: a wrong path ends a run at its start.

    The captions of ``datasets`` are their images' references where images have several; they are tokenised at once.
    Use it as a context manager: METEOR's process and its memory end with it.
    """

    def __init__(self, config: Config, device: torch.device, datasets: Iterable[ReportDataset] = ()):
        self.metrics = Metrics(timeout=config.meteor_timeout)
        datasets = tuple(datasets)
        self._captions: Mapping[str, Sequence[str]] | None = None
        if config.captioning:
            from modules.data.captions import captions_by_sample

            self._captions = captions_by_sample(datasets)
        self._studies = {
            dataset.sample_id(index): dataset.studies[row]
            for dataset in datasets
            for index, (row, _) in enumerate(dataset.samples)
        }
        self._tokenised = _tokenised(self._captions) if self._captions else {}
        self._config, self._device = config, device
        if config.monitor_metric.startswith("ce_") and self._studies:
            self._require_fit([study.report for study in self._studies.values()])
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

    def _require_fit(self, references: Sequence[str]) -> None:
        """InputError where the best epoch would be chosen by a clinical score that means nothing."""
        if reason := misfit(references):
            raise InputError(
                f"--monitor_metric {self._config.monitor_metric}: {reason}; choose another, such as BLEU_4"
            )

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
        """While training only what model selection and the curves need; the full references come with the test.

        Where ``<unk>`` is a large share of the generated words, SELECTION is the monitored score without hits of
        ``<unk>``: no epoch becomes the best one by writing it.
        """
        references, words = self._references(found)[""], self._words(found.generated)
        scores = self._validation_scores(references, words, self._config.meteor)
        if not any(UNKNOWN in text for text in words):
            return scores
        metric, share = self._config.monitor_metric, unk_share(found.generated)
        if share >= UNK_SHARE and unk_share(found.references) and scores.get(metric) is not None:
            missing = [text.replace(UNKNOWN, _NO_WORD) for text in words]
            without = self._validation_scores(references, missing, metric in (*NEED_JAVA, XPRONET_SUM.name))
            scores[SELECTION] = without.get(metric)
            logger.warning(
                "%.1f %% of the generated words are %s: the best epoch is chosen by %s without its hits, %.4f instead "
                "of %.4f; --suppress_unk true keeps it from being written, a lower --threshold keeps more words",
                100 * share,
                UNKNOWN,
                metric,
                math.nan if scores[SELECTION] is None else scores[SELECTION],
                scores[metric],
            )
        return scores

    def _validation_scores(
        self, references: Sequence[str] | Sequence[Sequence[str]], words: Sequence[str], with_meteor: bool
    ) -> dict[str, float | None]:
        scores = self.metrics.compute(references, words, with_meteor=with_meteor)
        if self._config.monitor_metric in [score.name for score in CLINICAL_MONITORED]:
            clinical = clinical_scores(label_reports(references), label_reports(words), RULE)
            scores |= {score.name: clinical[score.name] for score in CLINICAL_MONITORED}
        if self._config.monitor_metric == XPRONET_SUM.name and scores["METEOR"] is not None:
            scores[XPRONET_SUM.name] = sum(weight * scores[name] for name, weight in XPRONET_SELECTION.items())
        return scores

    def test(
        self,
        found: Predictions,
        systems: Mapping[str, Sequence[str]],
        tags: Mapping[str, str],
        training_reports: Collection[str] = (),
    ) -> Scored:
        """Score each system's reports against all forms of the references; ``tags`` mark the names of its scores.

        Reports are scored against both forms, cut and full, captions against all captions of their image. The model's
        are ``found.generated`` itself, which alone has a likelihood. ``training_reports`` are cleaned: references that
        are among them, word for word, are scored apart from the others.
        """
        references = self._references(found)
        digests = [digest(found.ids, references[form if form in references else ""]) for form in ("", FULL)]
        # Whole references are labelled as in the annotation: cleaning removes commas, colons and slashes.
        originals = references if self._captions is not None else references | {FULL: found.reports}
        scored = Scored()
        if self._labelers and (reason := misfit(found.reports)):
            scored.missing |= {f"ce_{labeler}": reason for labeler in self._labelers}
        else:
            scored.labels = self._labels(originals, systems)
        for system, generated in systems.items():
            scores, tables = self._test_system(found, references, system, generated, scored)
            statistics = ReportStatistics(tables, *digests, tags.get(system, ""), *self._units(found.ids))
            scored.scores[system], scored.statistics[system] = scores, statistics
            scored.intervals[system] = intervals(statistics)
        if self._captions is None and training_reports:
            scored.seen = np.array([text in training_reports for text in found.full_references])
        return scored

    def _test_system(
        self,
        found: Predictions,
        references: Mapping[str, Sequence[str] | Sequence[Sequence[str]]],
        system: str,
        generated: Sequence[str],
        scored: Scored,
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """Scores and tables of one system; reasons for missing scores are noted in ``scored``."""
        meteor, words = self._config.meteor, self._words(generated)
        scores, tables = measure(self.metrics, references[""], references.get(FULL), words, with_meteor=meteor)
        if self.metrics.meteor_error:
            scored.missing.setdefault("METEOR", self.metrics.meteor_error)
        if generated is found.generated:
            scores["nll"], tables["nll"] = mean_nll(found), found.nll.numpy()
        tables["diversity"] = ngram_counts(generated)
        for suffix, texts in references.items():
            for labeler in self._labelers:
                if labeler not in scored.labels:
                    scores |= _suffixed(dict.fromkeys(clinical_scores(_NO_LABELS, _NO_LABELS, labeler)), suffix)
                    continue
                pair = [scored.labels[labeler][name] for name in (f"references{suffix}", system)]
                scores |= _suffixed(clinical_scores(*pair, labeler), suffix)
                tables |= _suffixed(clinical_tables(*pair, labeler), suffix)
            whole = [self._captions[sample] for sample in found.ids] if self._captions is not None else texts
            for encoder in self._encoders:
                own = _suffixed(_best(encoder.to(self._device), whole, generated), suffix)
                encoder.to("cpu")
                scores |= {name: float(values.mean()) for name, values in own.items()}
                tables |= own
        return scores, tables

    @property
    def _labelers(self) -> list[str]:
        return [RULE] * self._config.labels_by_rules + [CHEXBERT] * (self._chexbert is not None)

    def _units(self, ids: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Numbers (N,) of the samples' studies, and of their patients; None where the annotation does not say."""
        studies = [self._studies.get(sample) for sample in ids]
        if None in studies:
            return None, None
        names = [study.study_id for study in studies]
        if not any(study.subject_id for study in studies):
            return numbered(names), None
        return numbered(names), numbered([f"p{s.subject_id}" if s.subject_id else f"s{s.study_id}" for s in studies])

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
