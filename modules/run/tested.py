"""A tested model: what it wrote, what that scored, and what it was; results.json, log and record derive from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.config import Config
from modules.evaluation.bootstrap import LEVEL, RESAMPLES
from modules.evaluation.diversity import collapse_statistics, collapse_warning
from modules.evaluation.score_names import FULL, tagged, untagged, with_aliases
from modules.evaluation.tester import Predictions
from modules.run.data import Data
from modules.run.scoring import Scored, class_tables

MODEL = "model"


@dataclass(frozen=True)
class Tested:
    """The test split's reports of several systems, MODEL and the baselines, with everything that is told of them.

    ``tag`` is part of the names of the model's scores (modules.evaluation.score_names).
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
        texts = dict(self.reports) | {"references": self.found.references}
        return {name: collapse_statistics(reports) for name, reports in texts.items()}

    @property
    def warnings(self) -> list[str]:
        """What a reader of the scores has to know, a line each."""
        return [line for line in (collapse_warning(self.variety[MODEL]),) if line]

    def as_json(self) -> dict[str, Any]:
        """The content of results.json."""
        variety = self.variety
        return {
            "split": "test",
            "best_epoch": self.best_epoch,
            "val": self.validation,
            "test": {name: with_aliases(values) for name, values in self.scores.items()},
            "intervals": self.scored.intervals,
            "intervals_are": f"percentile bootstrap over reports, {RESAMPLES} resamples, level {LEVEL:g}",
            "variety": variety | {MODEL: self._tagged(variety[MODEL])},
            "tokenisation": self.tokenisation,
            "clinical_classes": class_tables(self.scored, MODEL),
            "meteor_error": self.scored.meteor_error,
            "synthetic": self.data.annotation.synthetic,
            "config": dataclasses.asdict(self.config),
            "provenance": self.provenance,
        }

    def recorded(self, system: str = MODEL) -> dict[str, Any]:
        """The scores that a record keeps: of clinical ones those of 14 classes, uncertain as negative, ``_full``."""
        return {
            name: value
            for name, value in self.scores[system].items()
            if not name.startswith("ce_") or untagged(name, self.tag).endswith(f"_14_uncertain_negative{FULL}")
        }

    def log_lines(self) -> list[str]:
        """A line of scores for each system, and one about how varied the model's reports are."""
        lines = []
        for system in self.scores:
            # Words against references as others cut them, labels against whole ones.
            shown = " ".join(
                f"{key}={'-' if value is None else f'{value:.4f}'}"
                for key, value in self.recorded(system).items()
                if key.endswith(FULL) == key.startswith("ce_") and not ("_precision_" in key or "_recall_" in key)
            )
            lines.append(f"test, {system}: {shown}")
        variety = self.variety[MODEL]
        return [
            *lines,
            f"test, different reports: {variety['unique_reports']} of {variety['num_reports']}; the commonest is "
            f"{100 * variety['commonest_share']:.1f} %",
        ]

    def _tagged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {tagged(name, self.tag): value for name, value in values.items()}
