"""Files of an archive (zip, or tar with any compression) or of a folder, read into memory one at a time.

Nothing is ever unpacked to a path that an archive names, so its names can do no harm; a file above a size limit and
anything that is not a plain file are refused with one line.
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

_SUFFIXES = (".tgz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
# The last is raised for encrypted zip files.
_DAMAGE = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError)

File = tuple[str, Callable[[], bytes]]


def is_archive(path: Path) -> bool:
    """Whether the file name is that of a tar (also compressed) or zip archive."""
    return path.name.lower().endswith(_SUFFIXES)


def read_files(source: Path, suffix: str, max_bytes: int) -> Iterator[File]:
    """Yield (name, function that reads the bytes) for each file ending in ``suffix`` in an archive or folder.

    A tar member must be read before the next one is requested. Raises InputError for a damaged archive, a link among
    the files, and a file of more than ``max_bytes``.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if not source.is_dir() and not is_archive(source):
        raise InputError(f"{source}: neither a folder nor an archive ({', '.join(_SUFFIXES)})")
    if source.is_dir():
        files = _folder_files
    else:
        files = _zip_files if source.name.lower().endswith(".zip") else _tar_files
    with _one_line(source):
        for name, size, read in files(source):
            # macOS packs a file "._NAME" for each file.
            if not name.lower().endswith(suffix) or PurePosixPath(name).name.startswith("._"):
                continue
            if size is None:
                raise InputError(f"{source}: {name[-80:]!r} is a link or a device; only plain files are read")
            if size > max_bytes:
                raise InputError(f"{source}: {name[-80:]!r} has {size} bytes, more than the {max_bytes} accepted")
            yield name, _explained(source, read)


@contextlib.contextmanager
def _one_line(source: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise InputError(f"{source}: damaged, or not of the kind its name says ({error}); download it again") from error


def _explained(source: Path, read: Callable[[], bytes]) -> Callable[[], bytes]:
    def read_or_explain() -> bytes:
        with _one_line(source):
            return read()

    return read_or_explain


# Each yields (name, size in bytes or None for anything but a plain file, function that reads it).
_Files = Iterator[tuple[str, int | None, Callable[[], bytes]]]


def _folder_files(folder: Path) -> _Files:
    for place, names, files in os.walk(folder):  # does not follow links to folders
        names.sort()
        for path in (Path(place, name) for name in sorted(files)):
            plain = path.is_file() and not path.is_symlink()
            yield str(path.relative_to(folder)), path.stat().st_size if plain else None, path.read_bytes


def _tar_files(path: Path) -> _Files:
    with tarfile.open(path) as archive:
        for member in archive:
            size = member.size if member.isreg() else None
            yield member.name, size, lambda member=member: archive.extractfile(member).read()


def _zip_files(path: Path) -> _Files:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            is_link = member.external_attr >> 16 & 0o170000 == 0o120000
            yield member.filename, None if is_link else member.file_size, lambda member=member: archive.read(member)
