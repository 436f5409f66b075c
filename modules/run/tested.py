"""A tested model: what it wrote, what that scored, and what it was; results.json, log and record derive from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.config import Config
from modules.evaluation.metric_table import FULL, SELECTION, tagged, with_aliases
from modules.evaluation.scored import Scored, recorded
from modules.evaluation.tester import Predictions
from modules.run.data import Data
from modules.runtime.run_log import in_lines

MODEL = "model"


@dataclass(frozen=True)
class Tested:
    """The test split's reports of several systems, MODEL and the baselines, and everything that is reported about them.

    ``tag`` is part of the names of the model's scores (modules.evaluation.metric_table).
    """

    config: Config
    data: Data
    found: Predictions
    reports: Mapping[str, Sequence[str]]  # by system
    scored: Scored
    tag: str
    history: Sequence[Mapping]
    best_epoch: int
    tokenisation: str
    provenance: Mapping[str, Any]
    captions: Sequence[Sequence[str]] | None  # of each sample's image, where images have several

    @property
    def scores(self) -> dict[str, dict[str, float | None]]:
        """Scores by system, the model's under their tagged names."""
        return self.scored.scores | {MODEL: self._tagged(self.scored.scores[MODEL])}

    @property
    def validation(self) -> dict[str, float | None]:
        """The best epoch's validation scores, as the history has them."""
        rows = [row for row in self.history if row["epoch"] == self.best_epoch]
        return {
            name.removeprefix("val_"): value for row in rows for name, value in row.items() if name.startswith("val_")
        }

    @property
    def variety(self) -> dict[str, dict[str, float | int | None]]:
        """The collapse statistics of each system's reports, and of the references."""
        return self.scored.variety

    @property
    def by_reference(self) -> dict[str, dict[str, Any]]:
        """Scores for references seen in training, and for the others."""
        return self.scored.by_reference

    @property
    def warnings(self) -> list[str]:
        """What a reader of the scores has to know, a line each."""
        lines = self.scored.warnings(MODEL)
        if judged := [row["epoch"] for row in self.history if row.get(f"val_{SELECTION}") is not None]:
            lines.append(
                f"epochs {', '.join(map(str, judged))} wrote many <unk> in validation and were judged by "
                f"{self.config.monitor_metric} without the hits of <unk>"
            )
        if skipped := sum(row.get("train_skipped_steps") or 0 for row in self.history):
            steps = sum(row.get("train_steps") or 0 for row in self.history)
            lines.append(f"{skipped} of {steps} training steps were skipped: their loss or gradient was not finite")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The content of results.json."""
        variety = self.variety
        return {
            "split": "test",
            "best_epoch": self.best_epoch,
            "val": self.validation,
            "test": {name: with_aliases(values) for name, values in self.scores.items()},
            "intervals": self.scored.intervals,
            "intervals_are": self.scored.intervals_are,
            "by_reference": self.by_reference,
            "variety": variety | {MODEL: self._tagged(variety[MODEL])},
            "tokenisation": self.tokenisation,
            "clinical_classes": self.scored.class_tables(MODEL),
            "missing": self.scored.missing,
            "meteor_error": self.scored.missing.get("METEOR"),
            "warnings": self.warnings,
            "synthetic": self.data.annotation.synthetic,
            "config": dataclasses.asdict(self.config),
            "provenance": self.provenance,
        }

    def recorded(self, system: str = MODEL) -> dict[str, Any]:
        """The scores that a record keeps: of clinical ones those of 14 classes, uncertain as negative, ``_full``."""
        return recorded(self.scores[system], self.tag)

    def log_lines(self) -> list[str]:
        """The scores of each system, and what is known of the model's reports."""
        lines = [
            line
            for system in self.scores
            for line in in_lines(f"test, {system}: ", self._logged(self.scores[system]), indent=2)
        ]
        for name, part in self.by_reference.items():
            if scores := part["scores"].get(MODEL):
                heading = f"test, references {name} in training ({part['reports']}): "
                lines += in_lines(heading, self._logged(scores), indent=2)
        variety, references = self.variety[MODEL], self.variety["references"]
        return [
            *lines,
            f"test, different reports: {variety['unique_reports']} of {variety['num_reports']}; the commonest is "
            f"{100 * variety['commonest_share']:.1f} %; <unk> are {100 * variety['unk_share']:.1f} % of the generated "
            f"words, {100 * references['unk_share']:.1f} % of the references'",
        ]

    def _logged(self, scores: Mapping[str, float | None]) -> list[str]:
        """Words against references as others cut them, labels against whole ones, without precision and recall."""
        return [
            f"{key}={'-' if value is None else f'{value:.4f}'}"
            for key, value in recorded(scores, self.tag).items()
            if key.endswith(FULL) == key.startswith("ce_") and not ("_precision_" in key or "_recall_" in key)
        ]

    def _tagged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {tagged(name, self.tag): value for name, value in values.items()}
