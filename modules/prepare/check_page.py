"""The text that scripts/check_data.py prints: statistics as tables, then every problem under its kind."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from modules.runtime.errors import Problem, one_line

_VIEWS = {
    "studies": "studies",
    "images": "images",
    "distinct_study_ids": "different study ids",
    "studies_with_fewer_views": "studies with fewer views than are read",
    "studies_with_more_views": "studies with more views than are read",
    "with_negative": "studies with a negative of their own",
}


def render_statistics(found: Mapping[str, Any], max_seq_length: int, image_size: int) -> str:
    """Tables by split, then figures of the whole data set; parts that could not be read are left out."""
    lines = ["SYNTHETIC data: the images are drawings"] if found.get("synthetic") else []
    if views := found.get("views"):
        rows = [(label, [f"{views[split][key]:,}" for split in views]) for key, label in _VIEWS.items()]
        lines += _table(list(views), rows + _report_rows(found, list(views), max_seq_length))
    if words := found.get("vocabulary"):
        lines.append(
            f"vocabulary: {words['vocabulary']:,} tokens with <unk>, of {words['different_words']:,} words of "
            f"the training reports; {words['rarer_than_threshold']:,} are rarer than --threshold"
        )
    if advice := found.get("advice"):
        lines.append(advice)
    if images := found.get("images"):
        lines += _image_lines(images, image_size)
    if detections := found.get("detections"):
        lines.append(
            f"detection features: {detections['images']:,} images, {detections['per_image']:.1f} regions "
            f"each, {detections['width']:,} wide"
        )
    if index := found.get("index"):
        lines.append(
            f"index: {index['studies']:,} studies with up to {index['neighbours']} neighbours, "
            f"{index['studies_without_neighbour']:,} without any"
        )
    if labels := found.get("labels"):
        lacking = ", ".join(f"{split} {count:,}" for split, count in labels["without_labels"].items())
        lines.append(f"labels: {labels['rows']:,} rows; studies without labels: {lacking}")
        lines.append("  positive: " + ", ".join(f"{name} {count:,}" for name, count in labels["positives"].items()))
    return "\n".join(lines)


def _report_rows(found: Mapping[str, Any], splits: Sequence[str], max_seq_length: int) -> list[tuple[str, list[str]]]:
    reports = found.get("reports")
    if not reports:
        return []
    shared = found["text_shared_with_train"]

    def row(label, cell):
        return label, [cell(reports[split]) if reports[split]["length_quantiles"] else "–" for split in splits]

    return [
        row("tokens of a report, median", lambda part: f"{part['length_quantiles'][3]:,}"),
        row("  95 % have at most", lambda part: f"{part['length_quantiles'][5]:,}"),
        row("  the longest has", lambda part: f"{part['length_quantiles'][6]:,}"),
        row(f"longer than --max_seq_length {max_seq_length}", lambda part: f"{part['longer_than_max_seq_length']:,}"),
        row("  share of all tokens cut", lambda part: _share(part["tokens_cut"], part["tokens"])),
        row("share of tokens that become <unk>", lambda part: _share(part["tokens_unknown"], part["tokens"])),
        row("different reports after cleaning", lambda part: f"{part['different_reports']:,}"),
        row("reports that share their text", lambda part: f"{part['sharing_their_text']:,}"),
        row("  the commonest report", lambda part: f"{part['commonest_report']:,}"),
        (
            "reports with the text of a training report",
            [f"{shared[split]:,}" if split in shared else "–" for split in splits],
        ),
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%}"


def _image_lines(images: Mapping[str, Any], image_size: int) -> list[str]:
    modes = ", ".join(f"{count:,} {'grey' if mode == 'L' else 'colour'}" for mode, count in images["modes"].items())
    lines = [f"images: {images['readable']:,} can be read ({modes or 'none'})"]
    if images["readable"]:
        width, height = images["width_quantiles"], images["height_quantiles"]
        sizes = ", ".join(f"{size} ({count:,})" for size, count in images["commonest_sizes"].items())
        lines += [
            f"  width {width[0]:,} to {width[-1]:,}, median {width[3]:,}; height {height[0]:,} to "
            f"{height[-1]:,}, median {height[3]:,}; {images['different_sizes']:,} sizes, the commonest {sizes}",
            f"  {images['smaller_than_image_size']:,} have a side shorter than --image_size {image_size}",
        ]
    return lines


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    first = max(len(label) for label, _ in rows)
    widths = [max(len(head), *(len(cells[column]) for _, cells in rows)) for column, head in enumerate(heads)]

    def line(label, cells):
        return f"{label:<{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    return [line("", heads), *(line(label, cells) for label, cells in rows)]


def render_problems(problems: Sequence[Problem], per_kind: int) -> str:
    """Every problem on a line under its kind, or the first ``per_kind`` of each; the commonest kind comes first."""
    if not problems:
        return "no problem found"
    lines = []
    for kind, count in Counter(problem.kind for problem in problems).most_common():
        lines.append(f"{kind}: {count:,}")
        messages = [one_line(problem.message) for problem in problems if problem.kind == kind]
        shown = messages[:per_kind] if per_kind > 0 else messages
        lines += [f"  {message}" for message in shown]
        if len(shown) < count:
            lines.append(f"  and {count - len(shown):,} more")
    kinds = len({problem.kind for problem in problems})
    return "\n".join([*lines, f"{len(problems):,} problem(s) of {kinds} kind(s)"])
