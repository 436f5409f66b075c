"""Training curves as SVG inside a page: drawn by a template, read off by pointing at an epoch, without a script.

Lengths are units of the drawing, WIDTH x HEIGHT of them.
"""

import math
from collections.abc import Sequence
from typing import Any

from modules.pages.plots import History, Panel, drawn_panels, series_label

WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
_LETTER, _LINE = 6.1, 15  # width of a letter and height of a line in a readout
_MOST_POINTS = 30  # epochs up to which every value has its point


def svg_curves(history: History, *, best_epoch: int | None = None) -> list[dict[str, Any]]:
    """For each panel that has data what curves.svg.j2 draws: axes, lines, points, and a readout for each epoch."""
    return [_panel(panel, series, history, best_epoch) for panel, series in drawn_panels(history)]


def value_table(history: History) -> dict[str, Any] | None:
    """All values of all epochs, for readers who cannot point; None without history."""
    keys = list(dict.fromkeys(key for _, series in drawn_panels(history) for key in series))
    if not keys:
        return None
    rows = [(f"{row['epoch']}", [_number(row.get(key)) for key in keys]) for row in history]
    return {"columns": [key.replace("_", " ") for key in keys], "rows": rows}


def _panel(panel: Panel, series: dict[str, list[float]], history: History, best: int | None) -> dict[str, Any]:
    epochs = [row["epoch"] for row in history]
    values = [value for line in series.values() for value in line if math.isfinite(value)]
    low, high, ticks = _axis(min(values), max(values), panel.logarithmic and min(values) > 0, panel.name == "hardness")
    log = panel.logarithmic and min(values) > 0

    def x(epoch: float) -> float:
        first, last = epochs[0] - 0.5, epochs[-1] + 0.5
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * (epoch - first) / (last - first), 1)

    def y(value: float) -> float:
        share = (
            (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
            if log and value > 0
            else (value - low) / (high - low)
        )
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share, 1)

    labels = [series_label(key) for key in series]
    lines = [
        [(x(e), y(v)) if math.isfinite(v) else None for e, v in zip(epochs, line, strict=True)]
        for line in series.values()
    ]
    return {
        "title": panel.title,
        "labels": labels,
        "width": WIDTH,
        "height": HEIGHT,
        "plot": (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        "y_ticks": [(y(tick), f"{tick:g}") for tick in ticks],
        "x_ticks": [(x(tick), f"{tick:g}") for tick in _whole_ticks(epochs[0], epochs[-1])],
        "paths": [_path(points) for points in lines],
        "points": [_points(points) for points in lines],
        "best": x(best) if best is not None and epochs[0] <= best <= epochs[-1] else None,
        "epochs": [
            _readout(x(epoch), x(epoch + 0.5) - x(epoch - 0.5), epoch, labels, [line[i] for line in series.values()])
            for i, epoch in enumerate(epochs)
        ],
    }


def _axis(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float, list[float]]:
    """The limits of the vertical axis, and its ticks."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if log:
        low, high = low / 1.15, high * 1.15
        ticks = LogLocator(subs=(1, 2, 5)).tick_values(low, high)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        low, high = (0.0 if from_zero else low - margin), high + margin
        ticks = MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)).tick_values(low, high)
    return low, high, [float(tick) for tick in ticks if low <= tick <= high]


def _whole_ticks(first: int, last: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(nbins=8, integer=True, min_n_ticks=1).tick_values(first, last)
    return [float(tick) for tick in ticks if first <= tick <= last]


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """A line through ``points``, with a gap where one is None."""
    parts, pen_down = [], False
    for point in points:
        if point is not None:
            parts.append(f"{'L' if pen_down else 'M'}{point[0]:g} {point[1]:g}")
        pen_down = point is not None
    return " ".join(parts)


def _points(points: Sequence[tuple[float, float] | None]) -> list[tuple[float, float]]:
    """Those that get a mark: all of a short history, else those without neighbours, which no line shows."""
    padded = [None, *points, None]
    return [
        point
        for i, point in enumerate(points)
        if point is not None and (len(points) <= _MOST_POINTS or (padded[i] is None and padded[i + 2] is None))
    ]


def _readout(x: float, width: float, epoch: int, labels: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    lines = [f"{label} {_number(value)}" for label, value in zip(labels, values, strict=True)]
    box = _LETTER * max(map(len, lines)) + 26
    left = x + 8 if x < WIDTH / 2 else x - 8 - box
    return {
        "x": x,
        "from": round(x - width / 2, 1),
        "width": round(width, 1),
        "epoch": epoch,
        "lines": [(_TOP + 12 + _LINE * (number + 1), line) for number, line in enumerate(lines)],
        "box": (round(max(0, min(left, WIDTH - box)), 1), _TOP - 4, round(box, 1), _LINE * (len(lines) + 1) + 8),
    }


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"
