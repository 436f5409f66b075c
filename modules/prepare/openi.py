"""Open-i's chest radiographs (IU X-Ray) as published: report XML, or Kaggle's two tables, and their PNG files.

A report's file names its images (``CXR2_IM-0652-1001``). R2Gen's annotation follows from it by three rules, which all
2,955 of its studies obey: studies with findings and two images or more; the id is the first image's without its last
number; the report is the text of the findings, unchanged.
"""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from modules.data.report_tables import Table, read_table
from modules.labels.sentences import is_missing
from modules.prepare.archives import is_archive, read_files
from modules.prepare.image_placing import Placing, place_all
from modules.runtime.errors import InputError
from modules.runtime.records import write_private
from modules.runtime.run_log import Bar

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
MAX_XML = 2**20  # bytes; the longest report has 20 thousand
MAX_ALL_XML = 2**26  # bytes; 16 kB for each of Open-i's four thousand reports
MAX_PNG = 128 * 2**20  # bytes; the collection's largest have some ten million
_NUMBER = r"\d{1,9}"
_IMAGE = re.compile(rf"CXR{_NUMBER}(?:_{_NUMBER})?_IM-{_NUMBER}(?:-{_NUMBER})+")


@dataclass(frozen=True)
class OpeniStudy:
    """One report; ``images`` are file names without suffix, in the report's order, each once."""

    number: str  # "2" of CXR2
    findings: str
    images: tuple[str, ...]
    views: tuple[str, ...] = ()  # "frontal" or "lateral" by image; () where unknown
    mesh: tuple[str, ...] = ()  # the coders' terms, "Opacity/lung/base/left"; () where unknown

    @property
    def id(self) -> str:
        """The study's name in R2Gen's annotation: its first image's, without the last number."""
        return self.images[0].rpartition("-")[0]

    @property
    def is_usable(self) -> bool:
        """Whether it has findings (not "nan", as pandas writes for none) and two images or more."""
        return len(self.images) >= 2 and not is_missing(self.findings)


def read_openi(source: Path, projections: Path | None = None) -> list[OpeniStudy]:
    """All studies of NLMCXR_reports.tgz, of a folder of its XML files, or of Kaggle's tables, by number.

    ``source`` may also be indiana_reports.csv or its folder; ``projections`` is then its neighbour by default. With
    XML, ``projections`` adds the views. InputError for anything else.
    """
    table = source / REPORTS if source.is_dir() else source
    if table.suffix.lower() == ".csv" and table.is_file():
        studies = _kaggle_studies(table, projections or table.with_name(PROJECTIONS))
    else:
        views = {} if projections is None else _views_by_image(projections)
        studies = [_with_views(parse_report(content, name), views) for name, content in _xml_files(source)]
        if not studies:
            raise InputError(f"{source}: holds neither Open-i's report XML files nor {REPORTS}")
    studies.sort(key=lambda study: int(study.number))
    for before, after in zip(studies, studies[1:], strict=False):
        if before.number == after.number:
            raise InputError(f"{source}: report CXR{after.number} is there twice")
    return studies


def _xml_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each report; InputError where they are more than a collection of reports has."""
    size = 0
    for name, read in read_files(source, ".xml", MAX_XML):
        content = read()
        size += len(content)
        if size > MAX_ALL_XML:
            raise InputError(f"{source}: its .xml files have more than the {MAX_ALL_XML} bytes accepted in all")
        yield name, content


def parse_report(content: bytes, name: str) -> OpeniStudy:
    """The study in one of Open-i's XML files; InputError naming the file for anything else."""
    root = _parse_xml(content, name)
    number = re.fullmatch(rf"CXR({_NUMBER})", root.find("uId").get("id", "") if root.find("uId") is not None else "")
    if root.tag != "eCitation" or number is None:
        raise InputError(f"{name}: not an Open-i report (an <eCitation> with <uId id='CXR...'>)")
    findings = [part.text or "" for part in root.iter("AbstractText") if part.get("Label") == "FINDINGS"]
    images = list(dict.fromkeys(image.get("id", "") for image in root.iter("parentImage")))
    wrong = [image for image in images if not _IMAGE.fullmatch(image)]
    if wrong:
        raise InputError(f"{name}: image {wrong[0][:80]!r} is not an image name of Open-i's, such as CXR2_IM-0652-1001")
    mesh = tuple(term.text.strip() for term in root.iter("major") if term.text)
    return OpeniStudy(number[1], " ".join(findings), tuple(images), mesh=mesh)


def _parse_xml(content: bytes, name: str) -> Element:
    """The root element. A document type, which could define entities or name other files, is refused."""
    builder, parser = TreeBuilder(), expat.ParserCreate()

    def refuse(*_) -> None:
        raise InputError(f"{name}: refused, it has a document type, which Open-i's reports do not have")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    except InputError:
        raise
    except Exception as error:  # encodings that are not for XML make Python's codecs raise almost anything
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
    """(number, image name without suffix, view) of every image in indiana_projections.csv, each once."""
    table = read_table(path, names=("uid",))
    number, filename, projection = _columns(table, "uid", "filename", "projection")
    rows: dict[str, tuple[str, str, str]] = {}
    for row in table.rows:
        image, view = row[filename].split(".")[0], row[projection].strip().lower()
        if not _IMAGE.fullmatch(f"CXR{image}") or view not in ("frontal", "lateral"):
            raise InputError(
                f"{path}: {row[filename][:80]!r}, {row[projection][:20]!r}: expected an image such as "
                "2_IM-0652-1001.dcm.png and Frontal or Lateral"
            )
        found = (_uid(row[number]), image, view)
        if rows.setdefault(image, found) != found:
            raise InputError(f"{path}: image {image} is listed twice, with another uid or projection")
    return list(rows.values())


def _kaggle_studies(reports: Path, projections: Path) -> list[OpeniStudy]:
    table = read_table(reports, names=("uid",))
    number, findings = _columns(table, "uid", "findings")
    images = defaultdict(list)
    for study, image, view in _projection_rows(projections):
        images[study].append((image, view))
    studies = []
    for row in table.rows:
        uid = _uid(row[number])
        if not re.fullmatch(_NUMBER, uid):
            raise InputError(f"{reports}: uid {uid[:40]!r} is not a number")
        own = sorted(images[uid])  # the order of Open-i's reports
        views = tuple(view for _, view in own)
        studies.append(OpeniStudy(uid, row[findings], tuple(f"CXR{image}" for image, _ in own), views))
    return studies


def _uid(text: str) -> str:
    """The number of a report as both tables should write it: 1 for 1.0 and 001, which pandas and others make of it."""
    return re.sub(r"^0*(\d+)(\.0*)?$", r"\1", text.strip())


def _columns(table: Table, *names: str) -> list[int]:
    found = {name: table.find(name) for name in names}
    if missing := [name for name, column in found.items() if column is None]:
        raise InputError(f"{table.path}: no column {', '.join(missing)}; the columns are {', '.join(table.columns)}")
    return list(found.values())


# ---- the annotation


def order_of_views(study: OpeniStudy, frontal_first: bool) -> list[int]:
    """Indices of the study's images in the order in which they are numbered."""
    order = list(range(len(study.images)))
    if frontal_first and study.views:
        # The first of each view, frontal before lateral, then the rest: R2Gen's annotation names two images.
        leading = [study.views.index(view) for view in ("frontal", "lateral") if view in study.views]
        order = leading + [index for index in order if index not in leading]
    return order


def annotation_record(identity: str, study: OpeniStudy, split: str, order: list[int]) -> dict:
    """A study's record in annotation.json, with its first two images in ``order`` by their paths in images/."""
    views = [study.views[index] for index in order[:2]] if study.views else []
    return {
        "id": identity,
        "report": study.findings,
        "image_path": [f"{identity}/{place}.png" for place in (0, 1)],
        "split": split,
    } | ({"view": views} if any(views) else {})


# ---- the images


def place_images(source: Path, targets: Mapping[str, Path], placing: Placing, workers: int) -> set[str]:
    """Bring every image to its target (image name without suffix -> path); returns the names that could not be read.

    A warning says how many, and why the first. InputError where ``source`` holds none of the images.
    """
    by_name = {kaggle_name(image): (image, target) for image, target in targets.items()}
    place = _from_archive if is_archive(source) else _from_folder
    reasons = dict.fromkeys(targets, f"not in {source}") | place(source, by_name, placing, workers)
    missing = {image: reason for image, reason in reasons.items() if reason is not None}
    if missing:
        image, reason = next(iter(missing.items()))
        if len(missing) == len(targets):
            raise InputError(f"--images: none of the {len(targets)} images could be read; {image}.png: {reason}")
        print(
            f"warning: {len(missing)} of {len(targets)} images could not be read; studies that need one of them are "
            f"left out. The first is {image}: {reason}",
            file=sys.stderr,
        )
    return set(missing)


def _from_folder(source: Path, by_name: dict, placing: Placing, workers: int) -> dict[str, str | None]:
    found = {
        _name(file): Path(place, file)
        for place, _, files in os.walk(source)
        for file in files
        if file.lower().endswith(".png")
    }
    pairs = [(found[name], target) for name, (_, target) in by_name.items() if name in found]
    images = {target: image for image, target in by_name.values()}
    bar = Bar(place_all(placing, pairs, workers), "images", total=len(pairs))
    return {images[target]: reason for target, reason in bar}


def _from_archive(source: Path, by_name: dict, placing: Placing, workers: int) -> dict[str, str | None]:
    """In one process: an archive is read from its beginning."""
    return dict(Bar(_unpack(source, by_name, placing), "images", total=len(by_name)))


def _unpack(source: Path, by_name: dict, placing: Placing) -> Iterator[tuple[str, str | None]]:
    done = set()
    for file, read in read_files(source, ".png", MAX_PNG):
        image, target = by_name.get(_name(file), (None, None))
        if image is None or image in done:
            continue
        done.add(image)
        reason = None
        if not target.is_file() and not placing.resize:
            write_private(target, read())
        elif not target.is_file():
            whole = target.with_name(f".{target.name}.whole")
            write_private(whole, read())
            reason = placing.place(whole, target)
            whole.unlink()
        yield image, reason


def _name(file: str) -> str:
    """Kaggle's name of an image's file, whichever of both collections it is of."""
    return kaggle_name(Path(file).name.split(".")[0])
