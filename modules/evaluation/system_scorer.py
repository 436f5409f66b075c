"""Scores the reports of several systems against the same references: words, clinical labels, optional encoders.

Shapes: N reports of a split.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modules.evaluation.bootstrap import intervals
from modules.evaluation.clinical_scores import clinical_scores
from modules.evaluation.diversity import ngram_counts
from modules.evaluation.labeler_fit import misfit
from modules.evaluation.metric_table import FULL
from modules.evaluation.metrics import Metrics, measure
from modules.evaluation.report_errors import report_errors
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables, digest, numbered, scores_of_sums
from modules.evaluation.scored import Scored
from modules.evaluation.settings import ScoringSettings
from modules.labels.labeler import label_reports

RULE, CHEXBERT = "rule", "chexbert"
_NO_LABELS = np.full((1, 14), np.nan)

Texts = Sequence[str] | Sequence[Sequence[str]]  # a text for each report, or several: captions of its image


@dataclass(frozen=True)
class References:
    """What N reports are scored against. The keys of a mapping are the suffixes of the scores' names, "" or FULL.

    ``words``: split into words by white space. ``texts``: one for each report, whose variety is measured. ``originals``
    tell whether the labelers fit. ``labelled``: what labels are of, the words where it is None. ``encoded``: what
    encoders read beside generated texts as they are; where it is None, the words of both. ``studies`` and ``patients``
    (N,) number each report's, ``with_prior`` (N,) says which have an earlier examination; None where it is not known.
    ``targets`` is the digest of the tokens whose likelihoods are given.
    """

    ids: Sequence[str]
    words: Mapping[str, Texts]
    texts: Sequence[str]
    originals: Sequence[str]
    labelled: Mapping[str, Texts] | None = None
    encoded: Mapping[str, Texts] | None = None
    studies: np.ndarray | None = None
    patients: np.ndarray | None = None
    with_prior: Sequence[bool] | None = None
    targets: str = ""


class SystemScorer:
    """The scorers that ``settings`` ask for; optional models are read at once, so that a wrong path ends work early.

    ``split_words`` maps generated texts to those whose words are scored, where these are not split by white space.
    Use it as a context manager: METEOR's process ends with it.
    """

    def __init__(
        self,
        settings: ScoringSettings,
        device: Any,
        *,
        labels_by_rules: bool,
        split_words: Callable[[Sequence[str]], Sequence[str]] | None = None,
    ):
        self.metrics = Metrics(timeout=settings.meteor_timeout)
        self._meteor, self._by_rules, self._device = settings.meteor, labels_by_rules, device
        self._split_words = split_words or (lambda texts: texts)
        self._chexbert, self._encoders = None, []
        if settings.chexbert_path:
            from modules.labels.chexbert import Chexbert

            self._chexbert = Chexbert(settings.chexbert_path, settings.chexbert_encoder)
        if settings.bertscore_path:
            from modules.evaluation.bertscore import BertScore

            self._encoders.append(BertScore(settings.bertscore_path, settings.bertscore_layer))
        if settings.radgraph_path:
            from modules.evaluation.radgraph import RadGraph

            self._encoders.append(RadGraph(settings.radgraph_path, settings.radgraph_python))
        if settings.radeval:
            from modules.evaluation.radeval import RadEval

            self._encoders.append(RadEval(settings.radeval, settings.radeval_python, settings.radeval_weights))

    def __enter__(self) -> "SystemScorer":
        return self

    def __exit__(self, *_) -> None:
        self.metrics.close()

    def score(
        self,
        references: References,
        systems: Mapping[str, Sequence[str]],
        *,
        tags: Mapping[str, str] | None = None,
        likelihoods: Mapping[str, np.ndarray] | None = None,
    ) -> Scored:
        """Score each system's N reports against all forms of the references.

        ``tags`` mark the names of a system's scores; ``likelihoods`` (N, 2) are each reference's negative
        log-likelihood under a system, and its tokens.
        """
        first = next(iter(references.words.values()))
        digests = [digest(references.ids, references.words.get(form, first)) for form in ("", FULL)]
        scored = Scored(references=references.texts, reports=dict(systems))
        if self.labelers and (reason := misfit(references.originals)):
            scored.missing |= {f"ce_{labeler}": reason for labeler in self.labelers}
        else:
            scored.labels = self._labels(references.labelled or references.words, systems)
        for system, generated in systems.items():
            scores, tables = self._one(references, system, generated, scored)
            if likelihoods and system in likelihoods:
                tables["nll"] = likelihoods[system]
                sums = tables["nll"].sum(axis=0, keepdims=True, dtype=np.float64)
                scores["nll"] = float(scores_of_sums({"nll": sums}, len(generated))["nll"][0])
            tag = (tags or {}).get(system, "")
            statistics = ReportStatistics(
                tables, *digests, tag, references.studies, references.patients, references.targets
            )
            scored.scores[system], scored.statistics[system] = scores, statistics
            scored.intervals[system] = intervals(statistics)
        return scored

    def _one(
        self, references: References, system: str, generated: Sequence[str], scored: Scored
    ) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
        """Scores and tables of one system; reasons for missing scores are noted in ``scored``."""
        words = scored.words[system] = self._split_words(generated)
        forms = list(references.words.values())
        scores, tables = measure(
            self.metrics, forms[0], forms[1] if len(forms) > 1 else None, words, with_meteor=self._meteor
        )
        if self.metrics.meteor_error:
            scored.missing.setdefault("METEOR", self.metrics.meteor_error)
        tables["diversity"] = ngram_counts(generated)
        for suffix in references.labelled or references.words:
            for labeler in self.labelers:
                if labeler not in scored.labels:
                    scores |= _suffixed(dict.fromkeys(clinical_scores(_NO_LABELS, _NO_LABELS, labeler)), suffix)
                    continue
                pair = [scored.labels[labeler][name] for name in (f"references{suffix}", system)]
                scores |= _suffixed(clinical_scores(*pair, labeler), suffix)
                tables |= _suffixed(clinical_tables(*pair, labeler), suffix)
        if RULE in scored.labels:
            errors = _suffixed(report_errors(references.originals, generated, references.with_prior), FULL)
            for name, table in errors.items():
                if table[:, -1].any() or table.shape[1] == 1:
                    scores |= {name: float(scores_of_sums({name: table.sum(0, keepdims=True)}, len(table))[name][0])}
                    tables[name] = table
                else:
                    scores[name] = None
                    scored.missing.setdefault(name, "every study has an earlier examination")
        read = words if references.encoded is None else generated
        for suffix, texts in (references.encoded or references.words).items():
            for encoder in self._encoders:
                own = _suffixed(_best(encoder.to(self._device), texts, read), suffix)
                encoder.to("cpu")
                scores |= {name: float(values.mean()) for name, values in own.items()}
                tables |= own
        return scores, tables

    @property
    def labelers(self) -> list[str]:
        """The labelers whose clinical scores are computed."""
        return [RULE] * self._by_rules + [CHEXBERT] * (self._chexbert is not None)

    def _labels(
        self, references: Mapping[str, Texts], systems: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Labels (N, 14) by labeler, of all forms of the references and of each system's reports."""
        texts = {f"references{suffix}": reports for suffix, reports in references.items()} | dict(systems)
        found = {}
        if self._by_rules:
            found[RULE] = {name: label_reports(reports) for name, reports in texts.items()}
        if self._chexbert is not None:
            self._chexbert.to(self._device)
            found[CHEXBERT] = {name: self._chexbert.label(reports) for name, reports in texts.items()}
            self._chexbert.to("cpu")
        return found


def units_of(
    study_ids: Sequence[str] | None, subject_ids: Sequence[str] | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Numbers (N,) of the reports' studies, and of their patients: None where they are not known.

    A report without a subject is of the patient whom another report of its study names, else its study's, and without a
    study its own.
    """
    studies = numbered(study_ids) if study_ids else None
    if not subject_ids or not any(subject_ids):
        return studies, None
    own = study_ids or [str(number) for number in range(len(subject_ids))]
    named = {study: subject for study, subject in zip(own, subject_ids, strict=True) if subject}
    subjects = [subject or named.get(study) for study, subject in zip(own, subject_ids, strict=True)]
    pairs = zip(own, subjects, strict=True)
    return studies, numbered([f"p{subject}" if subject else f"s{study}" for study, subject in pairs])


def seen_in_training(references: Sequence[str], training: Collection[str]) -> np.ndarray | None:
    """(N,) bool: which cleaned references are among the cleaned training reports; None where there are none."""
    return np.array([text in training for text in references]) if training else None


def _best(encoder: Any, references: Texts, generated: Sequence[str]) -> dict[str, np.ndarray]:
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
