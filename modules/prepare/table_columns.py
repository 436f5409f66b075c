"""Which column of a table is what: given by flag, taken from a preset (a data file), or guessed from its name."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.data.report_tables import MISSING
from modules.prepare.user_tables import FILE_SPLIT, Row, cell
from modules.runtime.errors import InputError, did_you_mean

PRESETS = Path(__file__).parent / "presets"
_IN_BRACES = re.compile(r"{([^{}]+)}")
# The names by which a column is guessed, the likeliest first; only letters and digits count.
GUESSES: dict[str, tuple[str, ...]] = {
    "id": ("id", "imageid", "dicomid", "recordid", "uid", "key"),
    "study": ("studyid", "study", "studyinstanceuid", "accession", "accessionnumber", "caseid"),
    "patient": ("patientid", "patient", "subjectid", "subject", "deidpatientid", "pid", "mrn",
                "patientmrn", "medicalrecordnumber"),
    "split": ("split", "subset", "partition", "fold"),
    "image": ("imagepath", "image", "images", "imagepaths", "path", "pathtoimage", "filename", "filepath", "imagefile",
              "imagename", "file", "imageid", "dicomid"),
    "captions": ("captions",),
    "report": ("report", "reporttext", "text", "caption", "findings", "sectionfindings", "radiologyreport",
               "description"),
    "view": ("view", "viewposition", "projection", "frontallateral", "imageviewposition"),
    "language": ("language", "lang"),
    "date": ("datetime", "studydatetime", "studydate", "date", "acquisitiondate", "patientreportdateorder"),
}  # fmt: skip
SECTIONS: dict[str, tuple[str, ...]] = {
    "indication": ("indication", "sectionindication", "clinicalhistory", "history", "reasonforexam"),
    "comparison": ("comparison", "sectioncomparison"),
    "technique": ("technique", "sectiontechnique"),
    "findings": ("findings", "sectionfindings"),
    "impression": ("impression", "sectionimpression", "conclusion"),
}


@dataclass(frozen=True)
class Columns:
    """Column, or template with columns in braces, by role; how each was found; the sections; fields that are kept."""

    roles: dict[str, list[str]]
    origin: dict[str, str]  # "given", "preset", "preset, not verified", "guessed"
    sections: dict[str, list[str]]
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """The layout of a published data set."""

    name: str = ""
    title: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, list[str]] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    rows: str = ""  # the key of a JSON object under which its rows lie
    records: str = "study"
    unverified: tuple[str, ...] = ()  # roles whose columns are this project's guess
    data: dict[str, Any] = field(default_factory=dict)  # for dataset.json


def preset_names() -> list[str]:
    """The presets that there are."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def read_preset(name: str) -> Preset:
    """The preset called ``name``, empty for ""; InputError for an unknown one."""
    if not name:
        return Preset()
    if name not in preset_names():
        known = preset_names()
        raise InputError(f"--preset {name}: must be one of {', '.join(known)}{did_you_mean(name, known)}")
    content = json.loads((PRESETS / f"{name}.json").read_text(encoding="utf-8"))
    content |= {key: tuple(content[key]) for key in ("extra", "unverified") if key in content}
    return Preset(name=name, **content)


def joined_tables(tables: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several tables one after the other; a column that differs only in case, spaces and signs from one of
    an earlier table ("Patient ID", "patient_id") gets the name that it has there.
    """
    spelt: dict[str, str] = {}
    found: list[Row] = []
    for rows in tables:
        own = dict.fromkeys(name for row in rows for name in row)
        alike = Counter(map(_letters, own))  # two such columns of one table stay two
        single = {name: key for name in own if alike[key := _letters(name)] == 1}
        names = {name: spelt[key] for name, key in single.items() if spelt.get(key, name) != name}
        found += [{names.get(name, name): value for name, value in row.items()} for row in rows] if names else rows
        spelt = {_letters(name): name for name in own} | spelt
    return found


def find_columns(
    rows: Sequence[Row], given: Mapping[str, Sequence[str]], preset: Preset, *, reports: bool = True
) -> Columns:
    """The columns of ``rows``: those ``given`` by role, else the preset's, else guessed; InputError without images or
    (with ``reports``) reports, for a column that is not there, and for cells that are no texts.
    """
    known = dict.fromkeys(name for row in rows[:1000] for name in row)
    plain = {_plain(name): name for name in reversed(known)}
    roles: dict[str, list[str]] = {}
    origin: dict[str, str] = {}
    for role, names in GUESSES.items():
        if role in given:
            roles[role], origin[role] = list(given[role]), "given"
            _require(rows, known, roles[role], f"--{role}")
        elif preset.name:
            if role not in preset.columns:
                continue
            value = preset.columns[role]
            roles[role] = value if isinstance(value, list) else [value]
            origin[role] = "preset, not verified" if role in preset.unverified else "preset"
            _require(rows, known, roles[role], f"--preset {preset.name}: its {role} column; give --{role}")
        elif found := next((plain[name] for name in names if name in plain), None):
            roles[role], origin[role] = [found], "guessed"
    if "captions" in roles and "captions" not in given:
        roles.pop("report", None)
    for role in ("image", "report") if reports else ("image",):
        if role not in roles and not (role == "report" and "captions" in roles):
            raise InputError(f"no column for --{role} was found among {_listed(known)}: name it")
    for role in roles if reports else ("image",):
        for column in (name for own in roles[role] for name in template_columns(own)):
            _check_cells([cell(row, column) for row in rows[:10]], role, column)
    sections = dict(preset.sections)
    if not preset.name:
        sections = {section: [plain[name] for name in names if name in plain] for section, names in SECTIONS.items()}
    sections = {key: [name for name in names if name in known] for key, names in sections.items()}
    return Columns(roles, origin, {key: names for key, names in sections.items() if names}, preset.extra)


def _check_cells(cells: Sequence[Any], role: str, column: str) -> None:
    """InputError where cells that should be texts are bytes or objects."""
    if any(map(_holds_bytes, cells)):
        pictures = role == "image"
        what = "pictures themselves, not paths; write them into files" if pictures else "bytes, not text; decode them"
        raise InputError(f"--{role} {column}: holds {what} first")
    entries = [entry for value in cells for entry in (value if isinstance(value, list) else [value])]
    if found := next((entry for entry in entries if isinstance(entry, dict)), None):
        paths = ", ".join(f"{column}.{name}" for name in list(found)[:8])
        raise InputError(f"--{role} {column}: its cells are objects, not texts; name what is meant in them: {paths}")


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, dict):
        return any(isinstance(part, bytes) for part in value.values())
    return isinstance(value, bytes) or (isinstance(value, list) and any(map(_holds_bytes, value)))


def header_names(given: Mapping[str, Sequence[str]], preset: Preset) -> set[str]:
    """Names by which the first line of a table is known to be its header: those ``given``, and the preset's."""
    own = [name for value in preset.columns.values() for name in ([value] if isinstance(value, str) else value)]
    columns = [name for value in given.values() for name in value] + own
    return {name for column in columns for name in template_columns(column)}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold()) or name  # of any alphabet, unlike _plain


def _require(rows: Sequence[Row], known: Collection[str], columns: Sequence[str], what: str) -> None:
    for column in (name for own in columns for name in template_columns(own)):
        if column in known or any(cell(row, column) is not None for row in rows[:1000]):
            continue
        raise InputError(
            f"{what}: there is no column {column!r}{did_you_mean(column, known)}; the columns are {_listed(known)}"
        )


def _listed(known: Collection[str]) -> str:
    return ", ".join(repr(name) for name in known if name != FILE_SPLIT)


def template_columns(column: str) -> list[str]:
    """The columns in braces of a template such as "{folder}/{name}.png"; a plain column's own name.

    InputError for braces that do not pair.
    """
    if "{" not in column:
        return [column]
    if set("{}") & set(_IN_BRACES.sub("", column)):
        raise InputError(f"{column!r}: not a template of columns in braces, such as {{folder}}/{{name}}.png")
    return _IN_BRACES.findall(column)


def texts(row: Row, columns: Sequence[str], *, keep_empty: bool = False) -> list[str]:
    """The cells of ``columns`` as texts, lists taken apart; empty and missing ones are left out, or kept as ""."""
    found: list[str] = []
    for column in columns:
        if "{" in column:
            parts = {name: "".join(texts(row, [name])[:1]) for name in template_columns(column)}
            value: Any = _IN_BRACES.sub(lambda match, parts=parts: parts[match[1]], column)
        else:
            value = cell(row, column)
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            text = _text(entry)
            if text or keep_empty:
                found.append(text)
    return found


def _text(value: Any) -> str:
    if value is None or isinstance(value, (dict, list)) or value != value:  # NaN
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return "" if text.lower() in MISSING else text
