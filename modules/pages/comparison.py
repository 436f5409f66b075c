"""Two runs on the same test reports side by side: scores with their difference, and the reports that differ most.

Shapes: N test reports.
"""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modules.evaluation.bootstrap import TEST_RESAMPLES, Difference, p_text
from modules.evaluation.metric_table import smaller_is_better, untagged
from modules.evaluation.report_statistics import ReportStatistics, scores_of_sums
from modules.pages.rendering import page_parts
from modules.pages.sentences import compare_sentences

_HEADINGS = ("Score", "A", "B", "B − A", "95 % interval", "p bootstrap", "p randomisation", "p Holm")
_EXPLANATION = (
    f"Paired over the test patients, else studies, {TEST_RESAMPLES:,} resamples: interval of the difference and p by "
    "bootstrap, p by approximate randomisation, and this p after Holm's correction for the scores shown; two-sided. "
    "One run each: nothing here covers other seeds. Macro averages over rare classes have no interval."
)
_SYNTHETIC = "SYNTHETIC data: the images are drawings."


@dataclass(frozen=True)
class ScoreLine:
    """A score of both runs, and the difference B - A with its tests."""

    name: str
    first: float
    second: float
    change: Difference
    p_holm: float | None  # corrected for the scores that are shown


@dataclass(frozen=True)
class ReportPair:
    """What both runs generated for one test report, ``number`` from 1, and each one's score for it."""

    number: int
    reference: str
    first: str
    second: str
    first_score: float
    second_score: float


@dataclass(frozen=True)
class Comparison:
    """The content of a comparison of runs A and B."""

    names: tuple[str, str]  # as the user gave the folders
    synthetic: bool
    settings: Sequence[tuple[str, str, str]]  # those that differ: name, A's, B's
    notes: Sequence[str]
    scores: Sequence[ScoreLine]
    by: str  # score that the reports were ranked by
    count: int  # N
    same: int  # reports that are equal in both runs
    better: Sequence[ReportPair]  # largest gain first
    worse: Sequence[ReportPair]  # largest loss first


def report_scores(statistics: ReportStatistics, name: str) -> np.ndarray | None:
    """Each report's own score (N,), as if it were the whole split; None where the run has no such score.

    ``name`` may be given with or without the run's tag.
    """
    for table, columns in statistics.columns().items():
        found = scores_of_sums({table: columns}, 1)
        if untagged(name, statistics.tag) in found:
            return found[untagged(name, statistics.tag)]
    return None


def rank(change: np.ndarray, most: int) -> tuple[list[int], list[int]]:
    """The rows, at most ``most`` each, with the largest gain and the largest loss in ``change`` (N,), NaN apart."""
    change = np.nan_to_num(change)
    order = np.argsort(-change, kind="stable")
    gains = [int(row) for row in order[:most] if change[row] > 0]
    losses = [int(row) for row in order[::-1][:most] if change[row] < 0]
    return gains, losses


def to_text(comparison: Comparison) -> str:
    """The comparison for a terminal; control characters in reports are left out."""
    lines = [f"{letter}: {name}" for letter, name in zip("AB", comparison.names, strict=True)]
    lines += [f"differs: {name}: {first} | {second}" for name, first, second in comparison.settings]
    lines += ["", *_columns([_HEADINGS, *map(_score_cells, comparison.scores)]), "", _EXPLANATION, *_notes(comparison)]
    for title, pairs in _sections(comparison):
        lines += ["", title]
        for pair in pairs:
            lines += [
                f"  {_heading(comparison, pair)}",
                f"    reference  {plain(pair.reference)}",
                f"    A          {plain(pair.first)}",
                f"    B          {plain(pair.second)}",
            ]
    return "\n".join(lines) + "\n"


def to_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown; markup in reports is escaped."""
    first, second = map(_markdown, comparison.names)
    lines = ["# Two runs compared", "", f"- A: {first}", f"- B: {second}"]
    lines += [*(f"- {_markdown(note)}" for note in _notes(comparison)), ""]
    if comparison.settings:
        lines += _markdown_table(("Setting", "A", "B"), comparison.settings)
    lines += _markdown_table(_HEADINGS, map(_score_cells, comparison.scores)) + [_EXPLANATION]
    for title, pairs in _sections(comparison):
        lines += ["", f"## {title}"]
        for pair in pairs:
            rows = [("reference", pair.reference), ("A", pair.first), ("B", pair.second)]
            lines += ["", f"### {_heading(comparison, pair)}", "", *_markdown_table(("", "Report"), rows)]
    return "\n".join(lines) + "\n"


def to_html(comparison: Comparison) -> str:
    """The comparison as a self-contained page without scripts; sentences that the reference lacks are marked."""
    template, parts, hashes = page_parts("comparison.html.j2", ("report.css",))
    sections = [
        (
            title,
            [
                {
                    "heading": _heading(comparison, pair),
                    "reference": pair.reference,
                    "sides": [
                        (letter, compare_sentences(pair.reference, text)[1])
                        for letter, text in (("A", pair.first), ("B", pair.second))
                    ],
                }
                for pair in pairs
            ],
        )
        for title, pairs in _sections(comparison)
    ]
    return template.render(
        **parts,
        hashes=hashes,
        comparison=comparison,
        headings=_HEADINGS,
        scores=[_score_cells(line) for line in comparison.scores],
        explanation=_EXPLANATION,
        sections=sections,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def plain(text: str) -> str:
    """``text`` as one line without control characters, which a terminal would interpret."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _notes(comparison: Comparison) -> list[str]:
    return [_SYNTHETIC, *comparison.notes] if comparison.synthetic else list(comparison.notes)


def _sections(comparison: Comparison) -> list[tuple[str, Sequence[ReportPair]]]:
    found = (("B gains most", comparison.better), ("B loses most", comparison.worse))
    same = f"{comparison.same} of {comparison.count} reports are equal in both"
    return [(f"Where {title}, by each report's own {comparison.by} ({same})", pairs) for title, pairs in found if pairs]


def _heading(comparison: Comparison, pair: ReportPair) -> str:
    return (
        f"report {pair.number} of {comparison.count}: A {pair.first_score:.3f}, B {pair.second_score:.3f} "
        f"({pair.second_score - pair.first_score:+.3f})"
    )


def _score_cells(line: ScoreLine) -> tuple[str, ...]:
    change = line.change
    return (
        f"{line.name} (lower is better)" if smaller_is_better(line.name) else line.name,
        f"{line.first:.4f}",
        f"{line.second:.4f}",
        f"{change.difference:+.4f}",
        "–" if change.low is None else f"[{change.low:+.4f}, {change.high:+.4f}]",
        *map(p_text, (change.p_bootstrap, change.p_randomisation, line.p_holm)),
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(map(_markdown, row)) + " |" for row in rows),
        "",
    ]


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]()<>#|~!&])", r"\\\1", plain(text))


def settings_that_differ(first: Mapping, second: Mapping, ignored: frozenset[str]) -> list[tuple[str, str, str]]:
    """(name, A's, B's) of the settings in which two configs differ."""
    names = [name for name in {**first, **second} if name not in ignored and first.get(name) != second.get(name)]
    return [(name, plain(str(first.get(name, "–"))), plain(str(second.get(name, "–")))) for name in names]
