"""Why a contrastive term helps or does not, in one figure: from the numbers that the two probes keep.

  python scripts/research/probe_image_leakage.py --load results/*/seed1/epoch_*.pth --numbers leakage.json
  python scripts/research/probe_gradients.py --load results/ithn/seed1/epoch_*.pth --numbers gradients.json
  python scripts/research/draw_mechanism.py leakage.json gradients.json --out mechanism.png

A row is a run, named by the folder of its checkpoints (without seedN); all epochs are drawn, the last one largest.
Above: is the own report of an image found among those of its batch (test split), as trained, with every report read
under the mean image, and by its text alone; and how the variance of the hidden states divides between the image, the
report and both. Below: what share of the contrastive gradient's squared norm each part of the network receives, and
its cosine to the gradient of the cross entropy there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.flags import Parser
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from scripts.research.probe_numbers import Row, read_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

READINGS = {
    "retrieval": ("as trained", "o", "#4c78a8"),
    "retrieval_mean": ("under the mean image", "s", "#e45756"),
    "text_only": ("by the text alone", "|", "#555555"),
}
SOURCES = {"image": "#4c78a8", "both": "#b279a2", "report": "#e45756"}
PARTS = {
    "extractor": "#4c78a8",
    "encoder": "#72b7b2",
    "memory": "#eeca3b",
    "decoder": "#e45756",
    "projections": "#bab0ac",
}
TERM = "L_CP"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("leakage", type=Path, metavar="LEAKAGE", help="JSON of probe_image_leakage.py --numbers")
    add("gradients", type=Path, metavar="GRADIENTS", help="JSON of probe_gradients.py --numbers")
    add("--out", type=Path, required=True, metavar="PNG", help="the figure")
    add("--rows", nargs="+", default=[], metavar="ROW", help="rows to draw, in this order; default: all")
    return parser


def run_of(checkpoint: str) -> str:
    """The row that a checkpoint belongs to: its folder's name, or the one above seedN."""
    folder = Path(checkpoint).parent
    return folder.parent.name if folder.name.startswith("seed") else folder.name


def by_run(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by run, each run's by epoch; InputError for several seeds of a run."""
    found: dict[str, list[Row]] = {}
    folders: dict[str, Path] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        folder, run = Path(row["checkpoint"]).parent, run_of(row["checkpoint"])
        if folders.setdefault(run, folder) != folder:
            raise InputError(
                f"row {run}: has checkpoints of {folders[run]} and {folder}; one seed of each row is drawn"
            )
        found.setdefault(run, []).append(row)
    return found


def last(rows: Sequence[Row]) -> list[Row]:
    """Those of the last epoch."""
    return [row for row in rows if row["epoch"] == rows[-1]["epoch"]]


def draw_readings(axes: "Axes", runs: Sequence[str], found: dict[str, list[Row]]) -> None:
    """Retrieval of the own report, by epoch."""
    for key, (label, marker, colour) in READINGS.items():
        for place, run in enumerate(runs):
            values = [row[key] for row in found.get(run, []) if key in row]
            sizes = [25 + 55 * (number + 1) / len(values) for number in range(len(values))]
            named = label if values and label not in axes.get_legend_handles_labels()[1] else None
            axes.plot(values, [place] * len(values), "-", color=colour, linewidth=0.8, alpha=0.5)
            axes.scatter(values, [place] * len(values), sizes, color=colour, marker=marker, label=named)
    axes.set_xlabel("own report found in its batch, test")


def draw_shares(
    axes: "Axes", runs: Sequence[str], colours: dict[str, str], shares: dict[str, dict[str, float]]
) -> None:
    """Stacked bars of ``shares``, by run."""
    places = [place for place, run in enumerate(runs) if run in shares]
    start = [0.0] * len(places)
    for name, colour in colours.items():
        widths = [shares[runs[place]].get(name, 0.0) for place in places]
        axes.barh(places, widths, left=start, color=colour, label=name, height=0.65)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axes.set_xlim(0, 1)


def draw_cosines(axes: "Axes", runs: Sequence[str], found: dict[str, list[Row]]) -> None:
    """The contrastive gradient's cosine to that of the cross entropy, by part and epoch."""
    axes.axvline(0, color="black", linewidth=0.8)
    for part, colour in list(PARTS.items())[:-1]:  # the cross entropy has no gradient in the projections
        for place, run in enumerate(runs):
            values = [row["cosine"] for row in found.get(run, []) if row["part"] == part]
            sizes = [20 + 40 * (number + 1) / len(values) for number in range(len(values))]
            named = part if values and part not in axes.get_legend_handles_labels()[1] else None
            axes.scatter(values, [place] * len(values), sizes, color=colour, label=named, alpha=0.8)
    axes.set_xlabel("cosine to the cross entropy's gradient; below 0 they oppose")


def draw(leakage: Sequence[Row], gradients: Sequence[Row], rows: Sequence[str], out: Path) -> None:
    """The figure; InputError for a row that neither file has."""
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    read = by_run([row for row in leakage if row["split"] == "test"])
    pulled = by_run([row for row in gradients if row["term"] == TERM])
    runs = list(rows or dict.fromkeys([*read, *pulled]))
    if missing := [run for run in runs if run not in read and run not in pulled]:
        raise InputError(f"--rows {missing[0]}: the files have {', '.join(dict.fromkeys([*read, *pulled]))}")
    figure = Figure(figsize=(12, 2.6 + 0.75 * len(runs)), dpi=130, layout="constrained", facecolor="white")
    (readings, variance), (shares, cosines) = figure.subplots(2, 2, sharey=True)
    draw_readings(readings, runs, read)
    draw_shares(variance, runs, SOURCES, {run: own[-1]["variance"] for run, own in read.items()})
    variance.set_xlabel("share of the hidden states' variance, last epoch")
    own: dict[str, dict[str, Any]] = {
        run: {row["part"]: row["share"] for row in last(found)} for run, found in pulled.items()
    }
    draw_shares(shares, runs, PARTS, own)
    shares.set_xlabel(f"share of {TERM}'s squared gradient norm, last epoch")
    draw_cosines(cosines, runs, pulled)
    for axes in (readings, variance, shares, cosines):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=5, columnspacing=1, frameon=False)
    readings.set_yticks(range(len(runs)), runs)
    readings.invert_yaxis()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main() -> None:
    """Read, draw."""
    arguments = build_parser().parse_args()
    if arguments.out.suffix != ".png":
        raise InputError(f"--out {arguments.out}: must end in .png")
    check_outputs(
        [Output("--out", arguments.out, "a PNG file", contains("PNG\r\n\x1a\n", "IHDR"))],
        [("a file of numbers", arguments.leakage), ("a file of numbers", arguments.gradients)],
    )
    leakage = read_numbers(arguments.leakage, "probe_image_leakage")
    draw(leakage, read_numbers(arguments.gradients, "probe_gradients"), arguments.rows, arguments.out)


if __name__ == "__main__":
    run_entry_point(main)
