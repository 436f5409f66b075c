"""Files of an archive (zip, or tar also packed) or of a folder, read into memory one at a time.

A file above a size limit and anything that is not a plain file are refused with one line.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from modules.runtime.archive_files import Member, tar_members, zip_members
from modules.runtime.errors import InputError, one_line
from modules.runtime.input_files import open_regular, read_bytes

_SUFFIXES = (".tgz", ".tar", ".tar.gz", ".tar.bz2", ".zip")

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
    files = _folder_files if source.is_dir() else _archive_files
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
    except InputError:
        raise
    except Exception as error:  # damaged bytes lead the readers to all kinds of exceptions
        reason = one_line(str(error))[:100] or type(error).__name__
        raise InputError(
            f"{source}: damaged, or not of the kind its name says ({reason}); download it again"
        ) from error


def _explained(source: Path, read: Callable[[], bytes]) -> Callable[[], bytes]:
    def read_or_explain() -> bytes:
        with _one_line(source):
            return read()

    return read_or_explain


def _folder_files(folder: Path) -> Iterator[Member]:
    for place, names, files in os.walk(folder):  # does not follow links to folders
        names.sort()
        for path in (Path(place, name) for name in sorted(files)):
            plain = path.is_file() and not path.is_symlink()
            size = path.stat().st_size if plain else None
            yield str(path.relative_to(folder)), size, lambda path=path, size=size: read_bytes(path, size)


def _archive_files(path: Path) -> Iterator[Member]:
    members = zip_members if path.name.lower().endswith(".zip") else tar_members
    with open_regular(path) as file:
        yield from members(file)
