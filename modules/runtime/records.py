"""What a run leaves behind for reading: results JSON, res.csv and gts.csv, and one line in records/<dataset>.csv.

Reports and ids are private: new folders are made for the owner alone (0700), files too (0600), and each file is
complete or absent, whenever the run ends.
"""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.runtime.errors import FOLDERS_MADE, InputError
from modules.runtime.input_files import read_text


def private_folder(path: str | Path) -> Path:
    """Make ``path`` and missing parents with mode 0700, and return it; InputError where that fails."""
    path = Path(path)
    if not path.is_dir():
        private_folder(path.parent)
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            FOLDERS_MADE.append(path)
        except OSError as error:
            raise InputError(f"folder {str(path)!r} cannot be made: {error.strerror}") from error
    return path


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A private folder beside ``out`` that becomes ``out``, mode 0700 and 0600, when the block ends, or is removed.

    InputError where ``out`` is there and not an empty folder, or cannot be made.
    """
    out = Path(os.path.realpath(out))
    require_empty(out)
    private_folder(out.parent)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))  # mode 0700
        yield temporary
        for path in temporary.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def require_empty(out: str | Path) -> None:
    """Raise InputError if ``out`` exists and is not an empty folder."""
    out = Path(out)
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"--out {out}: is not a folder")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out}: is not empty; give a new folder, or remove what is in it")


def write_private(path: str | Path, content: bytes | str) -> None:
    """Write a file of mode 0600 atomically, text as UTF-8; InputError where it cannot be written."""
    path = Path(path)
    data = content.encode(errors="replace") if isinstance(content, str) else content
    private_folder(path.parent)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")  # mode 0600
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        if temporary is not None:
            os.unlink(temporary)


def write_results(path: str | Path, results: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write ``results`` as JSON that any reader takes: a number that is not finite becomes null."""
    write_private(path, json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_report_tables(
    folder: str | Path, generated: Sequence[str], references: Sequence[str] | Sequence[Sequence[str]]
) -> None:
    """Write res.csv (generated) and gts.csv (references) as R2Gen does: one report a row, no header, same order.

    Of several references each has a column; rows with fewer of them are filled up with empty cells.
    """
    for name, reports in (("res.csv", generated), ("gts.csv", references)):
        rows = [[report] if isinstance(report, str) else list(report) for report in reports]
        width = max(map(len, rows), default=0)
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([*row, *[""] * (width - len(row))] for row in rows)
        write_private(Path(folder) / name, text.getvalue())


def append_record(
    record_dir: str | Path,
    dataset: str,
    *,
    epoch: int,
    seed: int,
    val: Mapping[str, float | None],
    test: Mapping[str, float | None],
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Append a run's line to ``record_dir``/``dataset``.csv and return that path.

    Columns are R2Gen's: epoch, val_<metric>, test_<metric>, time, seed, best_model_from (always val: the test split
    chooses nothing); then ``extra``. A file with other columns, R2Gen's own too, keeps them and gains the missing.
    """
    row = {
        "epoch": epoch,
        **{f"val_{name}": value for name, value in val.items()},
        **{f"test_{name}": value for name, value in test.items()},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": seed,
        "best_model_from": "val",
        **(extra or {}),
    }
    path = private_folder(record_dir) / f"{dataset}.csv"
    # Runs on several seeds may end at the same moment.
    with _locked(path.with_name(f".{path.name}.lock")):
        rows: list[Mapping[str, Any]] = []
        if path.exists():
            rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), restkey="more"))
        rows.append(row)
        columns = list(dict.fromkeys(column for row in rows for column in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_private(path, text.getvalue())
    return path


@contextlib.contextmanager
def _locked(path: Path):
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        with contextlib.suppress(OSError):  # cluster file systems may have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    number = float(value)  # numpy's and torch's scalars too
    return number if math.isfinite(number) else None
