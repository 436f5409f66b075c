"""Files of an archive (tar, compressed or not, and zip) or of a folder, read without ever unpacking by their names.

What others packed is not trusted: links, devices, absolute names, names with "..", members above a size and archives
above a total are refused with one line, and nothing is written.
"""

import contextlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from modules.runtime.errors import InputError

MAX_TOTAL = 256 * 2**30  # bytes that an archive may unpack to; Open-i's images take 15 GiB
_TAR_SUFFIXES = (".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz")
_SYMLINK = 0o120000

File = tuple[str, Callable[[], bytes]]


def is_archive(path: Path) -> bool:
    """Whether the name says tar (also compressed) or zip."""
    return path.name.lower().endswith((*_TAR_SUFFIXES, ".zip"))


def read_files(source: Path, suffix: str, max_bytes: int) -> Iterator[File]:
    """Yield (name, function that reads the bytes) of each file of an archive or folder that ends in ``suffix``.

    A tar's bytes must be read before the next file is asked for. InputError for an archive that is damaged or holds
    what an honest one never does, and for a file of more than ``max_bytes``.
    """
    if source.is_dir():
        yield from _folder_files(source, suffix, max_bytes)
    elif not source.is_file():
        raise InputError(f"{source}: no such file or folder")
    elif not is_archive(source):
        raise InputError(f"{source}: neither a folder nor an archive; {', '.join((*_TAR_SUFFIXES, '.zip'))} are read")
    else:
        walk = _zip_files if source.name.lower().endswith(".zip") else _tar_files
        with _one_line(source):
            yield from walk(source, suffix, max_bytes)


@contextlib.contextmanager
def _one_line(source: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        EOFError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        RuntimeError,
    ) as error:  # the last is of encrypted files
        raise InputError(f"{source}: damaged, or not what its name says ({error}); fetch it again") from error


def _folder_files(folder: Path, suffix: str, max_bytes: int) -> Iterator[File]:
    for place, names, files in os.walk(folder):  # follows no links to folders
        names.sort()
        for name in sorted(files):
            if not _wanted(name, suffix):
                continue
            path = Path(place, name)
            if path.is_symlink():
                raise InputError(f"{path}: is a link; give the folder that holds the files themselves")
            _check_size(folder, str(path.relative_to(folder)), path.stat().st_size, max_bytes)
            yield str(path.relative_to(folder)), path.read_bytes


def _tar_files(path: Path, suffix: str, max_bytes: int) -> Iterator[File]:
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg():
                raise InputError(f"{path}: {member.name[:80]!r} is a link or a device; only plain files are accepted")
            _check_name(path, member.name)
            total = _check_total(path, total + member.size)
            if _wanted(member.name, suffix):
                _check_size(path, member.name, member.size, max_bytes)
                yield member.name, _reader(path, lambda member=member: archive.extractfile(member).read())


def _zip_files(path: Path, suffix: str, max_bytes: int) -> Iterator[File]:
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            if member.external_attr >> 16 & 0o170000 == _SYMLINK:
                raise InputError(f"{path}: {member.filename[:80]!r} is a link; only plain files are accepted")
            _check_name(path, member.filename)
            total = _check_total(path, total + member.file_size)
            if _wanted(member.filename, suffix):
                _check_size(path, member.filename, member.file_size, max_bytes)
                yield member.filename, _reader(path, lambda member=member: archive.read(member))


def _reader(source: Path, read: Callable[[], bytes]) -> Callable[[], bytes]:
    def read_or_explain() -> bytes:
        with _one_line(source):
            return read()

    return read_or_explain


def _wanted(name: str, suffix: str) -> bool:
    # macOS puts a file "._NAME" beside each file that it packs.
    return name.lower().endswith(suffix) and not PurePosixPath(name).name.startswith("._")


def _check_name(path: Path, name: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise InputError(f"{path}: {name[:80]!r} leaves the archive's folder; nothing was read from it")


def _check_size(source: Path, name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InputError(f"{source}: {name[-80:]!r} has {size} bytes, more than the {max_bytes} accepted of its kind")


def _check_total(path: Path, total: int) -> int:
    if total > MAX_TOTAL:
        raise InputError(f"{path}: unpacks to more than {MAX_TOTAL // 2**30} GiB; nothing of this kind is that large")
    return total
