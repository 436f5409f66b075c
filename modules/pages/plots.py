"""Training curves from the per-epoch history, as PNG bytes that a file or a page can hold.

The history is a list of one dictionary an epoch, as modules.training.trainer keeps it: ``epoch``, ``train_<term>``,
``val_<metric>``, ``lr_<group>``. Keys may be missing; a value that is None or not finite leaves a gap.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Okabe and Ito's colours, told apart with any colour vision; the markers tell them apart in black and white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# What an objective logs beside its loss terms.
_NOT_LOSSES = {"train_hardness", "train_steps", "train_temperature"}
# The cosine with its own report should pull away from those with the two negatives.
_SIMILARITIES = {
    "train_cos_positive": "its report",
    "train_cos_harder": "harder negative",
    "train_cos_negative": "hard negative",
    "train_retrieval_accuracy": "retrieval accuracy",
}


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    selects: Callable[[str], bool]
    logarithmic: bool = False


_PANELS = (
    _Panel(
        "loss",
        "Losses",
        lambda key: (
            key.startswith("val_nll")
            or (key.startswith("train_") and key not in _NOT_LOSSES and key not in _SIMILARITIES)
        ),
    ),
    _Panel("bleu", "BLEU on validation", lambda key: key.startswith("val_BLEU_")),
    _Panel(
        "other_scores",
        "METEOR, ROUGE-L and CIDEr on validation",
        lambda key: key.startswith(("val_METEOR", "val_ROUGE_L", "val_CIDEr", "val_xpronet")),
    ),
    _Panel(
        "clinical",
        "Clinical F1 on validation (14 classes, labels by rules)",
        lambda key: key.startswith("val_ce_rule_f1_"),
    ),
    _Panel("hardness", "Hardness λ of the synthesised negatives", lambda key: key == "train_hardness"),
    _Panel("similarity", "Cosine of an image and a report; retrieval", lambda key: key in _SIMILARITIES),
    _Panel("learning_rate", "Learning rate", lambda key: key.startswith("lr"), logarithmic=True),
)
PANEL_TITLES = {panel.name: panel.title for panel in _PANELS}

History = Sequence[Mapping[str, float | None]]


def training_figures(history: History, *, best_epoch: int | None = None) -> dict[str, bytes]:
    """Return one PNG for each panel that has data, keyed by the names in PANEL_TITLES; ``best_epoch`` is marked."""
    figures = {}
    for panel, series in _drawn_panels(history):
        figure = _figure(5.6, 3.4)
        _draw(figure.subplots(), panel, series, history, best_epoch)
        figures[panel.name] = _png(figure)
    return figures


def training_curves(history: History, *, best_epoch: int | None = None) -> bytes:
    """Return all panels that have data as one PNG, two in a row."""
    drawn = _drawn_panels(history)
    rows = max(1, math.ceil(len(drawn) / 2))
    figure = _figure(11.2, 3.5 * rows)
    grid = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, (panel, series) in zip(grid, drawn, strict=False):
        _draw(axes, panel, series, history, best_epoch)
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    return _png(figure)


def _drawn_panels(history: History) -> list[tuple[_Panel, dict[str, list[float]]]]:
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


def _draw(axes, panel: _Panel, series: Mapping[str, list[float]], history: History, best_epoch: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    for i, (key, values) in enumerate(series.items()):
        axes.plot(
            epochs,
            values,
            label=_label(key),
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


def _label(key: str) -> str:
    if key.startswith("val_nll"):
        return f"{key.removeprefix('val_')} (validation)"
    if key.startswith("val_ce_rule_f1_"):
        return key.removeprefix("val_ce_rule_f1_").partition("_14_")[0]
    if key.startswith("lr_"):
        return {"lr_ve": "visual extractor", "lr_ed": "everything else"}.get(key, key)
    if key in _SIMILARITIES:
        return _SIMILARITIES[key]
    return key.split("_", 1)[1].replace("ROUGE_L", "ROUGE-L").replace("BLEU_", "BLEU-")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
