"""A table of scores in the layout of the field's papers, as Markdown, CSV and LaTeX; it holds numbers only."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A method: its cells by key, how many runs they come from, and the paper's figures by key."""

    label: str
    group: str  # rows of one group, a data set, are listed together under its name
    source: str  # what the cells are, such as "3 seeds"
    cells: Mapping[str, Cell] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    published_on: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """What is written: title, headings of the columns by key, rows, and notes below."""

    title: str
    columns: Mapping[str, str]
    rows: Sequence[TableRow]
    notes: Sequence[str] = ()

    def best(self, group: str) -> dict[str, float]:
        """The best mean of each column, as printed, among the group's trained rows."""
        rows = [row for row in self.rows if row.group == group and not row.is_baseline]
        means = {key: [round(row.cells[key].mean, 3) for row in rows if key in row.cells] for key in self.columns}
        # One row alone is not compared with anything.
        return {
            key: (min if smaller_is_better(key) else max)(values) for key, values in means.items() if len(values) > 1
        }


def to_markdown(table: ScoreTable) -> str:
    """The table for GitHub: a line per method, its interval, and the paper's figures below."""
    labels = list(table.columns.values())

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [f"# {table.title}", "", line(["Method", "", *labels]), line(["---", "---", *["---:"] * len(labels)])]
    for group, rows in _grouped(table):
        lines.append(line([f"**{_markdown(group)}**", *[""] * (len(labels) + 1)]))
        for row in rows:
            for name, source, texts in _lines(table, row, _markdown, "**{}**", "{} ± {}"):
                lines.append(line([_markdown(name), _markdown(source), *texts]))
    return "\n".join([*lines, "", *(f"- {_markdown(note)}" for note in table.notes)]) + "\n"


def to_latex(table: ScoreTable) -> str:
    """The table for a paper; needs \\usepackage{booktabs}."""
    labels = [latex_text(label) for label in table.columns.values()]

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    lines = [r"% \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{latex_text(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{ll{'c' * len(labels)}}}", r"\toprule", line(["Method", "", *labels])]
    for group, rows in _grouped(table):
        lines += [r"\midrule", rf"\multicolumn{{{len(labels) + 2}}}{{l}}{{\textit{{{latex_text(group)}}}}} \\"]
        for row in rows:
            for name, source, texts in _lines(table, row, "$^{{{}}}$".format, r"\textbf{{{}}}", r"{} $\pm$ {}"):
                texts = [text.replace("–", "--") for text in texts]
                lines.append(line([latex_text(name), latex_text(source), *texts]))
    return (
        "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes), r"\end{table}"])
        + "\n"
    )


def to_csv(table: ScoreTable) -> str:
    """A line per method: data set, method, source; per score mean, sd, interval, p values and the paper's figure."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    parts = ("mean", "sd", "low", "high", "p", "p_holm")
    heads = [f"{key}_{part}" for key in table.columns for part in (*parts, "paper")]
    writer.writerow(["dataset", "method", "source", "paper_dataset", *heads])
    for row in table.rows:
        values = [row.group, row.label, row.source, row.published_on if row.published else ""]
        for key in table.columns:
            values += [getattr(row.cells.get(key), part, None) for part in parts] + [row.published.get(key)]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def latex_text(text: str) -> str:
    """Plain text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<>])", r"\\\1", text)


def _grouped(table: ScoreTable) -> Iterator[tuple[str, list[TableRow]]]:
    for group in dict.fromkeys(row.group for row in table.rows):
        yield group, [row for row in table.rows if row.group == group]


def _lines(
    table: ScoreTable, row: TableRow, mark: Callable[[str], str], bold: str, spread: str
) -> list[tuple[str, str, list[str]]]:
    """(method, source, cells) of a row: its scores, its intervals if any, the paper's figures if any."""
    best = {} if row.is_baseline else table.best(row.group)
    scores, intervals, published = [], [], []
    for key in table.columns:
        cell = row.cells.get(key)
        text, interval = "–", ""
        if cell is not None:
            text = f"{cell.mean:.3f}"
            text = bold.format(text) if round(cell.mean, 3) == best.get(key) else text
            text = text if cell.sd is None else spread.format(text, f"{cell.sd:.3f}")
            text += f" {mark(cell.mark)}" if cell.mark else ""
            interval = "" if cell.low is None else f"[{cell.low:.3f}, {cell.high:.3f}]"
        scores.append(text)
        intervals.append(interval)
        published.append(f"{row.published[key]:.3f}" if key in row.published else "–")
    lines = [(row.label, row.source, scores)]
    if any(intervals):
        lines.append(("", "95 % interval", intervals))
    if any(key in row.published for key in table.columns):
        lines.append(("", f"paper, {row.published_on}", published))
    return lines
