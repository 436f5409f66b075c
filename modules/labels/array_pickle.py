"""Reads a pickled dictionary of numpy arrays without running anything that the file names.

A pickle may call any function of any module. Here the few names that such a dictionary needs lead to the stand-ins
below, so that not even numpy's own reconstruction sees the file's values; every other name ends the reading.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from modules.runtime.errors import InputError
from modules.runtime.input_files import open_regular


class _Refused(Exception):
    """The file names something else than numpy arrays."""


class _Dtype:
    """A boolean or a number of up to 8 bytes; in place of numpy.dtype."""

    def __init__(self, code: str, *_: Any):
        self.value = np.dtype(code) if isinstance(code, str) and code[:1] in ("b", "i", "u", "f") else None
        if self.value is None or self.value.kind not in "biuf" or self.value.itemsize > 8:
            raise _Refused(f"an array of {code!r}")

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.value = self.value.newbyteorder(">")


class _Array:
    """Holds ``value``; in place of numpy.ndarray."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        self.fill(content, dtype, shape, "F" if by_columns else "C")

    def fill(self, content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> "_Array":
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order=order)
        return self


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _array_of(content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: Any) -> _Array:
    return _Array().fill(content, dtype, shape, order)


# What arrays are pickled as, by numpy 1 (numpy.core) and 2 (numpy._core), up to protocol 4 and in protocol 5.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _array_of,
    ("numpy._core.numeric", "_frombuffer"): _array_of,
}


# What a dictionary of arrays is spelled with. Absent are those that make objects in other ways (INST, OBJ, NEWOBJ),
# fetch them from elsewhere (EXT, PERSID, NEXT_BUFFER) or make sets.
_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT "
    "DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
).split()


class _Reader(pickle._Unpickler):
    """Python's own reader in Python: the one in C sets memory aside for whatever sizes and numbers a file declares."""

    dispatch = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in _OPCODES}
    }

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        self._size = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        return _STAND_INS[module, name]

    def _load_bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:
            raise EOFError
        self.append(self.read(size))

    def _load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Dtype)):
            raise _Refused(f"a state for a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
    dispatch[pickle.BUILD[0]] = _load_build


def read_pickled_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a pickled dictionary by key; lists of numbers count as arrays, number keys become text.

    InputError where the file is missing, damaged, or holds anything else.
    """
    try:
        with open_regular(path) as file:
            content = _Reader(file.read()).load()
    except _Refused as error:
        raise InputError(
            f"{path}: refused, it holds {error}; of a pickle only a dictionary of numpy arrays is read"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged bytes lead the reader to almost any exception
        raise InputError(f"{path}: not a pickle of numpy arrays, or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dictionary of numpy arrays")
    # Each list is converted once: a small file can name a long one many times.
    lists: dict[int, np.ndarray] = {}
    return {_text(path, key): _plain_array(path, key, value, lists) for key, value in content.items()}


def _text(path: str | Path, key: Any) -> str:
    if isinstance(key, str) or (isinstance(key, (int, float)) and abs(key) < 2**63):
        return str(key)
    raise InputError(f"{path}: holds a key that is a {type(key).__name__}, expected the studies' ids")


def _plain_array(path: str | Path, key: Any, value: Any, lists: dict[int, np.ndarray]) -> np.ndarray:
    if isinstance(value, _Array) and hasattr(value, "value"):
        return value.value
    if id(value) in lists:
        return lists[id(value)]
    if isinstance(value, (list, tuple)) and all(isinstance(number, (bool, int, float)) for number in value):
        try:
            lists[id(value)] = np.array(value, dtype=np.float64)
        except OverflowError as error:
            raise InputError(f"{path}: {key!r:.80} has a number that is too large") from error
        return lists[id(value)]
    raise InputError(f"{path}: {key!r:.80} is no numpy array and no list of numbers")
