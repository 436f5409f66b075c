"""Embeddings that an interrupted run leaves for the next one."""

import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular
from modules.runtime.records import private_folder


class EmbeddingCache:
    """Rows of norm 1, float32, appended to ``folder/<hash of key>.f32``; without a folder nothing is kept.

    key: anything JSON can hold that determines the embeddings. shape: (rows, width) when complete. Use it as a context
    manager; ``rows`` (n, width) are those found at the start. A crash can leave a torn end: the first row with another
    norm and all behind it are dropped. InputError where the file cannot be used or another run holds it.
    """

    def __init__(self, folder: Path | None, *, key: object, shape: tuple[int, int]):
        count, width = shape
        self._file, self._row_bytes = None, 4 * width
        self.rows = np.empty((0, width), dtype=np.float32)
        if folder is None:
            return
        path = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.f32"
        private_folder(path.parent)
        try:
            if path.exists():
                require_regular(path)
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)  # noqa: SIM115
            _lock(self._file, path)
            found = np.fromfile(self._file, dtype=np.float32, count=count * width)
        except OSError as error:
            raise InputError(f"--cache {path}: cannot be used: {error.strerror}") from error
        rows = found[: found.size // width * width].reshape(-1, width)
        torn = ~(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-3)
        self.rows = rows[: torn.argmax()] if torn.any() else rows

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` rows; ``append`` continues there."""
        if self._file is not None:
            self._file.seek(count * self._row_bytes)
            self._file.truncate()

    def append(self, rows: np.ndarray) -> None:
        """Write rows (n, width) behind the ones kept, and hand them to the operating system at once.

        InputError where the disk does not take them.
        """
        if self._file is None:
            return
        try:
            if self._file.write(rows.tobytes()) < rows.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"--cache: cannot be written ({error.strerror}); '--cache none' does without") from error

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _lock(file, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--cache {path}: another run is filling it; wait, or give another folder") from error
    except OSError:
        pass  # cluster file systems may have no locks: two runs there must not share a cache
