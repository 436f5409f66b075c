"""Scores the reports of a run: words, clinical labels, optional encoders; with intervals and per-report statistics."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch

from modules.config import Config
from modules.data.datasets import ReportDataset
from modules.data.study_context import prior_problem
from modules.data.tokenizers import UNKNOWN
from modules.evaluation.clinical_scores import clinical_scores
from modules.evaluation.diversity import UNK_SHARE, unk_share
from modules.evaluation.labeler_fit import misfit
from modules.evaluation.meteor import TOKENISER, ptb_tokenise
from modules.evaluation.metric_table import (
    CLINICAL_MONITORED,
    FULL,
    NEED_JAVA,
    SELECTION,
    XPRONET_SELECTION,
    XPRONET_SUM,
)
from modules.evaluation.metrics import Metrics
from modules.evaluation.report_statistics import digest
from modules.evaluation.scored import Scored
from modules.evaluation.system_scorer import RULE, References, SystemScorer, seen_in_training, units_of
from modules.evaluation.tester import Predictions
from modules.labels.labeler import label_reports
from modules.runtime.errors import InputError

logger = logging.getLogger("ithn")
_NO_WORD = "unkgenerated"  # in place of a generated <unk>: no reference has it


class Scoring:
    """The scorers that a run's flags ask for. Optional models are read at once: a wrong path ends a run at its start.

    The captions of ``datasets`` are their images' references where images have several; they are tokenised at once.
    Use it as a context manager: METEOR's process and its memory end with it.
    """

    def __init__(self, config: Config, device: torch.device, datasets: Iterable[ReportDataset] = ()):
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
        self._by_id = {study.id: study for study in self._studies.values()}
        self._tokenised = _tokenised(self._captions) if self._captions else {}
        self._config = config
        if config.monitor_metric.startswith("ce_") and self._studies:
            self._require_fit([study.report for study in self._studies.values()])
        self._systems = SystemScorer(
            config,
            device,
            labels_by_rules=config.labels_by_rules,
            split_words=ptb_tokenise if self._captions is not None else None,
        )

    @property
    def metrics(self) -> Metrics:
        """The sentence metrics."""
        return self._systems.metrics

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
        vocabulary: str = "",
    ) -> Scored:
        """Score each system's reports against all forms of the references; ``tags`` mark the names of its scores.

        Reports are scored against both forms, cut and full, captions against all captions of their image. The model's
        are ``found.generated`` itself, which alone has a likelihood. ``training_reports`` are cleaned: references that
        are among them, word for word, are scored apart from the others. ``vocabulary`` is its digest: a likelihood is
        one of tokens, which equal texts may not share.
        """
        words, captions = self._references(found), self._captions
        studies, patients = self._units(found.ids)
        references = References(
            found.ids,
            words,
            # Captions are not cut, and their words are as they are: no <unk> of the vocabulary is among them.
            found.references if captions is None else found.full_references,
            found.reports,
            # Whole references are labelled as in the annotation: cleaning removes commas, colons and slashes.
            labelled=words if captions is not None else words | {FULL: found.reports},
            encoded=None if captions is None else {"": [captions[sample] for sample in found.ids]},
            studies=studies,
            patients=patients,
            with_prior=self._with_prior(found.ids),
            targets=digest([vocabulary], found.references),
        )
        likelihoods = {
            system: found.nll.numpy() for system, generated in systems.items() if generated is found.generated
        }
        scored = self._systems.score(references, systems, tags=tags, likelihoods=likelihoods)
        if captions is None:
            scored.seen = seen_in_training(found.full_references, training_reports)
        return scored

    def _units(self, ids: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Numbers (N,) of the samples' studies, and of their patients; None where the annotation does not say."""
        studies = [self._studies.get(sample) for sample in ids]
        if None in studies:
            return None, None
        return units_of([study.study_id for study in studies], [study.subject_id for study in studies])

    def _with_prior(self, ids: Sequence[str]) -> list[bool] | None:
        """Which samples have an earlier examination that is there; None where the annotation names none."""
        studies = map(self._studies.get, ids)
        priors = [bool(study and study.prior and not prior_problem(study, self._by_id)) for study in studies]
        return priors if any(priors) else None

    def _references(self, found: Predictions) -> dict[str, Sequence[str] | Sequence[Sequence[str]]]:
        if self._captions is None:
            return {"": found.references, FULL: found.full_references}
        return {"": [self._tokenised[sample] for sample in found.ids]}

    def _words(self, generated: Sequence[str]) -> Sequence[str]:
        return generated if self._captions is None else ptb_tokenise(generated)


def _tokenised(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The tokens of every caption of each sample, all of them by one process."""
    flat = iter(ptb_tokenise([text for texts in captions.values() for text in texts]))
    return {sample: [next(flat) for _ in texts] for sample, texts in captions.items()}
