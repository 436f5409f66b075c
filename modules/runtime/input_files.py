"""The one way to files that a flag, a checkpoint or an archive names: regular files only, their size first.

A pipe without a writer blocks, a device never ends, and a file of the user may be larger than memory: each is refused
unread. ``tests/runtime/test_input_files.py`` walks the sources for other ways to open a file.
"""

import errno
import json
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modules.runtime.errors import InputError

MAX_TEXT = 2**26  # bytes of a file of settings, results or lists
MAX_ANNOTATION = 2**30  # of an annotation: MIMIC-CXR's has a quarter of it
MAX_WEIGHTS = 2**36  # of a checkpoint
MAX_MAPPED = 2**50  # of a cache, which is not read into memory
MAX_SHARING = 8  # how often tensors may show the same bytes on average: tied weights and their copies do so twice


def open_regular(path: str | Path, max_bytes: int = MAX_WEIGHTS) -> BinaryIO:
    """Open a regular file of at most ``max_bytes`` for reading. OSError for all else: no pipe, device or folder."""
    # Without O_NONBLOCK a pipe would block here already.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    status = os.fstat(handle)
    if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes:
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    raise OSError(errno.EOVERFLOW, f"{status.st_size} bytes, more than the {max_bytes} that are read", str(path))


def require_regular(path: str | Path, max_bytes: int = MAX_WEIGHTS) -> None:
    """OSError unless ``path`` is a regular file of at most ``max_bytes``: for libraries that open it by its name."""
    open_regular(path, max_bytes).close()


def read_bytes(path: str | Path, max_bytes: int = MAX_TEXT) -> bytes:
    """The content of a regular file; OSError for anything else, or more than ``max_bytes``."""
    with open_regular(path, max_bytes) as file:
        content = file.read(max_bytes + 1)  # files of the kernel have size 0 and content
    if len(content) > max_bytes:
        raise OSError(errno.EOVERFLOW, f"more than the {max_bytes} bytes that are read", str(path))
    return content


def read_text(path: str | Path, max_bytes: int = MAX_TEXT) -> str:
    """The UTF-8 text of a regular file, without a byte order mark; OSError as in read_bytes, UnicodeDecodeError."""
    return read_bytes(path, max_bytes).decode("utf-8-sig")


def read_json(path: str | Path, max_bytes: int = MAX_TEXT, **options: Any) -> Any:
    """The JSON in a regular file (``options`` are json.loads'); OSError as in read_bytes, ValueError for other text."""
    try:
        return json.loads(read_text(path, max_bytes), **options)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error


def require_regular_folder(folder: str | Path, flag: str) -> None:
    """InputError where a model folder, which a library reads by its name, holds a file that is not a regular one."""
    for entry in sorted(Path(folder).rglob("*")):
        if not entry.is_dir() and os.path.exists(entry):  # a link to nothing is not read either
            try:
                require_regular(entry)
            except OSError as error:
                raise InputError(f"{flag} {folder}: {entry.name} cannot be read: {error.strerror}") from error


@contextmanager
def open_safetensors(path: str | Path, framework: str = "numpy") -> Iterator[Any]:
    """The open safetensors file at ``path``; OSError, SafetensorError and others where it is none."""
    from safetensors import safe_open

    require_regular(path)
    with safe_open(path, framework=framework) as file:
        yield file


def load_tensors(path: str | Path, flag: str) -> Any:
    """What torch.save wrote to ``path``, on the CPU: tensors and plain values, without running anything.

    InputError for any other file, and for tensors that announce more than the file holds.
    """
    import torch

    require_plain_archive(path, flag)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader raise anything
        raise InputError(
            f"{flag} {path}: damaged, or holds more than tensors and plain values "
            f"({type(error).__name__}); it was not loaded"
        ) from error
    require_own_bytes(content, f"{flag} {path}")
    return content


def require_own_bytes(content: Any, where: str) -> None:
    """InputError where tensors in ``content`` (any nesting) are larger than their bytes, or share them too often.

    A tensor of stride 0 shows one number as many as it likes, and takes their memory as soon as it is copied.
    """
    import torch

    shown, storages, seen, waiting = 0, {}, set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.is_meta:
                raise InputError(f"{where}: refused, it holds a tensor that is not dense")
            storage, size = value.untyped_storage(), value.numel() * value.element_size()
            if size > storage.nbytes():
                shape = tuple(value.shape)
                raise InputError(
                    f"{where}: refused, a tensor of shape {shape} has {storage.nbytes()} bytes, not {size}"
                )
            shown += size
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value
    if shown > MAX_SHARING * (held := sum(storages.values())) + MAX_TEXT:
        raise InputError(f"{where}: refused, its tensors show {shown} bytes, but share {held}")


def require_plain_archive(path: str | Path, flag: str) -> None:
    """InputError where a file that torch is to read is not a regular file, a zip archive of code, or one with members
    larger than itself.

    torch.save stores members as they are, but torch.load unpacks compressed ones too, whatever they grow to.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    try:
        with file:
            if file.read(4) != b"PK\x03\x04":
                return
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            present = os.fstat(file.fileno()).st_size
            has_one = _has_one_directory(file, present, members)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # the reader itself says what is wrong with it
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise InputError(f"{flag} {path}: refused, a TorchScript archive, which holds code; weights alone are read")
    if not has_one:
        raise InputError(f"{flag} {path}: damaged, the directory of its archive is not where its end says")
    size = sum(member.file_size for member in members)
    if size > present:
        raise InputError(
            f"{flag} {path}: refused, an archive of {present} bytes that unpacks to {size}; torch.save "
            "writes no compressed ones"
        )


def _has_one_directory(file: BinaryIO, size: int, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether every reader of a zip archive of ``size`` bytes finds the ``members`` that zipfile found.

    zipfile takes the directory that lies before the end record, other readers the one where the record says. They are
    one where nothing lies between the parts of an archive whose first member is at 0.
    """
    file.seek(max(0, size - 98))
    end = file.read().rjust(
        98
    )  # of 64 bits: the end record of 56 bytes and its locator of 20; then the plain one of 22
    if end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0" or min((member.header_offset for member in members), default=0):
        return False
    plain = struct.unpack("<II", end[-10:-2])  # bytes of the directory, and where it starts
    if end[:4] != b"PK\6\6" or end[56:60] != b"PK\6\7":
        return sum(plain) + 22 == size
    (place,), large = struct.unpack("<Q", end[64:72]), struct.unpack("<QQ", end[40:56])
    agree = all(short in (0xFFFFFFFF, long) for short, long in zip(plain, large, strict=True))
    return agree and sum(large) == place == size - 98
