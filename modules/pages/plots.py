"""Training curves from the per-epoch history: which there are, and all of them as PNG bytes for a file.

The history is a list of one dictionary per epoch (modules.training.trainer): ``epoch``, ``train_<term>``,
``val_<metric>``, ``lr_<group>``. Keys may be missing; a value that is None or not finite leaves a gap.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modules.evaluation.metric_table import SCORES, SENTENCE_METRICS, XPRONET_SUM, Score, SentenceMetric

# Okabe and Ito's colours, told apart with any colour vision; the markers tell them apart in black and white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# What an objective or the trainer logs in addition to loss terms.
_NOT_LOSSES = {"train_hardness", "train_steps", "train_skipped_steps", "train_temperature"}
# The cosine with its own report should pull away from those with the two negatives.
_SIMILARITIES = {
    "train_cos_positive": "its report",
    "train_cos_harder": "harder negative",
    "train_cos_negative": "hard negative",
    "train_retrieval_accuracy": "retrieval accuracy",
}
_REWARDS = {"train_reward": "samples", "train_baseline": "baseline"}
# Metrics with several scores get a panel each, the others share one.
_SHARED = [metric for metric in SENTENCE_METRICS if len(metric.scores) == 1]
_LABELS = {f"val_{score.name}": score.label for score in SCORES.values()}


@dataclass(frozen=True)
class Panel:
    """A diagram: the keys of the history that it shows, as ``selects`` says."""

    name: str
    title: str
    selects: Callable[[str], bool]
    logarithmic: bool = False


def _score_panel(name: str, metrics: Sequence[SentenceMetric], *others: Score) -> Panel:
    """The validation scores of ``metrics``, and of ``others``; a tag in a key (val_<score>_<tag>) does not matter."""
    starts = tuple(f"val_{score.name}" for score in (*(s for metric in metrics for s in metric.scores), *others))
    labels = [metric.label for metric in metrics]
    title = " and ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))
    return Panel(name, f"{title} on validation", lambda key: key.startswith(starts))


_PANELS = (
    Panel(
        "loss",
        "Losses",
        lambda key: (
            key.startswith("val_nll")
            or (key.startswith("train_") and key not in _NOT_LOSSES | _SIMILARITIES.keys() | _REWARDS.keys())
        ),
    ),
    Panel("reward", "Reward of the sampled reports", lambda key: key in _REWARDS),
    *(_score_panel(metric.name.lower(), [metric]) for metric in SENTENCE_METRICS if metric not in _SHARED),
    _score_panel("other_scores", _SHARED, XPRONET_SUM),
    Panel(
        "clinical",
        "Clinical F1 on validation (14 classes, labels by rules)",
        lambda key: key.startswith("val_ce_rule_f1_"),
    ),
    Panel("hardness", "Hardness λ of the synthesised negatives", lambda key: key == "train_hardness"),
    Panel("similarity", "Cosine of an image and a report; retrieval", lambda key: key in _SIMILARITIES),
    Panel("learning_rate", "Learning rate", lambda key: key.startswith("lr"), logarithmic=True),
)
PANELS = tuple(panel.name for panel in _PANELS)

History = Sequence[Mapping[str, float | None]]


def training_curves(history: History, *, best_epoch: int | None = None) -> bytes:
    """All panels that have data as one PNG, two in a row."""
    drawn = drawn_panels(history)
    rows = max(1, math.ceil(len(drawn) / 2))
    figure = _figure(11.2, 3.5 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (panel, series) in zip(grid, drawn, strict=False):
        _draw(axes, panel, series, history, best_epoch)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    return _png(figure)


def drawn_panels(history: History) -> list[tuple[Panel, dict[str, list[float]]]]:
    """Each panel that has data, with its series: a value for each epoch, NaN where there is none."""
    keys = dict.fromkeys(key for row in history for key in row)
    drawn = []
    for panel in _PANELS:
        series = {key: [_number(row.get(key)) for row in history] for key in keys if panel.selects(key)}
        series = {key: values for key, values in series.items() if not all(math.isnan(value) for value in values)}
        if series:
            drawn.append((panel, series))
    return drawn


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _figure(width: float, height: float):
    # Without pyplot: no global state, no display, and the import is quicker.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")


def _draw(axes, panel: Panel, series: Mapping[str, list[float]], history: History, best_epoch: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    for i, (key, values) in enumerate(series.items()):
        axes.plot(
            epochs,
            values,
            label=series_label(key),
            color=_COLOURS[i % 7],
            linewidth=1.5,
            linestyle="--" if key.startswith("val_nll") else "-",
            marker=_MARKERS[i % 7],
            markersize=3.5,
            markevery=max(1, len(epochs) // 12),
            drawstyle="steps-post" if panel.logarithmic else "default",
        )
    if best_epoch is not None:
        axes.axvline(best_epoch, color="#777777", linewidth=1, linestyle=":", label="best epoch")
    if panel.logarithmic:
        axes.set_yscale("log")
    if panel.name == "hardness":
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(which="both", labelsize=8)
    axes.grid(True, linewidth=0.5, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def series_label(key: str) -> str:
    """How a key of the history is called in a legend."""
    if key.startswith("val_nll"):
        return f"{key.removeprefix('val_')} (validation)"
    if key.startswith("val_ce_rule_f1_"):
        return key.removeprefix("val_ce_rule_f1_").partition("_14_")[0]
    known = {"lr_ve": "visual extractor", "lr_ed": "everything else"} | _SIMILARITIES | _REWARDS | _LABELS
    return known.get(key, key.removeprefix("train_").removeprefix("val_"))


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
