"""Reads MIMIC-CXR as PhysioNet publishes it: the tables of MIMIC-CXR-JPG, and reports with their sections."""

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from modules.labels.rules import CLASSES
from modules.labels.sentences import count_slips
from modules.labels.tables import Table, parse_labels
from modules.prepare.archives import is_archive, read_files
from modules.prepare.priors import moments
from modules.runtime.errors import InputError
from modules.runtime.input_files import open_regular

SPLIT_NAMES = {"train": "train", "validate": "val", "test": "test"}
MAX_REPORT = 2**20  # bytes
SUFFIXES = (".jpg", ".png", ".dcm")
_MAX_TABLE = 2**30  # bytes, unpacked; the metadata have some 60 million
_READERS = 16  # threads: reading small files from a network file system is mostly waiting


@dataclass(frozen=True)
class MimicImage:
    """One radiograph; ``view`` is "PA", "AP", "LATERAL", ..., or "" where the metadata do not say."""

    dicom_id: str
    study_id: str
    subject_id: str
    split: str  # train, val, test
    view: str
    moment: float | None = None  # of the study: grows with date and time; None where they are not known

    @property
    def folder(self) -> str:
        """Folder of the study in every tree of MIMIC-CXR, such as p10/p10000032/s50414267."""
        return f"p{self.subject_id[:2]}/p{self.subject_id}/s{self.study_id}"


def find_table(folder: Path, kind: str) -> Path | None:
    """Return mimic-cxr-2.0.0-``kind``.csv.gz in ``folder``, of any 2.x version, unpacked or not, or None."""
    found = (path for ending in ("csv", "csv.gz") for path in folder.glob(f"mimic-cxr-2.*-{kind}.{ending}"))
    return max(found, default=None)


def read_images(folder: Path) -> list[MimicImage]:
    """Return all images of the split table, in its order, with their views from the metadata table.

    InputError for tables that are missing, unreadable or hold unexpected values.
    """
    paths = {kind: find_table(folder, kind) for kind in ("split", "metadata")}
    for kind, path in paths.items():
        if path is None:
            raise InputError(f"--tables {folder}: no mimic-cxr-2.0.0-{kind}.csv.gz there (it comes with MIMIC-CXR-JPG)")
    views, times = {}, {}
    for row in _rows(paths["metadata"], "dicom_id", "ViewPosition"):
        views[row["dicom_id"]] = row["ViewPosition"].strip().upper()
        times[row["dicom_id"]] = tuple((row.get(name) or "").strip() for name in ("StudyDate", "StudyTime"))
    known_moments = dict(zip(times, _moments(paths["metadata"], list(times.values())), strict=True))
    images = {}
    for row in _rows(paths["split"], "dicom_id", "study_id", "subject_id", "split"):
        identity, study, subject = row["dicom_id"], row["study_id"], row["subject_id"]
        if not (
            re.fullmatch(r"[0-9a-f-]{4,64}", identity)
            and re.fullmatch(r"\d{4,12}", study)
            and re.fullmatch(r"\d{4,12}", subject)
            and row["split"] in SPLIT_NAMES
        ):
            raise InputError(
                f"{paths['split']}: {identity[:64]!r}, {study[:12]!r}, {subject[:12]!r}, "
                f"{row['split'][:12]!r}: expected an image, a study, a patient and one of "
                f"{', '.join(SPLIT_NAMES)}"
            )
        if identity in images:
            raise InputError(f"{paths['split']}: image {identity} occurs twice")
        known = views.get(identity, ""), known_moments.get(identity)
        images[identity] = MimicImage(identity, study, subject, SPLIT_NAMES[row["split"]], *known)
    if not images:
        raise InputError(f"{paths['split']}: has no rows")
    return list(images.values())


def _moments(path: Path, times: Sequence[tuple[str, str]]) -> list[float | None]:
    """A number for each (StudyDate, StudyTime) that grows with both; a warning says how many dates are not understood.

    Spreadsheets and pandas write 21800505 and 93000.5 as 21800505.0, 2180-05-05 and 09:30:00.
    """
    days = moments([date.removesuffix(".0") for date, _ in times])
    if unread := sum(day is None and bool(date) for (date, _), day in zip(times, days, strict=True)):
        print(
            f"warning: {path}: {unread:,} of {len(times):,} values of StudyDate are not understood, and their studies "
            "have no prior (write them as 21800131 or 2180-01-31)",
            file=sys.stderr,
        )
    clocks = [re.fullmatch(r"(\d\d)(\d\d)(\d\d)", _digits(time)) for _, time in times]
    seconds = [3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3]) if clock else 0 for clock in clocks]
    return [None if day is None else day + second for day, second in zip(days, seconds, strict=True)]


def _digits(time: str) -> str:
    return time.partition(".")[0].replace(":", "").zfill(6)


def read_chexpert(folder: Path) -> list[list[str]]:
    """Return rows of study id and the 14 labels in the order of CLASSES ("1", "0", "-1", "").

    InputError where the file is missing.
    """
    path = find_table(folder, "chexpert")
    if path is None:
        raise InputError(f"--tables {folder}: no mimic-cxr-2.0.0-chexpert.csv.gz there, which --labels_out needs")
    rows = list(_rows(path, "study_id"))
    columns = list(rows[0]) if rows else []
    labels = parse_labels(Table(str(path), columns, [[row[column] or "" for column in columns] for row in rows]))
    return [
        [row["study_id"], *("" if label is None else str(label) for label in own)]
        for row, own in zip(rows, labels, strict=True)
    ]


def _rows(path: Path, *columns: str) -> Iterator[dict[str, str]]:
    try:
        with open_regular(path) as plain:
            file = gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
            content = file.read(_MAX_TABLE + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(content) > _MAX_TABLE:
        raise InputError(f"{path}: unpacks to more than {_MAX_TABLE} bytes, which no table of MIMIC-CXR does")
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace"), newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; the columns are {', '.join(reader.fieldnames or ['none'])}"
        )
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                raise InputError(f"{path}: row {number} does not have as many cells as the header")
            yield row
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV after row {number}: {error}") from error


def find_tree(folder: Path) -> Path:
    """Return the folder of p10, p11, ...: ``folder`` itself, or its subfolder in PhysioNet's downloads.

    InputError where there is neither.
    """
    for place in ("files", "", "mimic-cxr-reports/files", "mimic-cxr-reports"):
        if any((folder / place).glob("p[0-9][0-9]")):
            return folder / place
    raise InputError(f"{folder}: no folders p10, p11, ... there, nor in {folder.name}/files: not a tree of MIMIC-CXR")


def read_reports(source: Path, studies: Sequence[MimicImage]) -> Iterator[tuple[str, str]]:
    """Yield (study id, text) of the reports in mimic-cxr-reports.zip or in a tree.

    ``studies``: one image of each wanted study. Studies without a report are skipped.
    """
    if source.exists() and not is_archive(source):
        tree = find_tree(source)
        with ThreadPoolExecutor(_READERS) as pool:
            texts = pool.map(_read_text, (tree / f"{image.folder}.txt" for image in studies))
            for image, text in zip(studies, texts, strict=True):
                if text is not None:
                    yield image.study_id, text
        return
    wanted = {image.study_id for image in studies}
    for name, read in read_files(source, ".txt", MAX_REPORT):
        study = re.search(r"(?:^|/)s(\d+)\.txt$", name)
        if study and study[1] in wanted:
            yield study[1], _decoded(read())


def _read_text(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            return _decoded(file.read(MAX_REPORT))
    except OSError:
        return None


def _decoded(content: bytes) -> str:
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def find_suffix(tree: Path, images: Sequence[MimicImage]) -> str:
    """Return the file extension of the first image found in a tree; InputError where there is none."""
    for image in images:
        for suffix in SUFFIXES:
            if (tree / image.folder / f"{image.dicom_id}{suffix}").is_file():
                return suffix
    raise InputError(
        f"--images {tree}: none of the {len(images)} images is there, e.g. {images[0].folder}/{images[0].dicom_id}.jpg"
    )


def label_columns() -> list[str]:
    """Return the header of the label table."""
    return ["study_id", *CLASSES]


# ---- sections of a report

SECTIONS = ("findings", "impression", "both")
# A header's name and what ends it. Without a colon, only the names of sections themselves are headers.
_NAME = r"(?P<name>[A-Za-z][A-Za-z0-9 \t/,&()'.#-]{0,70}?)"
_AT_LINE_START = re.compile(rf"^[ \t]*{_NAME}[ \t]*(?P<end>(?<=[A-Za-z)]):+|:+(?!\d)|;|[ \t]-+[ \t]|$)", re.MULTILINE)
_IN_A_LINE = re.compile(rf"(?<=[.!?])[ \t]+{_NAME}[ \t]*(?P<end>(?<=[A-Za-z)]):+|(?::+|;)(?!\d))")
_WITHOUT_END = re.compile(
    r"^[ \t]*(?P<name>(?:[A-Z]{3,10}[ \t])?[A-Z]{6,16})(?P<end>[ \t]+)(?![ \t])(?=[^\n]*[a-z])", re.MULTILINE
)
_SECTION_WORDS = (
    "FINDINGS", "FINDING", "IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "COMPARISON", "COMPARISONS",
    "INDICATION", "INDICATIONS", "TECHNIQUE", "TECHNIQUES", "EXAMINATION", "EXAMINATIONS", "HISTORY", "CLINICAL",
    "RECOMMENDATION", "RECOMMENDATIONS", "NOTIFICATION", "NOTIFICATIONS", "ADDENDUM", "PROCEDURE",
)  # fmt: skip
_RESULT = r"(?:FINAL )?(?:FINDINGS?|IMPRESSIONS?|CONCLUSIONS?)"
# The first kind that fits a header's whole name, in capitals and spelt as above, decides.
_KINDS = (
    ("both", re.compile(rf"{_RESULT}(?: ?(?:AND|&|/|,|-) ?| ){_RESULT}")),
    ("findings", re.compile(r"(?:FINAL |CHEST |REFERENCE |TECHNIQUES? AND )?FINDINGS?(?: .*)?|(?:MAIN )?REPORT")),
    ("impression", re.compile(r"(?:FINAL |CORRECTED |THE )?IMPRESSIONS?(?: .*)?|CONCLUSIONS?|SUMMARY|OPINION")),
    (
        "other",
        re.compile(
            r"(?:INDICATIONS?|COMPAR(?:ISONS?|E)|TECHNIQUES?|RECOMMENDATIONS?|NOTIFICATIONS?|REASONS?|CLINICAL|HISTORY"
            r"|WET ?READ|PROCEDURES?|(?:FINAL )?ADDENDUM|AMENDMENT|CORRECTION|STUDY|DATE|CONTRAST|DOSE|TYPE OF"
            r"|ATTESTATION|DIAGNOSIS|ACCESSION|COMMENTS?|PFI|PROVISIONAL|PRELIMINARY)\b.*"
            r"|EXAM(?:INATION)?S?(?: .*)?|.*\bHISTORY|.*\bINDICATION|(?:PRIOR|REFERENCE)\b.*|.*\bWET READ"
        ),
    ),
    # "PA AND LATERAL VIEWS OF THE CHEST:" introduces the findings of reports that have no such header.
    (
        "views",
        re.compile(
            r".*\b(?:CHEST\w*|VIEWS?|RADIOGRAPHS?|FILMS?|X-?RAYS?|CXR|PORTABLE|UPRIGHT|FRONTAL"
            r"|LAT(?:ERAL)?|RIBS?|BONE WINDOWS?)\b.*"
        ),
    ),
)
# What the other sections say, by their headers' names.
_CONTEXT = (
    ("indication", re.compile(r"^(?:INDICATION|REASON|CLINICAL|HISTORY)|(?:HISTORY|INDICATION)$")),
    ("comparison", re.compile(r"^COMPAR")),
    ("technique", re.compile(r"^(?:TECHNIQUE|PROCEDURE)")),
)
# The names that are headers in small letters or without a colon too.
_SECTION_NAME = re.compile(
    rf"{_RESULT}(?: ?(?:AND|&|/) ?{_RESULT})?|(?:CLINICAL |PATIENT )?(?:INDICATIONS?|HISTORY)|CLINICAL INFORMATION"
    r"|COMPARISONS?|TECHNIQUES?|EXAM(?:INATION)?|STUDY|PROCEDURE|REASON FOR (?:THE )?EXAM(?:INATION)?|WET READ"
    r"|RECOMMENDATIONS?|NOTIFICATIONS?|(?:FINAL )?ADDENDUM"
)
_FINAL_REPORT = re.compile(r"^[^\S\n]*final report\b", re.IGNORECASE | re.MULTILINE)
_LINE = re.compile(r"_{8,}|-{8,}|={8,}")  # "___" is a removed word, more of them a line across the page
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")
# Why it is undecidable where a section begins or ends.
NO_HEADER = "text without a header"
INSIDE = "a section's name inside a paragraph, taken as text"
SEVERAL = "several final reports"
TECHNIQUE = "technique and findings under one header"


@dataclass(frozen=True)
class Sections:
    """The texts of a report by the kind of their headers, and what is undecidable about each section."""

    texts: dict[str, tuple[str, ...]]
    doubts: dict[str, tuple[str, ...]]

    def doubts_about(self, section: str) -> tuple[str, ...]:
        """What is undecidable about ``section``, each reason once."""
        parts = ("findings", "impression") if section == "both" else (section,)
        return tuple(dict.fromkeys(doubt for part in parts for doubt in self.doubts[part]))

    @property
    def named(self) -> dict[str, str]:
        """indication, comparison, technique, findings and impression, as far as there are any, on one line each."""
        found = {name: " ".join(self.texts.get(name, ())) for name in (*dict(_CONTEXT), "impression")}
        found |= {"findings": self.text("findings")}
        return {name: text for name, text in found.items() if text}

    def text(self, section: str) -> str:
        """``section`` ("findings", "impression" or "both", findings first) on one line; "" without it.

        A section that occurs more than once is joined.
        """
        kinds = {"findings": ("findings",), "impression": ("impression",), "both": ("findings", "impression")}
        return " ".join(text for kind in (*kinds[section], "both") for text in self.texts[kind])


@dataclass(frozen=True)
class _Header:
    start: int
    end: int
    kind: str
    name: str  # as it should be spelt, in capitals
    letters: str  # "upper", "title" or "lower"
    has_colon: bool
    starts_line: bool
    follows: str  # "paragraph", "sentence", or "" inside one


def extract_section(text: str, section: str) -> str:
    """``section`` ("findings", "impression" or "both") of a MIMIC-CXR report on one line; "" without it."""
    return read_sections(text).text(section)


def read_sections(text: str) -> Sections:
    """Find the sections of a MIMIC-CXR report, which is plain text with headers of many wordings and spellings.

    The final report is read, not a wet read or an addendum. Headers of no known kind ("LUNGS:") are text.
    """
    blocks = _FINAL_REPORT.split(text.replace("\r\n", "\n").replace("\r", "\n"))
    read = [_read_block(_LINE.sub(" ", block)) for block in blocks[1:] or blocks]
    having = {
        kind: [index for index, (texts, _) in enumerate(read) if texts[kind] or texts["both"]]
        for kind in ("findings", "impression")
    }
    main = max(having["findings"] or having["impression"], default=len(read) - 1)
    texts, doubts = (dict(part) for part in read[main])
    if having["impression"] and not (texts["impression"] or texts["both"]):
        texts["impression"] = read[having["impression"][-1]][0]["impression"]
    if len({*having["findings"], *having["impression"]}) > 1:
        doubts = {section: [*own, SEVERAL] for section, own in doubts.items()}
    return Sections(
        {kind: tuple(own) for kind, own in texts.items()}, {section: tuple(own) for section, own in doubts.items()}
    )


def _read_block(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The texts under each kind of header, those without a letter left out, and the doubts about each section."""
    headers, inside = _headers(text)
    texts: dict[str, list[str]] = {kind: [] for kind in (*dict(_KINDS), *dict(_CONTEXT))}
    doubts: dict[str, list[str]] = {"findings": [], "impression": []}
    loose = _is_prose(text[: headers[0].start] if headers else text)
    ends = [header.start for header in headers[1:]] + [len(text)]
    for header, end in zip(headers, ends, strict=False):
        content = text[header.end : end]
        if header.kind == "other":  # of such a section the first paragraph is its own
            loose = loose or any(map(_is_prose, _PARAGRAPH.split(content.strip())[1:]))
        if re.search(r"[^\W_]", content):
            texts[header.kind].append(" ".join(content.split()))
            name = next((name for name, pattern in _CONTEXT if pattern.search(header.name)), None)
            if header.kind == "other" and name:  # its first paragraph: what follows may be findings without a header
                texts[name].append(" ".join(_PARAGRAPH.split(content.strip())[0].split()))
        sections = {"both": ("findings", "impression"), "views": ("findings",)}.get(header.kind, (header.kind,))
        for section in sections if header.kind != "other" else ():
            if any(header.end <= name.start < end for name in inside):
                doubts[section].append(INSIDE)
            if header.name.startswith("TECHNIQUE"):
                doubts[section].append(TECHNIQUE)
    texts["findings"] = texts["findings"] or texts["views"]
    if loose and not (texts["findings"] or texts["both"]):
        doubts["findings"].append(NO_HEADER)
        doubts["impression"] += [] if texts["impression"] else [NO_HEADER]
    return texts, doubts


def _is_prose(text: str) -> bool:
    """Whether there are three words, and a small letter before the end of a sentence."""
    end = max(map(text.rfind, ".!?"))
    return len(text.split(maxsplit=2)) > 2 and re.search("[a-z]", text[: end + 1]) is not None


def _headers(text: str) -> tuple[list[_Header], list[_Header]]:
    """The headers of a report in order, and the names of sections that are not headers where they are."""
    found: dict[int, _Header] = {}
    for pattern in (_AT_LINE_START, _WITHOUT_END, _IN_A_LINE):
        for match in pattern.finditer(text):
            header = _as_header(text, match, pattern is not _IN_A_LINE)
            if header:
                found.setdefault(match.start("name"), header)
    names = [found[start] for start in sorted(found)]
    letters = {name.letters for name in names if name.starts_line and name.kind != "views"}
    style = next((kind for kind in ("upper", "title", "lower") if kind in letters), "upper")
    at_lines = {name.kind for name in names if name.starts_line}
    headers: list[_Header] = []
    inside: list[_Header] = []
    for name in names:
        result = any(header.kind not in ("other", "views") for header in headers)
        if name.letters == "upper":
            counts = not (result and name.kind == "views") and (name.has_colon or bool(name.follows))
        elif name.letters != style and style != "upper":
            counts = False
        elif not name.starts_line:  # "Findings: Clear. Impression: Normal." as one paragraph
            counts = style != "upper" and (name.kind not in at_lines if name.kind != "other" else not result)
        elif style == "upper":
            counts = name.letters == "title" and (
                name.follows == "paragraph" or (name.follows == "sentence" and name.kind != "other")
            )
        else:
            counts = bool(name.follows)
        (headers if counts else inside).append(name)
    return headers, inside


def _as_header(text: str, match: re.Match[str], starts_line: bool) -> _Header | None:
    """The header that ``match`` may be; None for a name of no known kind, and for words that only precede a colon."""
    words = " ".join(match["name"].split())
    if words != words.upper():  # FINDINGS (PA and lateral):
        words = re.sub(r" ?\([^()]*\)$", "", words)
    letters = "upper" if words == words.upper() else "title" if words[0].isupper() else "lower"
    name = " ".join(map(_spelt, words.upper().replace("(S)", "S").rstrip(" .").split()))
    kind = next((kind for kind, pattern in _KINDS if pattern.fullmatch(name)), None)
    has_colon = match["end"].startswith(":")
    if kind is None or not ((letters == "upper" and has_colon) or _SECTION_NAME.fullmatch(name)):
        return None
    before = text[max(0, match.start() - 200) : match.start("name")]
    gap = before[len(before.rstrip()) :]
    follows = (
        "paragraph" if gap == before or gap.count("\n") > 1 else "sentence" if before.rstrip()[-1] in ".!?:;" else ""
    )
    return _Header(match.start(), match.end(), kind, name, letters, has_colon, starts_line, follows)


@lru_cache(maxsize=1 << 14)
def _spelt(word: str) -> str:
    """``word`` of a header, in capitals, as it should be spelt: one slip, or two in ten letters and more."""
    for part in re.findall(r"[A-Z]{6,}", word):
        for name in _SECTION_WORDS if part not in _SECTION_WORDS else ():
            slips = count_slips(part, name) if abs(len(part) - len(name)) < 3 else 3
            if slips == 1 or (slips == 2 and len(name) > 9 and part[0] == name[0]):
                return word.replace(part, name)
    return word
