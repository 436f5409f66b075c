"""Attention over the images as a PNG: a row for each word or sentence of a report, a column for each view."""

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image

from modules.inference.attention import opacity, shares
from modules.inference.prediction import WrittenReport


def attention_figure(images: Sequence[Image.Image], report: WrittenReport, *, title: str, by: str) -> bytes:
    """PNG of ``report.maps`` (words, N, g, g) over the N views; ``by`` "sentence" (mean over its words) or "word".

    Patches are coloured that got more than an even share of the attention.
    """
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    rows = [(sentence.text, report.maps[sentence.start : sentence.stop].mean(0)) for sentence in report.sentences]
    if by == "word":
        rows = [(word, report.maps[i]) for i, word in enumerate(report.words)]
    per_line = 1 if by == "sentence" else max(1, 6 // len(images))  # rows next to each other
    lines = max(1, -(-len(rows) // per_line))
    columns = per_line * len(images)
    figure = Figure(figsize=(2.1 * columns + 1.2, 2.5 * lines + 0.5), dpi=110, layout="constrained", facecolor="white")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (text, maps) in enumerate(rows):
        line, place = divmod(number, per_line)
        colour = opacity(shares(maps))
        for view, image in enumerate(images):
            axes = grid[line, place * len(images) + view]
            _overlay(axes, image, colour[view])
            if view == 0:
                width = 34 * len(images) if by == "sentence" else 18
                axes.set_title(textwrap.fill(text, width), fontsize=8, loc="left")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _overlay(axes, image: Image.Image, colour: np.ndarray) -> None:
    """Draw ``colour`` (g, g) over the whole image, as the evaluation's transform resizes it to a square."""
    small = image.convert("L")
    small.thumbnail((320, 320))
    extent = (0, small.width, small.height, 0)
    axes.imshow(np.asarray(small), cmap="gray", vmin=0, vmax=255, extent=extent)
    height, width = colour.shape
    overlay = np.zeros((height, width, 4))
    overlay[..., :3] = 1.0, 0.35, 0.0
    overlay[..., 3] = 0.75 * colour
    axes.imshow(overlay, interpolation="bilinear", extent=extent)
