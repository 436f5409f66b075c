"""Checkpoints: self-contained, written so that a crash leaves the previous one intact, read without running pickles."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modules.errors import InputError

FORMAT = "ithn-checkpoint-1"
CURRENT, BEST = "current_checkpoint.pth", "model_best.pth"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, plain values) to ``path``: temporary file, fsync, rename, fsync of the folder.

    A crash or a full disk at any moment leaves the file that was there before. Raises InputError when it cannot write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch's zip writer turns a failed write into a RuntimeError.
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"checkpoint {path}: cannot be written ({error}); the previous one is intact. "
                         "Free some space or choose another --save_dir, then go on with --resume") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_as_best(current: Path, best: Path) -> None:
    """Make ``best`` the same file as ``current``; no bytes are copied where the file system has hard links."""
    temporary = best.with_name(f".{best.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(current, temporary)
    except OSError:
        shutil.copy(current, temporary)  # with the mode 0600
    os.replace(temporary, best)
    _sync_folder(best.parent)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours or of a published code onto the CPU; only tensors and plain values are accepted.

    Returns the dictionary as saved; a bare state dict is wrapped as {"state_dict": ...}. Raises InputError for a file
    that is missing, damaged, holds anything else, or has no weights.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path}: no such file; --load and --resume take a .pth file, such as {BEST}")
    try:
        with _plain_numpy_scalars():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises whatever the damaged bytes lead it to
        raise InputError(f"checkpoint {path}: damaged, or holds more than tensors and plain values "
                         f"({type(error).__name__}); it was not loaded") from error
    if not isinstance(content, dict):
        raise InputError(f"checkpoint {path}: holds a {type(content).__name__}, expected a dictionary of weights")
    if "state_dict" not in content:
        content = {"state_dict": content}
    weights = content["state_dict"]
    if not isinstance(weights, dict) or not weights or not all(_dense(value) for value in weights.values()):
        raise InputError(f"checkpoint {path}: its state_dict is not a dictionary of dense tensors")
    return content


def _dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta


@contextlib.contextmanager
def _plain_numpy_scalars() -> Iterator[None]:
    """Admit numpy numbers while loading: the published codes saved their best score as one."""
    import numpy as np
    from numpy._core.multiarray import scalar

    # Files written under numpy 1 name the same function by its old module.
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype,
               type(np.dtype(np.float64)), type(np.dtype(np.float32)), type(np.dtype(np.int64))]
    with torch.serialization.safe_globals(allowed):
        yield


def rng_state() -> dict[str, Any]:
    """State of torch's generators on every device; augmentation and order are keyed by epoch and need none."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Set torch's generators to a kept state; GPU states are skipped where the number of GPUs has changed."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def require_resumable(content: Mapping[str, Any], path: str) -> None:
    """Raise InputError unless ``content`` is a checkpoint of ours that training can go on from."""
    needed = ("objective", "optimizer", "scheduler", "scaler", "rng", "epoch", "best", "history", "vocabulary",
              "config")
    missing = [key for key in needed if key not in content]
    if content.get("format") != FORMAT or missing:
        raise InputError(f"--resume {path}: weights only, or of another program; training goes on from our "
                         f"{CURRENT} (to start from published weights use --load with main_test.py)")
