"""A study's prior: the previous study of the same patient, by date and time alone."""

import contextlib
import datetime
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def moments(texts: Sequence[str]) -> list[float | None]:
    """A number that grows with date and time for every text of one column; None for one that is not understood.

    ISO dates, 20240131, 20240131103000, 2024/01/31 and 31.01.2024, with or without a time. Of 01/02/2024 a part above
    12 anywhere in the column says which is the day; where none does, or both do, such dates are not understood. Numbers
    that are no dates count where the whole column holds such.
    """
    slashed = [match for text in texts if (match := _SLASHED.match(text.strip()))]
    firsts, seconds = (any(int(match[part]) > 12 for match in slashed) for part in (1, 2))
    formats = list(_FORMATS)
    if firsts != seconds:
        formats.append("%d/%m/%Y" if firsts else "%m/%d/%Y")
    found = [_date(text.strip(), formats) for text in texts]
    if any(date is not None for date in found):
        return found
    return [_number(text) for text in texts]


_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/\d{4}\b")
_FORMATS = ("%Y%m%d%H%M%S", "%Y/%m/%d", "%d.%m.%Y")
_TIMES = ("", " %H:%M", " %H:%M:%S")


def _date(text: str, formats: Sequence[str]) -> float | None:
    if not text or (text.isdecimal() and len(text) not in (8, 14)):
        return None
    with contextlib.suppress(ValueError):
        return _seconds(datetime.datetime.fromisoformat(text))
    for form in (day + time for day in formats for time in (("",) if "%H" in day else _TIMES)):
        with contextlib.suppress(ValueError):
            return _seconds(datetime.datetime.strptime(text, form))
    return None


def _seconds(found: datetime.datetime) -> float:
    return found.replace(tzinfo=found.tzinfo or datetime.UTC).timestamp()


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return None


def add_priors(records: Iterable[dict[str, Any]], moments: Mapping[str, float | None]) -> int:
    """Set ``prior`` of every record that has one to the id of a record of the patient's previous study; returns their
    number.

    ``moments`` are the dates of the records by id. The previous study is the latest that is earlier; studies of the
    same moment are not priors of each other, nor is one of another split. Without patient or date there is none.
    """
    by_patient: dict[tuple[Any, Any], list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for record in records:
        date = moments.get(record["id"])
        if date is not None and record.get("subject_id") not in (None, ""):
            by_patient[record["split"], record["subject_id"]].append((date, record))
    count = 0
    for own in by_patient.values():
        own.sort(key=lambda pair: pair[0])
        for date, record in own:
            study = record.get("study_id", record["id"])
            earlier = [
                (then, other) for then, other in own if then < date and other.get("study_id", other["id"]) != study
            ]
            if earlier:
                latest = earlier[-1][0]
                record["prior"] = next(other["id"] for then, other in earlier if then == latest)
                count += 1
    return count
