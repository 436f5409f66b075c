"""Draws growth.png from the JSON files of benchmarks/run_all.sh: how cost grows with the sizes that a user chooses.

python benchmarks/plot.py benchmarks/results
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser
from modules.runtime.errors import InputError, run_entry_point

# File, size on the x axis, title, x label; the y axis is in seconds.
PANELS = (
    ("train_step_batches", "batch_size", "training step", "studies per batch"),
    ("train_step_views", "views", "training step, 2 studies", "images of a study"),
    ("train_step_lengths", "max_seq_length", "training step from given features", "report length in tokens"),
    ("generate_lengths", "max_seq_length", "beam search from given features", "report length in tokens"),
    ("generate_beams", "beam_size", "beam search from given features", "beams"),
    ("mine", "rows", "mining hard negatives", "reports"),
    ("evaluate", "reports", "scoring a test split", "reports"),
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the JSON files; growth.png is written into it")
    return parser


def read(folder: Path, name: str) -> dict[str, Any]:
    """One benchmark's result; InputError where it is missing."""
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name}.json cannot be read ({error}); benchmarks/run_all.sh writes it") from error


def points(result: dict[str, Any], size: str) -> dict[str, list[tuple[float, float]]]:
    """(size, median seconds) by what was timed."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case in result.get("results") or result["search"]:
        seconds = case.get("seconds") or case["search_seconds"]
        lines = seconds if isinstance(seconds, dict) else {"whole": seconds}
        for line, values in lines.items():
            found.setdefault(line, []).append((case[size], statistics.median(values)))
    return found


def draw(folder: Path) -> Path:
    """One panel per size; that of mining is double-logarithmic, as the number of pairs grows with the square."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 4)
    for axes, (name, size, title, label) in zip(panels.flat, PANELS, strict=False):
        result = read(folder, name)
        for line, values in points(result, size).items():
            if line in ("optimiser", "labels by rules", "confidence intervals"):
                continue  # small and flat: they would only press the others together
            axes.plot(*zip(*values, strict=True), marker="o", markersize=3, linewidth=1, label=line)
        axes.set(title=title, xlabel=label, ylabel="seconds")
        if name == "mine":
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(
                axes.lines[0].get_xdata(),
                [f"{rows:,.0f}" for rows in axes.lines[0].get_xdata()],
                rotation=30,
                fontsize=8,
            )
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
        axes.title.set_fontsize(10)
        axes.grid(True, linewidth=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize=7)
    figure_of_steps(panels.flat[-1], read(folder, "generate"))
    figure.suptitle(
        f"{result['device_name']}, {result['threads']} thread(s), torch {result['packages']['torch']}, "
        f"{result['clock']} time",
        fontsize=10,
    )
    target = folder / "growth.png"
    figure.savefig(target, dpi=110)
    return target


def figure_of_steps(axes, result: dict[str, Any]) -> None:
    """A beam search's steps by position: flat, as no prefix is computed again."""
    steps = result["results"][0]["step_seconds"]
    axes.plot(range(len(steps)), [1000 * seconds for seconds in steps], linewidth=1)
    axes.set(title="one step of beam search", xlabel="position", ylabel="milliseconds")
    axes.set_ylim(bottom=0)
    axes.title.set_fontsize(10)
    axes.grid(True, linewidth=0.3)


def main() -> None:
    """Draw and say where."""
    print(draw(build_parser().parse_args().folder))


if __name__ == "__main__":
    run_entry_point(main)
