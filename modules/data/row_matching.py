"""Which rows of two tables of reports belong together: by ids where both have them, else by their order.

Ids are known by the name of their column or by their values: a column that tells rows apart and has the same values in
both files. How rows were joined is said on stderr where that is not plain.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from modules.data.report_tables import ID_COLUMNS, MISSING, TEXT_NAMES, Table, plain
from modules.runtime.errors import InputError

# What columns of ids are called besides ID_COLUMNS; "covid" and "fluid" are no ids.
_OWNERS = "study|subject|patient|image|dicom|case|exam|report|file|sample|scan|series|accession|.*instance"
_ID_NAME = re.compile(
    rf"(?:.*[ ._-])?u?id|(?:{_OWNERS})u?id|.*(?:path|file|filename|accession)(?:[ _-]?(?:number|no\.?))?|"
    r"image|study|case|exam|key|name|image[ _-]?(?:index|name)"
)
_ROW_NUMBERS = re.compile(r"(?:index|unnamed: .*|no\.?|nr\.?|row|#)?")  # of pandas ("" too) and of spreadsheets
# Columns in which paired rows must agree; others, such as run_id, may tell of the file rather than of the study.
_SAME_ON_BOTH = re.compile(r"id|image_path|accession|(?:study|subject|patient|image|dicom|case)[ _-]?(?:u?id)?")
_NAMED, _OTHER, _NUMBERS = range(3)  # kinds of columns, the likeliest ids first
_MISSING = MISSING | {""}
_FEW = 3  # rows of which two columns of labels may have the same values by chance


@dataclass(frozen=True, eq=False)
class _Column:
    """A column without texts; ``distinct`` are its values where each row has its own, else None."""

    name: str
    kind: int
    values: list[str]
    distinct: frozenset[str] | None

    @property
    def varies(self) -> bool:
        """Whether it may tell rows apart; a constant run_id cannot, a constant id should have."""
        return self.name in ID_COLUMNS or len(self.values) == 1 or len(set(self.values)) > 1


_Pair = tuple[_Column, _Column]


def match_rows(references: Table, hypotheses: Table) -> Table:
    """The hypotheses in the order of ``matching_rows``; InputError as there."""
    rows = matching_rows(references, hypotheses)
    return Table(hypotheses.path, hypotheses.columns, [hypotheses.rows[row] for row in rows])


def matching_rows(references: Table, hypotheses: Table) -> list[int]:
    """The hypotheses' row for each of the references': by ids where both have a column of these, else row by row.

    InputError where ids are not the same on both sides, where a file has one twice, where row by row the numbers
    differ, or where paired rows contradict each other in another column of ids.
    """
    for table in (references, hypotheses):
        if not table.rows:
            raise InputError(f"{table.path}: no rows below the header; at least one report is needed")
    columns, others = _columns(references), _columns(hypotheses)
    same = _same_values(columns, others)
    if pair := _choose(columns, others, same):
        rows = _rows_by(pair, references.path, hypotheses.path)
        _say_pair(pair, references.path, hypotheses.path)
    else:
        rows = _row_by_row(references, hypotheses, columns, others)
    by_name = [
        (a, b)
        for a in columns
        for b in others
        if a.name == b.name and _SAME_ON_BOTH.fullmatch(a.name) and not (pair and (a is pair[0] or b is pair[1]))
    ]
    for pairs, agree in ((by_name, _may_be_one), ([pair for pair in same if _binds(pair)], str.__eq__)):
        for column, other in pairs:
            _check_agreement(column, other, rows, agree, (references.path, hypotheses.path))
    return rows


def _columns(table: Table) -> list[_Column]:
    """The columns that may be ids: ID_COLUMNS, others that are called so, the rest, and row numbers last."""
    found: dict[str, _Column] = {}
    for place, title in enumerate(table.columns):
        name = plain(title)
        values = [row[place].strip().replace("\\", "/") for row in table.rows]
        if name in TEXT_NAMES or name in found or not any(values):
            continue
        different = frozenset(values)
        apart = len(different) == len(values) and _MISSING.isdisjoint(map(str.lower, different))
        is_named = name in ID_COLUMNS or _ID_NAME.fullmatch(name)
        kind = _NUMBERS if _ROW_NUMBERS.fullmatch(name) else _NAMED if is_named else _OTHER
        found[name] = _Column(name, kind, values, different if apart else None)
    first = {name: rank for rank, name in enumerate(ID_COLUMNS)}
    return sorted(found.values(), key=lambda column: (column.kind, first.get(column.name, len(first))))


def _same_values(columns: Sequence[_Column], others: Sequence[_Column]) -> list[_Pair]:
    """Pairs of columns with the same values, each once: first those that are called as ids are, and alike."""
    pairs = [(a, b) for a in columns for b in others if a.distinct and a.distinct == b.distinct]
    found = [
        (a, b)
        for a, b in pairs
        if (len(a.values) > _FEW or _OTHER not in (a.kind, b.kind))
        and (a.name == b.name or a.kind == b.kind == _NAMED or not _counts_rows(a))
    ]
    return sorted(found, key=lambda pair: (pair[0].kind + pair[1].kind, pair[0].name != pair[1].name))


def _counts_rows(column: _Column) -> bool:
    """Whether its values are 0, 1, 2, ... or 1, 2, 3, ..., which any two files' have in common."""
    count = len(column.values)
    return column.distinct in ({str(row) for row in range(start, start + count)} for start in (0, 1))


def _binds(pair: _Pair) -> bool:
    """Whether rows that differ in these columns of the same values are of different studies for certain."""
    a, b = pair
    if _NUMBERS in (a.kind, b.kind):
        return False
    return not _counts_rows(a) or (a.name == b.name and a.kind == _NAMED)


def _choose(columns: Sequence[_Column], others: Sequence[_Column], same: Sequence[_Pair]) -> _Pair | None:
    """The columns to join by, or whose fault is to be named; None for row by row."""
    best = same[0] if same else None
    if best and best[0].kind == best[1].kind == _NAMED:
        return best
    numbers = best if best and best[0].kind == best[1].kind == _NUMBERS else None
    named, counterparts = ([c for c in side if c.kind == _NAMED and c.varies] for side in (columns, others))
    shared = [(a, b) for a in named for b in counterparts if a.name == b.name]
    apart = next(((a, b) for a, b in shared if a.distinct and b.distinct), None)
    if apart and (best is None or best is numbers or _overlap(apart)):
        return apart
    if best and not numbers:
        return best
    firsts = (named[0], counterparts[0]) if named and counterparts else None
    if numbers and (shared or firsts is None or not _overlap(firsts)):
        return numbers
    if shared:
        return None if shared[0][0].values == shared[0][1].values else shared[0]
    both_numbered = ((a, b) for a in columns for b in others if a.name == b.name and a.kind == _NUMBERS)
    return firsts or next(((a, b) for a, b in both_numbered if a.distinct and b.distinct), None)


def _overlap(pair: _Pair) -> bool:
    return not set(pair[0].values).isdisjoint(pair[1].values)


def _rows_by(pair: _Pair, path: str, other_path: str) -> list[int]:
    ids, others = pair[0].values, pair[1].values
    for values, where in ((ids, path), (others, other_path)):
        commonest, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise InputError(f"{where}: id {commonest} is in {times} rows")
    hint = _hint(ids, others)
    if pair[0].name != pair[1].name:
        hint += (
            f"; ids are {pair[0].name!r} of {path} and {pair[1].name!r} of {other_path}: rename or remove what is none"
        )
    for here, there, where in ((ids, others, other_path), (others, ids, path)):
        if missing := sorted(set(here) - set(there)):
            raise InputError(f"{where}: no row with id {missing[0]} ({len(missing)} are missing){hint}")
    places = {identity: row for row, identity in enumerate(others)}
    return [places[identity] for identity in ids]


def _hint(ids: list[str], others: list[str]) -> str:
    """Why ids differ, where they are the same numbers written in two ways."""
    try:
        same = sorted(map(float, ids)) == sorted(map(float, others))
    except ValueError:
        return ""
    return "; the ids are the same numbers, written otherwise (001, 1 or 1.0): export them as text" if same else ""


def _row_by_row(
    references: Table, hypotheses: Table, columns: Sequence[_Column], others: Sequence[_Column]
) -> list[int]:
    if len(references.rows) != len(hypotheses.rows):
        raise InputError(
            f"{references.path} has {len(references.rows)} rows and {hypotheses.path} {len(hypotheses.rows)}: "
            f"without a column of ids ({', '.join(ID_COLUMNS)}) in both they must be as many, in the same order"
        )
    sides = ((references.path, columns), (hypotheses.path, others))
    with_ids = [path for path, side in sides if any(c.kind == _NAMED and c.varies for c in side)]
    reason = {
        0: f"neither {references.path} nor {hypotheses.path} has a column of ids",
        1: f"only {with_ids[0]} has a column of ids" if with_ids else "",
        2: f"no column tells the rows of {references.path} and of {hypotheses.path} apart",
    }
    _say(f"{reason[len(with_ids)]}: the two files are compared row by row")
    return list(range(len(hypotheses.rows)))


def _check_agreement(column: _Column, other: _Column, rows: Sequence[int], agree, paths: tuple[str, str]) -> None:
    for row, paired in enumerate(rows):
        here, there = column.values[row], other.values[paired]
        if not agree(here, there) and _MISSING.isdisjoint((here.lower(), there.lower())):
            raise InputError(
                f"{paths[1]}: row {paired + 1} goes with row {row + 1} of {paths[0]} by the other "
                f"columns of ids, but its {other.name} is {there[:80]}, not {here[:80]}; correct or remove one of them"
            )


def _may_be_one(here: str, there: str) -> bool:
    """Whether two spellings may be of one id: 50414267.0 is 50414267, folders of paths differ, lists have one alike."""
    return here == there or not _bare(here).isdisjoint(_bare(there))


def _bare(identity: str) -> set[str]:
    several = "\n" in identity or identity.startswith("[")  # a list of paths, as JSON has it or as Python writes it
    parts = [part for part in re.split(r"['\",\n\[\]]+\s*", identity) if part] if several else [identity]
    numbers = (re.fullmatch(r"0*(\d+)(?:\.0*)?", part) for part in parts)
    return {number[1] if number else part.rpartition("/")[2] for number, part in zip(numbers, parts, strict=True)}


def _say_pair(pair: _Pair, path: str, other_path: str) -> None:
    a, b = pair
    if a.kind == b.kind == _NUMBERS:
        _say(f"{path} and {other_path} are joined by their row numbers (column {a.name!r})")
    elif a.name != b.name:
        _say(f"{path} and {other_path} are joined by {a.name!r} of the one and {b.name!r} of the other")


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
