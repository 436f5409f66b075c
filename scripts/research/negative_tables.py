"""The findings of inspect_negatives.py as Markdown tables and as a figure; numbers only, no report text.

An epoch is a dictionary: ``epoch``, ``hardness``, the entries of scripts.research.negative_positions.similarities, and
``synthesised``: a list of dictionaries with ``strategy``, ``hardness``, ``own_hardness`` (whether that is the epoch's
own), the entries of ``positions`` and ``decoder``.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.ithn.synthesis import SYNTHESISED

# Okabe and Ito's colours.
_COLOURS = dict(zip(SYNTHESISED, itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))))
_STYLES = (("-", "o"), ("--", "s"), (":", "^"))
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class _Quantity:
    title: str
    of: Callable[[Entry], str]  # of one entry of "synthesised"
    reference: str = ""
    of_epoch: Callable[[Entry], str] | None = None


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3f} ({values['q1']:.3f} to {values['q3']:.3f})"


def _share(*names: str) -> Callable[[Entry], str]:
    return lambda entry: " / ".join(f"{entry['nearest'][name]:.3f}" for name in names)


_POSITIONS = (
    _Quantity(
        "Distance from ũ to the nearest real report, median (quartiles)",
        lambda e: _spread(e["distance"]),
        "from a real report to the nearest of different text",
        lambda e: _spread(e["distance_between_real"]),
    ),
    _Quantity(
        "Share of ũ whose nearest real report is u / u⁻ / another",
        _share("u", "negative", "other"),
        "distance from u to u⁻",
        lambda e: _spread(e["distance_to_negative"]),
    ),
    _Quantity(
        "cos(z, ũ), mean",
        lambda e: f"{e['cos_harder']['mean']:.3f}",
        "cos(z, u) / cos(z, u⁻) / retrieval",
        lambda e: f"{e['cos_positive']['mean']:.3f} / {e['cos_negative']['mean']:.3f} / {e['retrieval_accuracy']:.3f}",
    ),
)
_READINGS = (
    _Quantity(
        "Share of words that change when the hidden states of u⁻ are moved to ũ",
        lambda e: f"{e['decoder']['words_changed']:.3f}",
    ),
    _Quantity(
        "Mean probability of the word read",
        lambda e: f"{e['decoder']['probability']:.3f}",
        "unmoved",
        lambda e: f"{e['reading_of_negative']['probability']:.3f}",
    ),
    _Quantity(
        "Length of the move, relative to the hidden states of u⁻, median (quartiles)",
        lambda e: _spread(e["decoder"]["move"]),
    ),
)
_LABELS = tuple(
    _Quantity(
        f"Labels of the words read{without}: micro F1 with the labels of the report of u⁻ / of u",
        lambda e, key=key: f"{e['decoder'][f'{key}_negative']:.3f} / {e['decoder'][f'{key}_u']:.3f}",
        "unmoved",
        lambda e, key=key: (
            f"{e['reading_of_negative'][f'{key}_negative']:.3f} / {e['reading_of_negative'][f'{key}_u']:.3f}"
        ),
    )
    for key, without in (("f1", ""), ("f1_findings", ", without No Finding"))
)
# What a panel draws, by what it adds to the strategy's name.
_SHARES = {
    ", u": lambda e: e["nearest"]["u"],
    ", u⁻": lambda e: e["nearest"]["negative"],
    ", another": lambda e: e["nearest"]["other"],
}
_CHANGES = {", words changed": lambda e: e["decoder"]["words_changed"]}
_AGREEMENTS = {
    ", F1 of findings, u⁻": lambda e: e["decoder"]["f1_findings_negative"],
    ", F1 of findings, u": lambda e: e["decoder"]["f1_findings_u"],
}


def to_markdown(epochs: Sequence[Entry], *, title: str, notes: Iterable[str] = ()) -> str:
    """One table per quantity over epochs, each at its own hardness, and one over hardness at the last epoch."""
    labelled = "f1_u" in epochs[-1]["reading_of_negative"]
    quantities = (*_POSITIONS, *_READINGS, *(_LABELS if labelled else ()))
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), "", "## Over epochs, each at its own λ", ""]
    for quantity in quantities:
        rows = [(f"{epoch['epoch']} | {epoch['hardness']:.3f}", epoch, _own(epoch)) for epoch in epochs]
        lines += _table(quantity, "epoch | λ", rows)
    lines += [f"## Over λ, at epoch {epochs[-1]['epoch']}", ""]
    for quantity in quantities:
        rows = [(f"{hardness:g}", epochs[-1], of_hardness) for hardness, of_hardness in _grid(epochs[-1]).items()]
        lines += _table(quantity, "λ", rows)
    return "\n".join(lines)


def _table(quantity: _Quantity, head: str, rows: Iterable[tuple[str, Entry, Mapping[str, Entry]]]) -> list[str]:
    extra = [quantity.reference] if quantity.of_epoch else []
    heads = [*head.split(" | "), *SYNTHESISED, *extra]
    lines = [f"### {quantity.title}", "", f"| {' | '.join(heads)} |", "|" + " ---: |" * len(heads)]
    for name, epoch, entries in rows:
        cells = [quantity.of(entries[strategy]) for strategy in SYNTHESISED]
        cells += [quantity.of_epoch(epoch)] if quantity.of_epoch else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _own(epoch: Entry) -> dict[str, Entry]:
    return {entry["strategy"]: entry for entry in epoch["synthesised"] if entry["own_hardness"]}


def _grid(epoch: Entry) -> dict[float, dict[str, Entry]]:
    """Entries by hardness, ascending, then by strategy; the epoch's own is not among them."""
    grid: dict[float, dict[str, Entry]] = {}
    for entry in sorted(epoch["synthesised"], key=lambda entry: entry["hardness"]):
        if not entry["own_hardness"]:
            grid.setdefault(entry["hardness"], {})[entry["strategy"]] = entry
    return grid


def figure(epochs: Sequence[Entry], *, title: str) -> bytes:
    """PNG of four panels over epochs, each at its own hardness (above), and over hardness at the last epoch (below)."""
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawing = Figure(figsize=(17, 8), dpi=110, layout="constrained", facecolor="white")
    drawing.suptitle(title, fontsize=11)
    grid = drawing.subplots(2, 4)
    last = _grid(epochs[-1])
    for row, (label, xs, of_epoch, entries) in enumerate(
        (
            ("epoch, at its own λ", [epoch["epoch"] for epoch in epochs], epochs, [_own(epoch) for epoch in epochs]),
            (f"λ, at epoch {epochs[-1]['epoch']}", list(last), [epochs[-1]] * len(last), list(last.values())),
        )
    ):
        _draw(
            grid[row, 0],
            xs,
            entries,
            {"": lambda e: e["distance"]["median"]},
            "Distance from ũ to the nearest real report",
            label,
        )
        _reference(
            grid[row, 0],
            xs,
            [epoch["distance_between_real"]["median"] for epoch in of_epoch],
            "between real reports",
            "-",
        )
        _draw(grid[row, 1], xs, entries, _SHARES, "Whose real report is nearest to ũ (share)", label)
        readings = _CHANGES | (_AGREEMENTS if "f1_u" in epochs[-1]["reading_of_negative"] else {})
        _draw(grid[row, 2], xs, entries, readings, "What the decoder says, moved from u⁻ to ũ", label)
        _draw(grid[row, 3], xs, entries, {"": lambda e: e["cos_harder"]["mean"]}, "cos(z, ũ)", label)
        for name, shown, style in (("cos_positive", "cos(z, u)", "-"), ("cos_negative", "cos(z, u⁻)", "--")):
            _reference(grid[row, 3], xs, [epoch[name]["mean"] for epoch in of_epoch], shown, style)
    for axes in grid.flat:
        axes.legend(fontsize=7, framealpha=0.7, edgecolor="none")
    for axes in grid[0]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(
    axes: Any,
    xs: Sequence[float],
    entries: Sequence[Mapping[str, Entry]],
    values: Mapping[str, Callable[[Entry], float]],
    title: str,
    label: str,
) -> None:
    for strategy in SYNTHESISED:
        for (name, of), (line, marker) in zip(values.items(), _STYLES, strict=False):
            axes.plot(
                xs,
                [of(entry[strategy]) for entry in entries],
                label=strategy + name,
                linestyle=line,
                color=_COLOURS[strategy],
                marker=marker,
                markersize=3.5,
                linewidth=1.4,
            )
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.5, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)


def _reference(axes: Any, xs: Sequence[float], values: Sequence[float], label: str, style: str) -> None:
    axes.plot(xs, values, label=label, color="#000000", linestyle=style, linewidth=1.2)
