"""The checkpoints of a run: which are kept, how a new one replaces an old one, and which one a run resumes from.

A kill at any moment leaves the two latest ones and the best one readable, each with a checksum file that matches.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder
from modules.training.checkpoint import (
    checksum_file,
    known_checksums,
    load_checkpoint,
    require_resumable,
    require_whole,
    write_checkpoint,
)

logger = logging.getLogger("ithn")

CURRENT, PREVIOUS, BEST = "current_checkpoint.pth", "previous_checkpoint.pth", "model_best.pth"
NAMES = (CURRENT, PREVIOUS, BEST)
EPOCH = "epoch_{:04d}.pth"
LOCK = ".training.lock"
TEST_FILES = ("results.json", "res.csv", "gts.csv", "statistics.npz", "report.html", "exports")
# What else a training writes into its folder, and the next one would overwrite.
RUN_FILES = (*TEST_FILES, "history.json", "curves.png", "tensorboard", "train.log", "test.log")


class CheckpointFolder:
    """The checkpoints in ``path``, a folder that ``locked`` makes where it is missing."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []  # why newest_valid did not take a later one
        self._current_is_good: bool | None = None  # not known
        self._unmatched: list[Path] = []  # checkpoints that are whole and differ from their checksum files

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second training out; InputError where one is running. The lock ends with this process.

        A folder that was made for the block is removed after it where nothing else was written there.
        """
        made = _missing(self.path)
        private_folder(self.path)
        try:
            handle = os.open(self.path / LOCK, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise InputError(f"--save_dir {self.path}: cannot be written: {error.strerror}") from error
        with open(handle, "wb") as file:
            try:
                # A lock of the process, not of the file: loader workers that outlive it do not hold it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"--save_dir {self.path}: another training is writing there; wait for it, stop it, "
                    "or choose another folder"
                ) from error
            except OSError:
                logger.warning(
                    "the file system of %s has no locks: make sure that no second training writes there", self.path
                )
            try:
                yield
            finally:
                if made and [entry.name for entry in self.path.glob("*")] == [LOCK]:
                    (self.path / LOCK).unlink()
                    with contextlib.suppress(OSError):  # a cache or another run is in there by now
                        for folder in made:
                            folder.rmdir()

    def sweep(self) -> None:
        """Remove what a killed run left half written; make each checksum file one line that is right."""
        for name in (*NAMES, *(f"{name}.sha256" for name in NAMES), "epoch_*", "history.json", "curves.png"):
            for orphan in self.path.glob(f".{name}.*.tmp"):
                orphan.unlink(missing_ok=True)
                logger.info("removed %s, left unfinished by an earlier run", orphan.name)
        for path in self.present():
            known = known_checksums(path) or []
            if len(known) > 1 and (digest := file_sha256(path)) in known:
                self._write_checksums(path, [digest])
        for path in self._unmatched:
            if path.is_file() and not checksum_file(path).is_dir():
                self._write_checksums(path, [file_sha256(path)])

    def present(self) -> list[Path]:
        """The checkpoints that exist, latest first."""
        return [self.path / name for name in NAMES if (self.path / name).is_file()]

    def save(self, state: Mapping[str, Any], *, best: bool) -> None:
        """Make ``state`` the current checkpoint, the one before it the previous one, and with ``best`` the best too.

        InputError where it cannot be written; the earlier files are then unchanged.
        """
        current = self.path / CURRENT
        new = self._temporary(CURRENT)
        try:
            digest = write_checkpoint(new, state)
            if self._current_is_good is None:
                self._current_is_good = _is_whole(current)
            self._put(new, current, digest, keep_as=self.path / PREVIOUS if self._current_is_good else None)
            self._current_is_good = True
            if best:
                self.keep_as_best(current)
        except OSError as error:
            if not self.path.is_dir():
                raise InputError(
                    f"checkpoint {current}: cannot be written, its folder is gone, and with it this run's checkpoints; "
                    "start again with another --save_dir"
                ) from error
            reason = error.strerror or error
            raise InputError(
                f"checkpoint {current}: cannot be written ({reason}); the previous one is intact. "
                "Free some space or choose another --save_dir, then continue with --resume"
            ) from error
        finally:
            # A full disk needs the space.
            for left in self.path.glob(f".*.{os.getpid()}.tmp"):
                left.unlink(missing_ok=True)

    def keep_as_best(self, source: Path) -> None:
        """Make the best model the same file as ``source``; no bytes are copied where the file system has hard links."""
        copy = self._temporary(BEST)
        _link(source, copy)
        self._put(copy, self.path / BEST, _checksum(source))

    def keep_epoch(self, epoch: int) -> None:
        """Keep the current checkpoint as that of ``epoch`` too; --resume auto does not look at it."""
        place, copy = self.path / EPOCH.format(epoch), self._temporary(EPOCH.format(epoch))
        _link(self.path / CURRENT, copy)
        self._put(copy, place, _checksum(self.path / CURRENT))

    def _put(self, new: Path, place: Path, digest: str, keep_as: Path | None = None) -> None:
        """Replace ``place`` by ``new``, whose checksum is ``digest``; the old file moves to ``keep_as``.

        The checksum file lists both checksums before the file is renamed.
        """
        before = _checksum(place) if place.is_file() else None
        if before and keep_as is not None:
            kept = self._temporary(keep_as.name)
            _link(place, kept)
        self._write_checksums(place, [digest, before] if before else [digest])
        os.replace(new, place)
        _sync_folder(self.path)
        if before and keep_as is not None:
            self._put(kept, keep_as, before)
        self._write_checksums(place, [digest])

    def _write_checksums(self, path: Path, digests: Sequence[str]) -> None:
        place = checksum_file(path)
        temporary = self._temporary(place.name)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.writelines(f"{digest}  {path.name}\n" for digest in dict.fromkeys(digests))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
        _sync_folder(self.path)

    def _temporary(self, name: str) -> Path:
        return self.path / f".{name}.{os.getpid()}.tmp"

    def newest_valid(self) -> tuple[Path, dict[str, Any]] | None:
        """The latest checkpoint that training can resume from, and its content; None where there is no checkpoint.

        ``problems`` says what is wrong with those that cannot be used; InputError where none can.
        """
        found = []
        for path in self.present():
            try:
                content = load_checkpoint(path)
                require_resumable(content, path)
            except InputError as error:
                self.problems.append(str(error))
                if path.name == CURRENT:
                    self._current_is_good = False
                continue
            if not require_whole(path):
                self._unmatched.append(path)
            if path.name == CURRENT:
                return path, content
            found.append((path, content))
        if not found and self.problems:
            raise InputError(
                f"--resume auto: no checkpoint in {self.path} can be used: {'; '.join(self.problems)}. "
                "To start from scratch choose another --save_dir, or leave --resume out"
            )
        return max(found, key=lambda item: _reached(item[1]), default=None)

    def move_aside(self) -> Path | None:
        """Move an earlier run's files into a folder of their own and return it, None where nothing would be lost."""
        if not self.present() and not (self.path / "results.json").exists():
            return None
        of_epochs = [path.name for path in self.path.glob("epoch_*.pth*")]
        checksums = [checksum_file(Path(name)).name for name in NAMES]
        return set_aside(self.path, (*NAMES, *checksums, *of_epochs, *RUN_FILES))


def _missing(path: Path) -> list[Path]:
    """``path`` and its parents that do not exist, from the bottom up."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def set_aside(folder: Path, names: Iterable[str]) -> Path:
    """Move those of ``names`` that ``folder`` has into a new folder in it, earlier_1 or the next, and return that."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (aside := folder / f"earlier_{number}").mkdir(mode=0o700)
            break
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # not there, or another program moved it meanwhile
            (folder / name).rename(aside / name)
    return aside


def _reached(content: Mapping[str, Any]) -> tuple[int, bool, int]:
    position = content["position"]
    return position["epoch"], position["trained"], position["batches"]


def _checksum(path: Path) -> str:
    """The SHA-256 in the checksum file of ``path``, or else of its content."""
    known = known_checksums(path) or ()
    return known[0] if len(known) == 1 else file_sha256(path)


def _is_whole(path: Path) -> bool:
    try:
        require_whole(path)
    except (InputError, OSError):
        return False
    return path.is_file()


def _link(source: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy(source, copy)  # with the mode 0600
        with open(copy, "rb") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
