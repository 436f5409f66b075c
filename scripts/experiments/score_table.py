"""A table of experiments in the layout of the field's papers, as Markdown, CSV and LaTeX; it holds numbers only."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from modules.evaluation.metric_table import smaller_is_better

MARKS = ((0.01, "**"), (0.05, "*"))
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "α": r"$\alpha$",
    "–": "--",
    "—": "---",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


@dataclass(frozen=True)
class Cell:
    """A score of a row: mean over seeds, sample standard deviation, interval, p values against the row's baseline.

    ``p_holm`` is corrected for all tests of the table.
    """

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def mark(self) -> str:
        """** for a corrected p < 0.01, * for p < 0.05."""
        return next((mark for limit, mark in MARKS if self.p_holm is not None and self.p_holm < limit), "")


@dataclass(frozen=True)
class TableRow:
    """A method: its cells by key, how many runs they come from, and the paper's own figures by key."""

    label: str
    group: str  # rows of one group, a data set, stand together under its name
    source: str  # what the cells are, such as "3 seeds"
    cells: Mapping[str, Cell] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    published_on: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """What is written: heading, (key, label) of the columns, rows, and notes below."""

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[TableRow]
    notes: Sequence[str] = ()

    def best(self, group: str) -> dict[str, float]:
        """The best mean of each column among the group's trained rows, as it is printed; of nll it is the lowest."""
        rows = [row for row in self.rows if row.group == group and not row.is_baseline]
        means = {key: [round(row.cells[key].mean, 3) for row in rows if key in row.cells] for key, _ in self.columns}
        # One row alone is no comparison.
        return {
            key: (min if smaller_is_better(key) else max)(values) for key, values in means.items() if len(values) > 1
        }


def to_markdown(table: ScoreTable) -> str:
    """The table as GitHub shows it: each method's own line, its interval, and the paper's figures below."""
    labels = [label for _, label in table.columns]
    lines = [
        f"# {table.title}",
        "",
        _markdown_line(["Method", "", *labels]),
        _markdown_line(["---", "---", *["---:"] * len(labels)]),
    ]
    for group, rows in _grouped(table.rows):
        lines.append(_markdown_line([f"**{_markdown(group)}**", "", *[""] * len(labels)]))
        for row in rows:
            for name, source, texts in _lines(table, row, "±", lambda text: f"**{text}**"):
                lines.append(_markdown_line([_markdown(name), _markdown(source), *texts]))
    lines += ["", *(f"- {_markdown(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def to_latex(table: ScoreTable) -> str:
    """The table for a paper; needs \\usepackage{booktabs}."""
    labels = [latex_text(label) for _, label in table.columns]
    width = len(labels) + 2
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}}}",
        rf"\begin{{tabular}}{{ll{'c' * len(labels)}}}",
        r"\toprule",
        _latex_line(["Method", "", *labels]),
    ]
    for group, rows in _grouped(table.rows):
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textit{{{latex_text(group)}}}}} \\"]
        for row in rows:
            for name, source, texts in _lines(table, row, r"$\pm$", lambda text: rf"\textbf{{{text}}}"):
                lines.append(_latex_line([latex_text(name), latex_text(source), *map(_latex_cell, texts)]))
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes), r"\end{table}"]
    return "\n".join(lines) + "\n"


def to_csv(table: ScoreTable) -> str:
    """A line per method: data set, method, source; per score mean, sd, interval, p values and the paper's figure."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    parts = ("mean", "sd", "low", "high", "p", "p_holm", "paper")
    writer.writerow(
        ["dataset", "method", "source", "paper_dataset"]
        + [f"{key}_{part}" for key, _ in table.columns for part in parts]
    )
    for row in table.rows:
        values: list[float | str | None] = [row.group, row.label, row.source, row.published_on if row.published else ""]
        for key, _ in table.columns:
            cell = row.cells.get(key)
            values += [None] * 6 if cell is None else [cell.mean, cell.sd, cell.low, cell.high, cell.p, cell.p_holm]
            values.append(row.published.get(key))
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def latex_text(text: str) -> str:
    """Plain text with LaTeX's own letters made harmless."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _grouped(rows: Iterable[TableRow]) -> list[tuple[str, list[TableRow]]]:
    groups: dict[str, list[TableRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.items())


def _lines(
    table: ScoreTable, row: TableRow, plus_minus: str, bold: Callable[[str], str]
) -> list[tuple[str, str, list[str]]]:
    """(method, source, cells) of a row: its scores, its intervals if any, the paper's figures if any."""
    best = {} if row.is_baseline else table.best(row.group)
    scores, intervals, published = [], [], []
    for key, _ in table.columns:
        cell = row.cells.get(key)
        if cell is None:
            scores.append("–")
            intervals.append("")
        else:
            mean = f"{cell.mean:.3f}"
            mean = bold(mean) if round(cell.mean, 3) == best.get(key) else mean
            scores.append(mean + ("" if cell.sd is None else f" {plus_minus} {cell.sd:.3f}") + _mark(cell, plus_minus))
            intervals.append("" if cell.low is None else f"[{cell.low:.3f}, {cell.high:.3f}]")
        published.append(f"{row.published[key]:.3f}" if key in row.published else "–")
    lines = [(row.label, row.source, scores)]
    if any(intervals):
        lines.append(("", "95 % interval", intervals))
    if any(key in row.published for key, _ in table.columns):
        lines.append(("", f"paper, {row.published_on}", published))
    return lines


def _mark(cell: Cell, plus_minus: str) -> str:
    if not cell.mark:
        return ""
    return f" $^{{{cell.mark}}}$" if "pm" in plus_minus else " " + cell.mark.replace("*", r"\*")


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", text)


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _latex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(text: str) -> str:
    return "--" if text == "–" else text
