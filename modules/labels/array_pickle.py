"""Reads a pickled dictionary of numpy arrays without running anything that the file names.

A pickle may call any function of any module. Here its opcodes are checked against an allow-list before any of them
runs, and the few names that such a dictionary needs resolve to the stand-ins below; any other name ends the reading.
"""

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np

from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_bytes


class _Refused(Exception):
    """The file contains something other than numpy arrays."""


# Every stand-in defines __setstate__: without it, pickle would set attributes on whatever the file builds.


class _Dtype:
    """Replaces numpy.dtype: booleans, integers and floats of up to 8 bytes."""

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or not re.fullmatch("[biuf][1248]", code):
            raise _Refused(f"an array of {code!r:.80}" if isinstance(code, str) else "an array of another type")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == ">":
            self.value = self.value.newbyteorder(">")


class _Array:
    """Replaces numpy.ndarray, which a pickle creates empty and then fills."""

    def __init__(self, *_: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state
        self._fill(content, dtype, shape, "F" if by_columns else "C")

    def _fill(self, content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order=order)  # a view: no memory of its own


class _FilledArray(_Array):
    """Replaces the function that creates an array in protocol 5."""

    def __init__(self, content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: Any):
        self._fill(content, dtype, shape, order)


# What arrays are pickled as, by numpy 1 (numpy.core) and 2 (numpy._core), up to protocol 4 and in protocol 5.
_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _FilledArray,
    ("numpy._core.numeric", "_frombuffer"): _FilledArray,
}
# What a dictionary of arrays is written with. Opcodes that create objects in other ways (INST, OBJ, NEWOBJ), fetch
# them from elsewhere (EXT, PERSID, NEXT_BUFFER) or make sets are not among them.
_OPCODES = frozenset(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT
    SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()
)


class _Reader(pickle._Unpickler):
    """Reads in Python, so that keys are looked at first: to hash nested tuples can take exponential time."""

    dispatch = pickle._Unpickler.dispatch.copy()

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise _Refused(f"{module}.{name}")
        return _STAND_INS[module, name]


def _check_keys(keys: list) -> None:
    for key in keys:
        if not isinstance(key, (str, int, float)):
            raise _Refused(f"a key that is a {type(key).__name__}")


def _check_opcodes(content: bytes) -> None:
    """Raise _Refused for an opcode outside the allow-list, and ValueError for declared sizes that the file lacks.

    pickle.Unpickler allocates memory for the sizes and memo indices that a file declares; this bounds both.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise _Refused(f"the opcode {opcode.name}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"memo index {argument}")


def read_pickled_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a pickled dictionary by key; lists of numbers become arrays, numeric keys become text.

    Raises InputError for a file that is missing, damaged, or holds anything else.
    """
    try:
        data = read_bytes(path, MAX_ANNOTATION)
        _check_opcodes(data)
        content = _Reader(io.BytesIO(data)).load()
    except _Refused as error:
        raise InputError(
            f"{path}: refused, it holds {error}; the only pickles read are dictionaries of numpy arrays"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        raise InputError(f"{path}: not a pickle of numpy arrays, or damaged ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a dictionary of numpy arrays")
    # Each list is converted once: a small file can refer to a long one many times.
    lists: dict[int, np.ndarray] = {}
    return {_text(path, key): _plain_array(path, key, value, lists) for key, value in content.items()}


def _text(path: str | Path, key: str | float) -> str:
    if isinstance(key, str) or abs(key) < 2**63:
        return str(key)
    raise InputError(f"{path}: holds a number that is too large for a key, expected the studies' ids")


def _plain_array(path: str | Path, key: Any, value: Any, lists: dict[int, np.ndarray]) -> np.ndarray:
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if id(value) in lists:
        return lists[id(value)]
    if isinstance(value, (list, tuple)) and all(isinstance(number, (bool, int, float)) for number in value):
        try:
            lists[id(value)] = np.array(value, dtype=np.float64)
        except OverflowError as error:
            raise InputError(f"{path}: {key!r:.80} has a number that is too large") from error
        return lists[id(value)]
    raise InputError(f"{path}: {key!r:.80} is neither a numpy array nor a list of numbers")
