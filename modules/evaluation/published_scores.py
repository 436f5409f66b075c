"""Which of this project's scores another paper's clinical F1 is: averaging, classes and what uncertain counts as.

Published figures differ in each of these and in the labeler, so that two of them are rarely the same quantity.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from modules.evaluation.metric_table import FULL

NOT_HARMONIC = (
    "F1 is averaged over classes (macro, weighted) or reports (example), so it is not 2PR/(P+R) of the averages P and "
    "R; only with micro averaging it is"
)


@dataclass(frozen=True)
class Convention:
    """How precision, recall and F1 are averaged; ``uncertain`` is a policy of UNCERTAIN_POLICIES."""

    averaging: str
    classes: str  # a key of CLASS_SETS
    uncertain: str

    def names(self, labeler: str) -> dict[str, str]:
        """The names of precision, recall and F1 in results.json, against whole references."""
        from modules.evaluation.clinical_scores import RATIOS  # --help needs no package

        return {
            ratio: f"ce_{labeler}_{ratio}_{self.averaging}_{self.classes}_uncertain_{self.uncertain}{FULL}"
            for ratio in RATIOS
        }

    def __str__(self) -> str:
        return f"{self.averaging}, {self.classes} classes, uncertain as {self.uncertain}"


@dataclass(frozen=True)
class Published:
    """A paper's or package's conventions, its headline first; ``labeler`` is its own, ``source`` says so."""

    conventions: tuple[Convention, ...]
    labeler: str
    source: str


_MACRO_14 = Convention("macro", "14", "negative")
_EXAMPLE_14 = Convention("example", "14", "negative")
_MICRO_14 = Convention("micro", "14", "negative")
_CHEXBERT_PACKAGE = tuple(
    Convention(averaging, classes, "positive") for averaging in ("micro", "macro") for classes in ("14", "5")
)
PUBLISHED: Mapping[str, Published] = {
    "R2GenCMN": Published(
        (_MACRO_14,),
        "CheXpert",
        "its author: github.com/zhjohnchan/R2GenCMN/issues/12 (macro); recomputations in issues/7, with uncertain as "
        "negative, miss the printed recall",
    ),
    "XProNet": Published(
        (_MICRO_14,),
        "CheXpert",
        "not stated: its F1 is known from the ITHN paper's table, the harmonic mean of precision and recall",
    ),
    "ITHN": Published(
        (_MICRO_14,),
        "CheXpert",
        "not stated: in every row of arXiv 2305.07176's table F1 is the harmonic mean of precision and recall",
    ),
    "ORGan": Published(
        (Convention("macro", "14", "positive"),),
        "CheXbert",
        "its author: github.com/wjhou/ORGan/issues/4 (macro, uncertain as positive)",
    ),
    "CvT2DistilGPT2": Published(
        (_EXAMPLE_14, _MACRO_14, _MICRO_14), "CheXbert", "tools/metrics/chexbert.py of github.com/aehrc/cvt2distilgpt2"
    ),
    "PromptMRG": Published(
        (_EXAMPLE_14,), "CheXbert", "modules/metrics_clinical.py of github.com/jhb86253817/PromptMRG"
    ),
    "RGRG": Published(
        (Convention("micro", "5", "positive"), Convention("micro", "14", "positive"), _EXAMPLE_14),
        "CheXbert",
        "evaluate_language_model.py of github.com/ttanida/rgrg, and its issues/4",
    ),
    "MLRG": Published(
        _CHEXBERT_PACKAGE,
        "CheXbert",
        "tools/metrics/metrics.py of github.com/mk-runner/MLRG, with the package f1chexbert",
    ),
    "RadEval": Published(
        (
            *(Convention("micro", classes, "positive") for classes in ("5", "14")),
            *(Convention(a, classes, "positive") for a in ("macro", "weighted") for classes in ("5", "14")),
        ),
        "CheXbert",
        "metrics/_chexbert_base.py and metrics/f1chexbert of the package radeval",
    ),
    "CXRMate": Published(
        (_MACRO_14, _MICRO_14, _EXAMPLE_14), "CheXbert", "tools/metrics/chexbert.py of github.com/aehrc/cxrmate"
    ),
}


def published_lines(
    name: str, scores: Mapping[str, float | None], intervals: Mapping[str, tuple[float, float]], labeler: str
) -> list[str]:
    """What ``name``'s figures are here: a line for each convention with precision, recall and F1, and what to know.

    ``labeler`` is the one whose ``scores`` are compared.
    """
    own = PUBLISHED[name]
    lines = []
    for convention in own.conventions:
        names = convention.names(labeler)
        shown = [f"{ratio} {'–' if scores.get(key) is None else f'{scores[key]:.4f}'}" for ratio, key in names.items()]
        if limits := intervals.get(names["f1"]):
            shown[-1] += f" [{limits[0]:.4f}, {limits[1]:.4f}]"
        lines.append(f"  {convention}: {', '.join(shown)}")
    lines.append(f"  source: {own.source}")
    if own.labeler.lower() != labeler:
        used = "the rules of this project" if labeler == "rule" else labeler
        lines.append(f"  {name} labels by {own.labeler}, these labels are by {used}: compare with care")
    if own.conventions[0].averaging != "micro":
        lines.append(f"  {NOT_HARMONIC}")
    return lines
