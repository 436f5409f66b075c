"""One checkpoint file: self-contained, written with its checksum, read without running pickles.

modules/training/checkpoint_folder.py decides which files a run keeps, and how a new one replaces an old one.
"""

import contextlib
import hashlib
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch

from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from modules.runtime.input_files import load_tensors, open_regular, read_bytes, require_plain_archive

logger = logging.getLogger("ithn")
FORMAT = "ithn-checkpoint-1"
_MAX_CHECKSUMS = 4096  # bytes; a checksum file has two lines at most
# Entries required by main_test.py.
TESTED = {"config": dict, "vocabulary": dict, "history": list, "epoch": int, "strategy": str}
# Entries required by --resume.
RESUMED = TESTED | {
    "objective": dict,
    "optimizer": dict,
    "scheduler": dict,
    "scaler": dict,
    "rng": dict,
    "best": dict,
    "position": dict,
    "means": dict,
    "guard": dict,
    "annotation_sha256": str,
}


class _Hashed:
    """A binary file that hashes what is written to it, and remembers the error that torch's zip writer would hide."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> str:
    """Write ``state`` (tensors, plain values) to the new file ``path`` of mode 0600, and read it back.

    Returns its SHA-256; OSError where it cannot be written, or reads back differently.
    """
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        hashed: Any = _Hashed(file)
        try:
            torch.save({"format": FORMAT, **state}, hashed)
        except RuntimeError as error:
            raise hashed.error or error from error
        file.flush()
        os.fsync(file.fileno())
    digest = hashed.sha256.hexdigest()
    if file_sha256(path) != digest:
        raise OSError(f"{path.name} does not read back as written")
    return digest


def checksum_file(path: Path) -> Path:
    """The file next to ``path`` with its checksum, in the format of the program sha256sum."""
    return path.with_name(f"{path.name}.sha256")


def known_checksums(path: Path) -> list[str] | None:
    """The SHA-256 values that ``path`` may have, None where there is no checksum file.

    There are two while another file replaces it: whenever that is interrupted, one of them is right.
    """
    try:
        lines = read_bytes(checksum_file(path), _MAX_CHECKSUMS).decode("ascii", "replace").splitlines()
    except FileNotFoundError:
        return None
    except OSError:  # a folder or a pipe of that name, say
        return []
    return [line.split(" ")[0] for line in lines if line.strip()]


def require_whole(path: Path) -> bool:
    """Whether ``path`` agrees with its checksum file, if there is one; InputError where its content is damaged.

    Where it does not agree, the checksums inside the archive decide which of the two files is damaged.
    """
    known = known_checksums(path)
    if known is not None and file_sha256(path) in known:
        return True
    damaged = _damaged_part(path)
    if damaged is None:
        return known is None
    told = "" if known is None else f", it differs from its checksum in {checksum_file(path).name}"
    raise InputError(f"checkpoint {path}: damaged{told} ({damaged}); take another one")


def _damaged_part(path: Path) -> str | None:
    """What in the archive differs from its own checksums, which torch writes and does not look at; None: nothing."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            # Published files may be of the time before archives.
            return None if known_checksums(path) is None else "it is not an archive of torch.save"
        file.seek(-22, os.SEEK_END)
        end = file.read()
        if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
            return "its end is not that of an archive of torch.save"
        try:
            with zipfile.ZipFile(file) as archive:
                entry = archive.testzip()
        except Exception as error:  # the reader raises whatever the damaged bytes lead it to
            return f"its archive cannot be read: {type(error).__name__}"
    return entry and f"its part {entry} differs from its checksum"


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project or of a published code onto the CPU: tensors and plain values only.

    Returns the dictionary as saved; a bare state dict is wrapped as {"state_dict": ...}. Raises InputError for a file
    that is missing, damaged, holds anything else, or has no weights.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a checkpoint in it, such as {path / 'model_best.pth'}")
    if not path.is_file():
        raise InputError(
            f"checkpoint {path}: no such file; --load and --resume take a .pth file, such as model_best.pth"
        )
    require_plain_archive(path, "checkpoint")
    agrees = require_whole(path)
    with _plain_numpy_scalars():
        content = load_tensors(path, "checkpoint")
    if not agrees:
        logger.warning(
            "checkpoint %s: %s does not belong to it or is damaged; the archive's own checksums are right, so the "
            "checkpoint is used",
            path,
            checksum_file(path).name,
        )
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path}: holds a {type(content).__name__}, expected a dictionary of weights")
    if "state_dict" not in content:
        content = {"state_dict": content}
    weights = content["state_dict"]
    named = isinstance(weights, dict) and weights and all(isinstance(name, str) for name in weights)
    if not named or not all(_dense(value) for value in weights.values()):
        raise InputError(f"checkpoint {path}: its state_dict is not a dictionary of dense tensors")
    require_mean_patches(content, path)
    return content


def require_mean_patches(content: Mapping[str, Any], path: str | Path) -> None:
    """InputError where the mean training image, if there is one, is not a table (S, C) of finite numbers."""
    mean = content.get("mean_patches")
    if mean is not None and not (
        _dense(mean)
        and mean.dtype in (torch.float32, torch.float64)
        and mean.dim() == 2
        and mean.numel()
        and mean.isfinite().all()
    ):
        raise InputError(f"checkpoint {path}: its mean_patches is not a table of finite numbers")


def _dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


@contextlib.contextmanager
def _plain_numpy_scalars() -> Iterator[None]:
    """Admit numpy numbers while loading: the published codes saved their best score as one."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]  # the function that numpy pickles its numbers with

    # Files written by numpy 1 name the same function by its old module.
    allowed: list[Any] = [
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
        type(np.dtype(np.int64)),
    ]
    with torch.serialization.safe_globals(allowed):
        yield


def require_resumable(content: Mapping[str, Any], path: str | Path) -> None:
    """InputError unless ``content`` is a checkpoint of this project that training can resume from."""
    if content.get("format") != FORMAT:
        raise InputError(
            f"--resume {path}: weights only, or of another program; training resumes from a current_checkpoint.pth of "
            "main_train.py (give published weights to --load)"
        )
    require_entries(content, path, RESUMED)


def require_entries(content: Mapping[str, Any], path: str | Path, kinds: Mapping[str, type]) -> None:
    """InputError unless ``content`` has entries of these names and types, and a history of rows of numbers."""
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            found = f"is a {type(content[name]).__name__}" if name in content else "is missing"
            raise InputError(
                f"checkpoint {path}: its entry {name!r} {found}, expected a {kind.__name__}; it was "
                "edited, or written by another version"
            )
    for row in content["history"]:
        if not (
            isinstance(row, dict)
            and isinstance(row.get("epoch"), int)
            and all(isinstance(value, (int, float, NoneType)) for value in row.values())
        ):
            raise InputError(f"checkpoint {path}: its entry 'history' is not a list of rows of numbers; it was edited")
