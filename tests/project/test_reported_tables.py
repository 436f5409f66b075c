"""The tables of the pages on Flickr8k hold what the kept numbers of the runs say."""

import functools
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE, DOCS = ROOT / "experiments" / "evidence", ROOT / "docs"
SCORES = ("nll", "BLEU_4", "METEOR", "CIDEr")


@functools.cache
def kept(folder: str) -> dict[str, list[dict]]:
    """The kept runs of every row, by row."""
    rows: dict[str, list[dict]] = {}
    for path in sorted((EVIDENCE / folder).glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        rows.setdefault(run["row"], []).append(run)
    return rows


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of a section's first table, without its header."""
    section = (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.search(r"(?:^\|.*\n)+", section, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def written(runs: list[dict]) -> list[str]:
    """Scores and different captions of a row as the pages write them."""
    scores = [[run["scores"]["model"][name] for run in runs] for name in SCORES]
    spread = [f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "" for values in scores]
    different = statistics.mean(run["variety"]["model"]["unique_reports"] for run in runs)
    means = [f"{statistics.mean(values):.3f}{more}" for values, more in zip(scores, spread, strict=True)]
    return [*means, f"{int(different + 0.5)}"]


def test_the_outcome():
    runs = kept("flickr8k")
    rows = [row["name"] for row in json.loads((EVIDENCE / "flickr8k.json").read_text())["rows"]]
    found = table("EXPERIMENTS.md", "The outcome")
    assert all(len(runs[row]) == 6 for row in rows) and len(found) == len(rows) + 1  # and a baseline
    for row, cells in zip(rows, found, strict=False):
        assert cells[1:6] == written(runs[row]), row


def test_the_smaller_weight():
    runs = kept("flickr8k")
    for row, cells in zip(
        ("plain", "ithn", "ithn_light"), table("experiments/flickr8k.md", "ITHN with a smaller weight"), strict=True
    ):
        assert cells[1:] == written(runs[row]), row


def test_the_captioners():
    table_rows = json.loads((EVIDENCE / "flickr8k_captioners.json").read_text())["rows"]
    rows = [row["name"] for row in table_rows if row["name"] != "short_float32"]  # whose table is the outcome's
    found = table("experiments/flickr8k.md", "A captioner first")
    assert len(found) == len(rows) + 1  # and a baseline
    for row, cells in zip(rows, found, strict=False):
        assert [cell.strip("*") for cell in cells[1:]] == written(kept("flickr8k_captioners")[row])[1:], row


def test_what_stands_in_the_way():
    known = [written(runs) for runs in kept("flickr8k_defaults").values()]
    found = [
        [cell.strip("*") for cell in cells[1:]]
        for cells in table("experiments/flickr8k.md", "What stands in a captioner's way")
    ]
    assert sorted(found) == sorted(known)


@pytest.mark.parametrize(
    ("place", "row"), enumerate(("plain", "contrastive", "prior", "columns", "mochi", "ithn", "ithn_columns", "rival"))
)
def test_the_tuning_and_its_choice(place, row):
    runs = kept("flickr8k_tuning")
    values = [runs[f"{row}_{setting}"][0]["history"][-1]["val_CIDEr"] for setting in range(1, 5)]
    cells = table("experiments/flickr8k.md", "Tuning")[place][1:]
    best = values.index(max(values))
    for setting, (cell, value) in enumerate(zip(cells, values, strict=True)):
        assert cell.startswith(f"**{value:.3f} (" if setting == best else f"{value:.3f} ("), cell
