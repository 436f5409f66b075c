"""Agreement of the rule labeler with the labels of a CSV file (such as the CheXpert labeler's), and its speed.

  python benchmarks/label_reports.py labelled.csv               columns: report or findings, and the 14 classes
  python benchmarks/label_reports.py labelled.csv --folds 10    cross-validation over the phrase tables (minutes)

Agreement on the texts that the rules were written from says little about other texts. --folds measures how much of it
depends on single texts: before a fold is labelled, every alternative of every phrase table that only improves texts of
that fold is removed. This is still optimistic: the wording of the alternatives has seen all texts, and alternatives
that no text needs stay.
"""

import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser
from modules.labels import rules as clinical_rules
from modules.labels.labeler import CLASSES, RuleLabeler, split_sentences
from modules.labels.tables import parse_labels, read_table, report_column
from modules.runtime.errors import InputError, run_entry_point

Labels = list[int | None]  # 14, in the order of CLASSES
Place = tuple[str, str | int | None, int, int]  # table, entry of it, start and end of an alternative in its pattern
_NEVER = "(?!)"
_LOOKAROUND = re.compile(r"\(\?<?[!=](?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_OPENING = re.compile(r"\((?:\?(?:[:=!]|<[=!]))?")


def f1(truth: list[Labels], ours: list[Labels], value: int, columns: list[int]) -> tuple[float, int]:
    """F1 of one label over the given classes, and its count in the file."""
    pairs = [(row[column], other[column]) for row, other in zip(truth, ours, strict=True) for column in columns]
    both = sum(pair == (value, value) for pair in pairs)
    there, here = sum(first == value for first, _ in pairs), sum(second == value for _, second in pairs)
    return (2 * both / (there + here) if there + here else float("nan")), there


def print_agreement(truth: list[Labels], ours: list[Labels]) -> None:
    """F1 by class and over all classes, of positive, negative and uncertain labels, with the file's counts."""
    print(f"{'F1 (labels in the file)':<28}{'positive':>16}{'negative':>16}{'uncertain':>16}")
    for name, columns in [(name, [index]) for index, name in enumerate(CLASSES)] + [("micro", list(range(14)))]:
        cells = (f1(truth, ours, value, columns) for value in (1, 0, -1))
        print(f"{name:<28}" + "".join(f"{score:9.3f} ({count:4d})" for score, count in cells))


def print_speed(reports: list[str]) -> None:
    """Print reports per CPU second, starting with an empty cache of sentences, and without a cache."""
    uncached = RuleLabeler()
    uncached.label_sentence = uncached._label_sentence
    for name, labeler in (("as it is", RuleLabeler()), ("without its cache of sentences", uncached)):
        start = time.process_time()
        for report in reports:
            labeler.label_report(report)
        print(f"{len(reports) / (time.process_time() - start):,.0f} reports per CPU second {name}")


def alternatives(pattern: str) -> list[tuple[int, int]]:
    """Start and end of every alternative of a regular expression, at every depth."""
    groups: list[list[int]] = [[0]]  # of each open group the start and the bars, as positions after them
    found, position = [], 0
    while position < len(pattern):
        letter = pattern[position]
        if letter == "\\":
            position += 1
        elif letter == "[":
            position = pattern.index("]", position + 2)
        elif letter == "(":
            position += len(_OPENING.match(pattern, position)[0]) - 1
            groups.append([position + 1])
        elif letter == "|":
            groups[-1].append(position + 1)
        elif letter == ")":
            found += _between(groups.pop(), position)
        position += 1
    return found + _between(groups.pop(), position)


def _between(starts: list[int], end: int) -> list[tuple[int, int]]:
    ends = [start - 1 for start in starts[1:]] + [end]
    return list(zip(starts, ends, strict=True)) if len(starts) > 1 else []


def places() -> list[Place]:
    """Every alternative of every table, and every convention as a whole."""
    found: list[Place] = []
    for table in clinical_rules.TABLES:
        value = getattr(clinical_rules, table)
        if table == "CONVENTIONS":
            found += [(table, index, 0, len(entry[1])) for index, entry in enumerate(value)]
            continue
        for key, pattern in value.items() if isinstance(value, dict) else [(None, value)]:
            found += [(table, key, start, end) for start, end in alternatives(pattern)]
    return found


def without(taken_out: list[Place]) -> RuleLabeler:
    """The labeler with these alternatives replaced by patterns that never match."""
    changed: dict[str, clinical_rules.Table] = {}
    cut: dict[tuple, list[tuple[int, int]]] = {}
    for table, key, start, end in sorted(taken_out, key=lambda place: place[2] - place[3]):  # the longest first
        spans = cut.setdefault((table, key), [])
        if not any(first <= start and end <= last for first, last in spans):
            spans.append((start, end))
    for (table, key), spans in cut.items():
        value = changed.get(table, getattr(clinical_rules, table))
        pattern = value if key is None else value[key][1] if table == "CONVENTIONS" else value[key]
        for start, end in sorted(spans, reverse=True):
            pattern = pattern[:start] + _NEVER + pattern[end:]
        if table == "CONVENTIONS":
            name, _, label = value[key]
            changed[table] = (*value[:key], (name, pattern, label), *value[key + 1 :])
        else:
            changed[table] = pattern if key is None else value | {key: pattern}
    return RuleLabeler(**changed)


def correct(truth: Labels, ours: Labels) -> int:
    """Number of classes in which two label vectors agree."""
    return sum(first == second for first, second in zip(truth, ours, strict=True))


def _loosened(place: Place) -> re.Pattern[str] | None:
    """A pattern that matches every sentence in which the alternative can; None where that is not plain."""
    table, key, start, end = place
    value = getattr(clinical_rules, table)
    pattern = (value if key is None else value[key][1] if table == "CONVENTIONS" else value[key])[start:end]
    loose = _LOOKAROUND.sub("", pattern)
    if table == "ONE_SIDE" or re.search(r"[$^]|\(\?[<!=]| and", loose):  # anchors are those of a part of the sentence
        return None
    try:
        return re.compile(loose)
    except re.error:  # deeper lookarounds than are left out
        return None


def supports(reports: list[str], truth: list[Labels]) -> dict[Place, set[int]]:
    """For each alternative, the reports whose labels get worse without it."""
    base = RuleLabeler()
    found = [correct(row, list(base.label_report(report).values())) for row, report in zip(truth, reports, strict=True)]
    sentences = [split_sentences(report) for report in reports]
    known = {sentence: base.label_sentence(sentence) for parts in sentences for sentence in parts}
    support = {}
    from tqdm import tqdm

    for place in tqdm(places(), desc="alternatives", unit="alternative"):
        labeler, pattern = without([place]), _loosened(place)
        touched = (sentence for sentence in known if pattern is None or pattern.search(sentence))
        changed = {sentence for sentence in touched if labeler.label_sentence(sentence) != known[sentence]}
        support[place] = {
            index
            for index, parts in enumerate(sentences)
            if not changed.isdisjoint(parts)
            and correct(truth[index], list(labeler.label_report(reports[index]).values())) < found[index]
        }
    return support


def cross_validate(reports: list[str], truth: list[Labels], folds: int, seed: int) -> list[Labels]:
    """Labels of each report, made with the alternatives that reports of other folds need, or that none needs."""
    support = supports(reports, truth)
    order = list(range(len(reports)))
    random.Random(seed).shuffle(order)
    labels: list[Labels] = [[] for _ in reports]
    for fold in range(folds):
        held_out = set(order[fold::folds])
        labeler = without([place for place, helped in support.items() if helped and helped <= held_out])
        for index in held_out:
            labels[index] = list(labeler.label_report(reports[index]).values())
    return labels


def main() -> None:
    """Print agreement and speed, and the cross-validated agreement if --folds is given."""
    parser = Parser(description=__doc__)
    parser.add_argument("labelled", metavar="LABELLED.csv", help="reports and their labels")
    parser.add_argument("--column", help="the column with the reports (default: report, reports or findings)")
    parser.add_argument("--folds", type=int, default=0, help="number of folds of the cross-validation (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds (default: %(default)s)")
    arguments = parser.parse_args()
    table = read_table(arguments.labelled)
    column, truth = report_column(table, arguments.column), parse_labels(table)
    if arguments.folds and not 2 <= arguments.folds <= len(truth):
        raise InputError(f"--folds {arguments.folds}: 2 to {len(truth)}, the number of reports, or 0")
    reports = [row[column] for row in table.rows]
    label: Callable[[str], dict] = RuleLabeler().label_report
    print_agreement(truth, [list(label(report).values()) for report in reports])
    print_speed(reports)
    if arguments.folds:
        labels = cross_validate(reports, truth, arguments.folds, arguments.seed)
        print(f"\n{arguments.folds} folds, seed {arguments.seed}")
        print_agreement(truth, labels)


if __name__ == "__main__":
    run_entry_point(main)
