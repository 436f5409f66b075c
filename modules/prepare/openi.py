"""Open-i's chest radiographs (IU X-Ray) as they are published: report XML, or Kaggle's two tables.

A report's file names its images (``CXR2_IM-0652-1001``). R2Gen's annotation follows from it by three rules, which all
2,955 of its studies obey: studies with findings and two images or more; the id is the first image's without its last
number; the report is the findings as they stand.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from modules.labels.tables import Table, read_table
from modules.prepare.archives import read_files
from modules.runtime.errors import InputError

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
MAX_XML = 2**20  # bytes; the longest report has 20 thousand
_IMAGE = re.compile(r"CXR\d+(?:_\d+)?_IM-\d+(?:-\d+)+")


@dataclass(frozen=True)
class OpeniStudy:
    """One report; ``images`` are file names without ending, in the report's order."""

    number: str  # "2" of CXR2
    findings: str
    images: tuple[str, ...]
    views: tuple[str, ...] = ()  # "frontal" or "lateral" by image; () where the files do not say
    mesh: tuple[str, ...] = ()  # the coders' terms, "Opacity/lung/base/left"; () where the files do not say

    @property
    def id(self) -> str:
        """The study's name in R2Gen's annotation: its first image's, without the last number."""
        return self.images[0].rpartition("-")[0]


def read_openi(source: Path, projections: Path | None = None) -> list[OpeniStudy]:
    """All studies of NLMCXR_reports.tgz, of a folder of its XML files, or of Kaggle's tables, by number.

    ``source`` may also be indiana_reports.csv, or the folder that it lies in; ``projections`` is then expected beside
    it, and adds the views to the XML's studies where it is given. InputError for what is none of these.
    """
    table = source / REPORTS if source.is_dir() else source
    if table.suffix.lower() == ".csv" and table.is_file():
        studies = _kaggle_studies(table, projections or table.with_name(PROJECTIONS))
    else:
        views = {} if projections is None else _views_by_image(projections)
        studies = [_with_views(parse_report(read(), name), views) for name, read in read_files(source, ".xml", MAX_XML)]
        if not studies:
            raise InputError(f"{source}: holds neither Open-i's report XML files nor {REPORTS}")
    studies.sort(key=lambda study: int(study.number))
    for before, after in zip(studies, studies[1:], strict=False):
        if before.number == after.number:
            raise InputError(f"{source}: report CXR{after.number} is there twice")
    return studies


def parse_report(content: bytes, name: str) -> OpeniStudy:
    """The study in one of Open-i's XML files; InputError naming the file for anything else."""
    root = _parse_xml(content, name)
    number = re.fullmatch(r"CXR(\d+)", root.find("uId").get("id", "") if root.find("uId") is not None else "")
    if root.tag != "eCitation" or number is None:
        raise InputError(f"{name}: not an Open-i report (an <eCitation> with <uId id='CXR...'>)")
    findings = [part.text or "" for part in root.iter("AbstractText") if part.get("Label") == "FINDINGS"]
    images = [image.get("id", "") for image in root.iter("parentImage")]
    wrong = [image for image in images if not _IMAGE.fullmatch(image)]
    if wrong:
        raise InputError(f"{name}: image {wrong[0][:80]!r} is not named as Open-i's are (CXR2_IM-0652-1001)")
    mesh = tuple(term.text.strip() for term in root.iter("major") if term.text)
    return OpeniStudy(number[1], " ".join(findings), tuple(images), mesh=mesh)


def _parse_xml(content: bytes, name: str) -> Element:
    """The root element. A document type, which could define entities or name other files, is refused."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def refuse(*_) -> None:
        raise InputError(f"{name}: has a document type, which Open-i's reports have not; it was not read")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise InputError(f"{name}: not well-formed XML: {error}") from error
    return builder.close()


def _with_views(study: OpeniStudy, views: dict[str, str]) -> OpeniStudy:
    found = tuple(views.get(kaggle_name(image), "") for image in study.images)
    return replace(study, views=found if any(found) else ())


def kaggle_name(image: str) -> str:
    """Kaggle's name of an image: CXR2_IM-0652-1001 is 2_IM-0652-1001 there, CXR1_1_IM-0001-3001 is 1_IM-0001-3001."""
    return re.sub(r"(?:CXR)?(\d+)(?:_\d+)?_IM-", r"\1_IM-", image)


def _views_by_image(projections: Path) -> dict[str, str]:
    """Kaggle's image name without ending -> "frontal" or "lateral"."""
    return {image: view for _, image, view in _projection_rows(projections)}


def _projection_rows(path: Path) -> list[tuple[str, str, str]]:
    """(number, image name without ending, view) of every row of indiana_projections.csv."""
    table = read_table(path)
    number, filename, projection = _columns(table, "uid", "filename", "projection")
    rows = []
    for row in table.rows:
        image, view = row[filename].split(".")[0], row[projection].strip().lower()
        if not _IMAGE.fullmatch(f"CXR{image}") or view not in ("frontal", "lateral"):
            raise InputError(
                f"{path}: {row[filename][:80]!r}, {row[projection][:20]!r}: expected an image as "
                "2_IM-0652-1001.dcm.png and Frontal or Lateral"
            )
        rows.append((row[number].strip(), image, view))
    return rows


def _kaggle_studies(reports: Path, projections: Path) -> list[OpeniStudy]:
    table = read_table(reports)
    number, findings = _columns(table, "uid", "findings")
    images = defaultdict(list)
    for study, image, view in _projection_rows(projections):
        images[study].append((image, view))
    studies = []
    for row in table.rows:
        if not row[number].strip().isdecimal():
            raise InputError(f"{reports}: uid {row[number][:40]!r} is not a number")
        own = sorted(images[row[number].strip()])  # the order of Open-i's reports
        studies.append(
            OpeniStudy(
                row[number].strip(),
                row[findings],
                tuple(f"CXR{image}" for image, _ in own),
                tuple(view for _, view in own),
            )
        )
    return studies


def _columns(table: Table, *names: str) -> list[int]:
    columns = [column.strip().lower() for column in table.columns]
    missing = [name for name in names if name not in columns]
    if missing:
        raise InputError(f"{table.path}: no column {', '.join(missing)}; the columns are {', '.join(table.columns)}")
    return [columns.index(name) for name in names]
