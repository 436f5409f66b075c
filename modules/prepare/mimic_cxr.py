"""MIMIC-CXR as PhysioNet publishes it: the tables of MIMIC-CXR-JPG, the reports, and the trees of both."""

import csv
import gzip
import io
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from modules.labels.rules import CLASSES
from modules.labels.tables import Table, parse_labels
from modules.prepare.archives import is_archive, read_files
from modules.runtime.errors import InputError

SPLIT_NAMES = {"train": "train", "validate": "val", "test": "test"}
MAX_REPORT = 2**20  # bytes
SUFFIXES = (".jpg", ".png", ".dcm")
_MAX_TABLE = 2**30  # bytes, unpacked; the metadata have some 60 million
_READERS = 16  # threads: small files on a network file system are waited for, not computed


@dataclass(frozen=True)
class MimicImage:
    """One radiograph; ``view`` is "PA", "AP", "LATERAL", ..., or "" where the metadata have none."""

    dicom_id: str
    study_id: str
    subject_id: str
    split: str  # train, val, test
    view: str

    @property
    def folder(self) -> str:
        """p10/p10000032/s50414267: the study's place in every tree of MIMIC-CXR."""
        return f"p{self.subject_id[:2]}/p{self.subject_id}/s{self.study_id}"


def find_table(folder: Path, kind: str) -> Path | None:
    """mimic-cxr-2.0.0-``kind``.csv.gz in ``folder``, of any 2.x version, unpacked or not; None without it."""
    return next(iter(sorted(folder.glob(f"mimic-cxr-2.*-{kind}.csv*"), reverse=True)), None)


def read_images(folder: Path) -> list[MimicImage]:
    """All images of the split table, in its order, with their views from the metadata table."""
    paths = {kind: find_table(folder, kind) for kind in ("split", "metadata")}
    for kind, path in paths.items():
        if path is None:
            raise InputError(f"--tables {folder}: no mimic-cxr-2.0.0-{kind}.csv.gz there (it comes with MIMIC-CXR-JPG)")
    views = {
        row["dicom_id"]: row["ViewPosition"].strip().upper()
        for row in _rows(paths["metadata"], "dicom_id", "ViewPosition")
    }
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
            raise InputError(f"{paths['split']}: image {identity} is there twice")
        images[identity] = MimicImage(identity, study, subject, SPLIT_NAMES[row["split"]], views.get(identity, ""))
    if not images:
        raise InputError(f"{paths['split']}: has no rows")
    return list(images.values())


def read_chexpert(folder: Path) -> list[list[str]]:
    """Rows of study id and the 14 labels in the order of CLASSES ("1", "0", "-1", "")."""
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
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read(_MAX_TABLE + 1)
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch it again") from error
    if len(content) > _MAX_TABLE:
        raise InputError(f"{path}: unpacks to more than {_MAX_TABLE} bytes, which no table of MIMIC-CXR does")
    reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig", "replace"), newline=""))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}; the columns are {', '.join(reader.fieldnames or ['none'])}"
        )
    for number, row in enumerate(reader, start=1):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number} has not as many cells as the header")
        yield row


def find_tree(folder: Path) -> Path:
    """The folder of p10, p11, ...: ``folder`` itself or where PhysioNet's downloads have it below."""
    for place in ("files", "", "mimic-cxr-reports/files", "mimic-cxr-reports"):
        if any((folder / place).glob("p[0-9][0-9]")):
            return folder / place
    raise InputError(f"{folder}: no folders p10, p11, ... there, nor in {folder.name}/files: not a tree of MIMIC-CXR")


def read_reports(source: Path, studies: Sequence[MimicImage]) -> Iterator[tuple[str, str]]:
    """Yield (study id, text) of the reports in mimic-cxr-reports.zip or in a tree.

    ``studies``: one image of each study that is wanted. A study without a report is passed over.
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
            yield study[1], read().decode("utf-8", "replace")


def _read_text(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_REPORT).decode("utf-8", "replace")
    except OSError:
        return None


def find_suffix(tree: Path, images: Sequence[MimicImage]) -> str:
    """Ending of the image files in a tree: that of the first one found."""
    for image in images:
        for suffix in SUFFIXES:
            if (tree / image.folder / f"{image.dicom_id}{suffix}").is_file():
                return suffix
    raise InputError(
        f"--images {tree}: none of the {len(images)} images is there, e.g. {images[0].folder}/{images[0].dicom_id}.jpg"
    )


def label_columns() -> list[str]:
    """Header of the label table."""
    return ["study_id", *CLASSES]
