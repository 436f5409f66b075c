"""Reports that people bring for drawn studies: a CSV with id, report and maybe split, or an annotation.json."""

import csv
import io
from collections.abc import Container
from pathlib import Path

from modules.data.annotations import SPLITS, read_annotation
from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_text


def read_reports(path: Path, ids: Container[str]) -> dict[str, tuple[str, str]]:
    """id -> (report, split or ""); InputError unless the reports are those of ``ids``, one each."""
    rows = _read_annotation(path) if path.suffix == ".json" else _read_csv(path)
    for study_id in rows:
        if study_id not in ids:
            raise InputError(f"--reports {path}: id {study_id!r} is not in --findings; each report needs its findings")
    for study_id in ids:
        if study_id not in rows:
            raise InputError(f"--reports {path}: no report for id {study_id!r} of --findings")
    return rows


def _read_annotation(path: Path) -> dict[str, tuple[str, str]]:
    annotation = read_annotation(path, required_splits=())
    return {study.id: (study.report, study.split) for split in annotation.splits.values() for study in split}


def _read_csv(path: Path) -> dict[str, tuple[str, str]]:
    rows: dict[str, tuple[str, str]] = {}
    try:
        with io.StringIO(read_text(path, MAX_ANNOTATION), newline="") as file:
            reader = csv.DictReader(file)
            if not {"id", "report"} <= set(reader.fieldnames or ()):
                raise InputError(f"--reports {path}: needs the columns id and report (and may have split)")
            for row in reader:
                study_id, split = (row["id"] or "").strip(), (row.get("split") or "").strip()
                where = f"--reports {path}, line {reader.line_num}, id {study_id!r}"
                if not (row["report"] or "").strip():
                    raise InputError(f"{where}: the report is empty")
                if split and split not in SPLITS:
                    raise InputError(f"{where}: split {split!r} is unknown; use {', '.join(SPLITS)} or leave it empty")
                if study_id in rows:
                    raise InputError(f"{where}: appears twice")
                rows[study_id] = (row["report"].strip(), split)
    except OSError as error:
        raise InputError(f"--reports {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--reports {path}: not a UTF-8 CSV file ({error})") from None
    return rows
