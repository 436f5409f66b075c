"""The run's log: to the terminal without breaking progress bars, and to a file that only its owner can read."""

import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from modules.runtime.errors import InputError
from modules.runtime.launch import process_number


class _BarSafeHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record))


class _FileHandler(logging.StreamHandler):
    """Says once that the file takes no more, as on a full disk, instead of a traceback for every line."""

    said = False

    def handleError(self, _record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if not self.said:
            tqdm.write(f"the log file cannot be written: {sys.exc_info()[1]}")
        self.said = True


def start_log() -> logging.Logger:
    """The logger "ithn", writing to the terminal and, once ``log_to`` names it, to a file; call it once per run.

    Of several processes the main one writes.
    """
    logger = logging.getLogger("ithn")
    logger.setLevel(logging.INFO)
    logger.handlers.clear()
    logger.propagate = False
    if process_number() > 0:
        logger.addHandler(logging.NullHandler())
        return logger
    terminal = _BarSafeHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(terminal)
    # A run's folder is left alone until its inputs were read: what is said before waits for the file.
    logger.addHandler(logging.handlers.MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False))
    return logger


def log_to(path: Path) -> None:
    """Append what was logged since ``start_log``, and all that follows, to ``path`` (mode 0600).

    InputError where it cannot be written.
    """
    logger = logging.getLogger("ithn")
    waiting = [handler for handler in logger.handlers if isinstance(handler, logging.handlers.MemoryHandler)]
    if not waiting:  # not the main process
        return
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be written: {error.strerror}") from error
    file = _FileHandler(os.fdopen(handle, "a", encoding="utf-8"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in waiting:
        handler.setTarget(file)
        handler.flush()
        logger.removeHandler(handler)
    logger.addHandler(file)


class Bar:
    """Iterates over ``items`` behind a tqdm bar; ``due()`` says when ``show(values)`` is worth the values' cost.

    ``start`` is how many of them lie behind already, ``total`` their number where they cannot be counted beforehand.
    """

    def __init__(self, items: Iterable, description: str, start: int = 0, total: int | None = None):
        from tqdm import tqdm

        # A log file gets a line every half minute instead of ten a second.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            items,
            desc=description,
            initial=start,
            total=total,
            mininterval=interval,
            maxinterval=interval + 1,
            dynamic_ncols=True,
            leave=sys.stderr.isatty(),
            disable=process_number() > 0,
        )
        self._every = max(interval, 1.0)
        self._shown = time.monotonic()

    def __iter__(self) -> Iterator:
        yield from self._bar

    def due(self) -> bool:
        """Whether the last values were shown long enough ago."""
        return time.monotonic() - self._shown >= self._every

    def show(self, values: Mapping[str, float]) -> None:
        """Put the values beside the bar."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
        self._shown = time.monotonic()
