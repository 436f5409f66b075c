"""The CSV form of structured findings, one row per finding: ``id,finding,kind,side,zone,size,severity``.

A study without findings has one row that says "No Finding". An attribute left empty is drawn at random. Columns of
attributes may be missing altogether.
"""

import csv
import io
import re
from dataclasses import asdict
from pathlib import Path

from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_text
from scripts.synthetic.findings import ATTRIBUTES, RULES, Finding, class_labels, possible_kinds

COLUMNS = ("id", "finding", *ATTRIBUTES)


def write_findings(path: Path, studies: dict[str, tuple[Finding, ...]]) -> None:
    """Write the structured truth in the form that ``read_findings`` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for study_id, findings in studies.items():
            for finding in findings or (Finding("No Finding"),):
                writer.writerow({"id": study_id, **asdict(finding)})


def write_labels(path: Path, studies: dict[str, tuple[Finding, ...]]) -> None:
    """Write id and the 14 CheXpert columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("id", *CLASSES), lineterminator="\n")
        writer.writeheader()
        for study_id, findings in studies.items():
            writer.writerow({"id": study_id, **class_labels(findings)})


def read_findings(path: str | Path) -> dict[str, tuple[Finding, ...]]:
    """Read a findings CSV: id -> its findings, in the order of the file; InputError names the line that is wrong."""
    try:
        with io.StringIO(read_text(path, MAX_ANNOTATION), newline="") as file:
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []  # of a file without a line it is read here, not before
    except OSError as error:
        raise InputError(f"--findings {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--findings {path}: not a UTF-8 CSV file ({error})") from None
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown or "id" not in columns or "finding" not in columns:
        raise InputError(
            f"--findings {path}: its columns are {', '.join(columns) or 'none'}; expected id and finding, "
            f"and any of {', '.join(ATTRIBUTES)}"
        )
    if not rows:
        raise InputError(f"--findings {path}: no rows under the header")
    studies: dict[str, list[Finding]] = {}
    normal: set[str] = set()
    for line, row in rows:
        where = f"--findings {path}, line {line}"
        if None in row:
            raise InputError(f"{where}: more cells than the header has columns")
        cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
        study_id = check_id(cells.pop("id"), where)
        parsed = _parse(cells, where)
        studies.setdefault(study_id, []).extend(parsed)
        if not parsed:
            normal.add(study_id)
        if study_id in normal and studies[study_id]:
            raise InputError(f"{where}: id {study_id!r} has both No Finding and a finding; delete one of the rows")
    return {study_id: tuple(found) for study_id, found in studies.items()}


def describe_format() -> str:
    """The values that a findings CSV may hold, for people to read."""
    lines = [
        "annotation.json: R2Gen layout; images/<id>/0.png frontal, 1.png lateral.",
        "labels.csv: the 14 CheXpert classes, 1 or 0; No Finding = none of the others, devices aside.",
        "findings.csv: what was drawn, one row per finding:",
        "",
        "  " + ",".join(COLUMNS),
        "",
        "  No Finding: a study without findings",
    ]
    for name, kinds in RULES.items():
        for kind, (_, allowed) in kinds.items():
            values = "; ".join(f"{key} {'|'.join(choices)}" for key, choices in allowed.items())
            lines.append(f"  {name}{f', kind {kind}' if kind else ''}: {values or 'no attributes'}")
    lines += [
        "",
        '"Other" are incidental findings outside the 14 classes. To change what is drawn, copy',
        "findings.csv to another place, edit the copy, and give it by --findings with another --out: a run into",
        "this folder replaces what is in it. Attributes left empty are drawn at random.",
    ]
    return "\n".join(lines) + "\n"


def check_id(study_id: str, where: str) -> str:
    """The id, if it can name a folder; else InputError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", study_id):
        raise InputError(f"{where}: id {study_id!r} cannot name a folder; use letters, digits, '.', '_' and '-'")
    return study_id


def _parse(cells: dict[str, str], where: str) -> list[Finding]:
    names = {name.lower(): name for name in ("No Finding", *RULES)}
    name = names.get(cells["finding"].lower())
    if name is None:
        raise InputError(f"{where}: unknown finding {cells['finding']!r}; known are {', '.join(names.values())}")
    given = {key: cells[key].lower() for key in ATTRIBUTES if cells[key]}
    if name == "No Finding":
        if given:
            raise InputError(f"{where}: No Finding has no {next(iter(given))}; leave it empty")
        return []
    kinds = RULES[name]
    if given.get("kind", next(iter(kinds))) not in kinds:
        known = ", ".join(filter(None, kinds)) or "none: leave it empty"
        raise InputError(f"{where}: unknown kind {given['kind']!r} of {name}; known are {known}")
    finding = Finding(name, **given)
    for key, value in given.items():
        if key != "kind" and not possible_kinds(Finding(name, kind=finding.kind, **{key: value})):
            choices = [kinds[finding.kind]] if finding.kind else list(kinds.values())
            known = dict.fromkeys(choice for _, allowed in choices for choice in allowed.get(key, ()))
            accepted = f"use {', '.join(known)}" if known else "leave it empty"
            raise InputError(f"{where}: {key} {value!r} does not go with {finding.kind or name}; {accepted}")
    if not possible_kinds(finding):
        raise InputError(f"{where}: no kind of {name} has {' and '.join(k for k in given)} together; leave one empty")
    return [finding]
