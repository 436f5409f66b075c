"""Files that a flag names: what would block, never end or unpack to more than memory holds is refused unread."""

import errno
import os
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

from modules.runtime.errors import InputError


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. OSError for all else: a pipe without a writer blocks, a device never ends."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without the last, a pipe blocks here already
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))


def require_plain_archive(path: str | Path, flag: str) -> None:
    """InputError where a file that torch is to read is a zip archive of code, or one with members larger than itself.

    torch.save stores members as they are, but torch.load unpacks compressed ones too, whatever they grow to.
    """
    try:
        with open_regular(path) as file:
            if file.read(4) != b"PK\x03\x04":
                return
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            present = os.fstat(file.fileno()).st_size
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # the reader itself says what is wrong with it
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise InputError(f"{flag} {path}: refused, a TorchScript archive, which holds code; weights alone are read")
    size = sum(member.file_size for member in members)
    if size > present:
        raise InputError(
            f"{flag} {path}: refused, an archive of {present} bytes that unpacks to {size}; torch.save "
            "writes no compressed ones"
        )
