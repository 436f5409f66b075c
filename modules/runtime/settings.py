"""How a setting is declared: a field of a frozen dataclass that knows its help text, group and bounds.

Each room declares the settings of its own concern in such a dataclass (ITHNSettings, OptimSettings, DecodingOptions,
a backbone's Settings); modules/config.py puts them together, and every field is the flag of the same name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from modules.runtime.errors import InputError, did_you_mean


def setting(
    default: Any,
    group: str,
    help: str,
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    **facts: Any,
) -> Any:
    """A dataclass field that becomes the flag of the same name; ``low`` and ``high`` are inclusive bounds.

    ``facts`` are what else derives from a field: ``effect=False`` where another value gives the same results,
    ``train_only=True`` where main_test.py has nothing to do with it, ``shapes=True`` where weights are made for it,
    ``initial=True`` where it decides the weights that a new model starts from, ``vocabulary=True`` its vocabulary,
    ``remote=True`` where it may name something to download, ``typed_only=True`` where no checkpoint may say it,
    ``auto=VALUE`` what "auto" on the command line stands for, beside the numbers within the bounds,
    ``before=VALUE`` how results were made before the setting existed, if not with its default.
    """
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help, "choices": choices, "low": low, "high": high, **facts}
    )


def check_value(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """InputError for a value that is none of the choices or out of the bounds in its field's ``metadata``."""
    choices, low, high = metadata["choices"], metadata["low"], metadata["high"]
    if choices is not None and value not in choices:
        names = list(map(str, choices))
        raise InputError(f"--{name} {value}: must be one of {', '.join(names)}{did_you_mean(str(value), names)}")
    if value is None or (low is None and high is None) or ("auto" in metadata and value == metadata["auto"]):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"--{name} {str(value)[:60]!r}: must be a number")
    if not (value == value and abs(value) != float("inf")):
        raise InputError(f"--{name} {value}: must be a finite number")
    if low is not None and value < low:
        raise InputError(f"--{name} {value}: must be at least {low}")
    if high is not None and value > high:
        raise InputError(f"--{name} {value}: must be at most {high}")


def part_of(whole: Any, kind: type) -> Any:
    """The settings ``kind`` (a dataclass) out of a ``whole`` that has its fields among others."""
    return kind(**{item.name: getattr(whole, item.name) for item in dataclasses.fields(kind)})


_NAMED_BY_FILES: set[str] = set()


def note_origin(name: str, *, typed: bool) -> None:
    """Remember whether the user typed ``name``, or a checkpoint says it: then nothing is asked of any server for it."""
    (_NAMED_BY_FILES.discard if typed else _NAMED_BY_FILES.add)(name)


def is_local_only(name: str) -> bool:
    """Whether ``name`` was found in a file, so that only what is on this machine may be read for it."""
    return name in _NAMED_BY_FILES
