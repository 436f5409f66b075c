"""A study's prior: the previous study of the same patient, by date and time alone."""

import datetime
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any


def moment(text: str) -> float | None:
    """A number that grows with date and time, of an ISO date or of digits (20240131, or a running number)."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return found.replace(tzinfo=found.tzinfo or datetime.UTC).timestamp()


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
