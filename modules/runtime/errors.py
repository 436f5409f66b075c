"""Users' mistakes become one line and exit code 2; everything else keeps its traceback."""

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from modules.runtime.cores import choose_threads
from modules.runtime.packages import missing_package, remedy

FOLDERS_MADE: list[Path] = []  # by this process, in order; those that are empty when it fails are removed


class InputError(ValueError):
    """A mistake in the user's input: one line that says what, where, and what would be right."""


@dataclass(frozen=True)
class Problem:
    """One of possibly many mistakes in a file; ``message`` is the whole line about it, ``kind`` what is counted."""

    kind: str
    message: str
    file: str
    split: str = ""
    id: str = ""
    field: str = ""


def raise_problem(problem: Problem) -> None:
    """Raise the problem as InputError: what a reader does with the first one unless it is asked to collect them all."""
    raise InputError(problem.message)


class ImageError(InputError):
    """An image that cannot be loaded; ``kind`` is what such images are counted under."""

    def __init__(self, message: str, kind: str = "image cannot be decoded"):
        super().__init__(message)
        self.kind = kind


def did_you_mean(names: str | Iterable[str], known: Iterable[str]) -> str:
    """ "; did you mean X?" with what comes closest in ``known`` to each mistyped name; "" where nothing is close."""
    lowered, names = {name.lower(): name for name in known}, [names] if isinstance(names, str) else names
    close = [
        lowered[found[0]]
        for name in names
        if (found := difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.7))
    ]
    return f"; did you mean {' and '.join(close)}?" if close else ""


def one_line(text: str) -> str:
    """``text`` on one line and without control characters: a terminal would obey those of a hostile file."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def error_line(error: InputError) -> str:
    """What the user reads of ``error``."""
    return f"error: {one_line(str(error))}"


def _say(error: InputError) -> None:
    # Processes that torchrun started together read the same flags: one of them says what is wrong.
    if os.environ.get("RANK", "0") == "0":
        print(error_line(error), file=sys.stderr)


def log_failure(error: BaseException) -> None:
    """Write the error that ends the run to its log file, if there is one; the terminal gets it elsewhere."""
    unexpected = not isinstance(error, (InputError, KeyboardInterrupt))
    traceback = (type(error), error, error.__traceback__) if unexpected else None
    text = one_line(str(error)) or type(error).__name__
    record = logging.LogRecord("ithn", logging.ERROR, "", 0, "ended by an error: %s", (text,), traceback)
    for handler in logging.getLogger("ithn").handlers:
        if isinstance(handler, logging.StreamHandler):  # the log file; the terminal's handler is of another kind
            handler.handle(record)


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run ``main`` and exit the process with its code; an InputError prints one line on stderr and exits with 2.

    So does a Python without the packages, which is most often one whose environment was not activated. Folders that
    were made and are empty are removed where ``main`` did not succeed. torch, which ``main`` imports, gets no more
    threads than this process has cores.
    """
    choose_threads()
    code: int | None = 1
    try:
        code = _exit_code(main)
    finally:
        if code:
            _remove_empty_folders()
    sys.exit(code or 0)


def _remove_empty_folders() -> None:
    for path in reversed(FOLDERS_MADE):
        with contextlib.suppress(OSError):  # not empty, or gone
            path.rmdir()
    FOLDERS_MADE.clear()


def _exit_code(main: Callable[[], int | None]) -> int | None:
    try:
        return main()
    except InputError as error:
        log_failure(error)
        _say(error)
        return 2
    except ModuleNotFoundError as error:
        package = missing_package(error)
        if package is None:
            raise
        _say(InputError(f"{sys.executable} has no package {package}; {remedy()}"))
        return 2
    except KeyboardInterrupt as error:
        log_failure(error)
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away: nothing is wrong, and flushing again would raise once more.
        sys.stderr.close()
        return 0
    except Exception as error:
        log_failure(error)
        raise
