"""Plain files of tar and zip archives, one at a time, in memory that no header of the archive decides.

Nothing is ever unpacked to a path that an archive names, so its names can do no harm.
"""

import bz2
import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

_MOST_AT_ONCE = 2**27  # bytes that a tar header or the table of a zip archive may take: a million files
_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZ": bz2.BZ2File,
}
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the readers of others unpack without a limit

# Name, size in bytes or None for anything but a plain file, and a function that reads it before the next one is asked.
Member = tuple[str, int | None, Callable[[], bytes]]


class ArchiveError(ValueError):
    """An archive that is damaged, or made to do harm."""


class _BoundedReads:
    """A file of which little is read at once: the readers of archives allocate whatever a header announces."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(min(size, _MOST_AT_ONCE + 1) if size >= 0 else _MOST_AT_ONCE + 1)
        if len(content) > _MOST_AT_ONCE:
            raise ArchiveError(f"an entry of more than {_MOST_AT_ONCE} bytes")
        return content

    def seekable(self) -> bool:
        return True


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """The members of a tar archive, plain or packed by gzip or bzip2; ArchiveError and others where it is damaged."""
    unpack = _PACKED.get(file.read(2), lambda file: file)
    file.seek(0)
    with tarfile.open(fileobj=_BoundedReads(unpack(file)), mode="r:") as archive:  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            archive.members.clear()  # it would remember them all
            if member.size < 0:
                raise ArchiveError(f"an entry of {member.size} bytes")
            plain = member.isreg() and not member.issparse()
            yield (
                member.name,
                member.size if plain else None,
                lambda member=member: archive.extractfile(member).read(member.size),
            )


def zip_members(file: BinaryIO) -> Iterator[Member]:
    """The members of a zip archive; ArchiveError and others where it is damaged."""
    with zipfile.ZipFile(_BoundedReads(file)) as archive:  # type: ignore[arg-type]
        for member in archive.infolist():
            is_link = member.external_attr >> 16 & 0o170000 == 0o120000
            yield (
                member.filename,
                None if is_link or member.is_dir() else member.file_size,
                lambda member=member: _read_zipped(archive, member),
            )


def _read_zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type not in _ZIP_METHODS:
        raise ArchiveError(f"{member.filename[-80:]!r} is packed by another method than deflate")
    content = io.BytesIO()
    with archive.open(member) as file:  # pieces: a single read would unpack more than the stated size
        while piece := file.read(2**16):
            content.write(piece)
    return content.getvalue()
