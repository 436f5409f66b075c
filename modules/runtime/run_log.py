"""Progress bars, and the run's log: to the terminal between the bars, and to a file that only its owner can read."""

import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path

from modules.runtime.errors import InputError
from modules.runtime.launch import process_number

SECONDS_BETWEEN_LINES = 30.0  # of progress, where a file is written to instead of a terminal
LONGEST_LINE = 120  # in characters, of progress and of lists


class _BarSafeHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record))


class _FileHandler(logging.StreamHandler):
    """Reports once that the file cannot be written, as on a full disk, instead of a traceback for every line."""

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
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)  # a pipe would block
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be written: {error.strerror}") from error
    file = _FileHandler(os.fdopen(handle, "a", encoding="utf-8"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in waiting:
        handler.setTarget(file)
        handler.flush()
        logger.removeHandler(handler)
    logger.addHandler(file)


def in_lines(heading: str, items: Iterable[str], indent: int | None = None) -> list[str]:
    """The ``items`` behind their ``heading``, in lines of at most LONGEST_LINE characters where each fits into one.

    Further lines are indented by ``indent`` characters; None: to where the first item begins.
    """
    lines = [heading]
    for item in items:
        if len(lines[-1]) + len(item) > LONGEST_LINE:
            lines.append(" " * (len(heading) if indent is None else indent))
        lines[-1] += f"{item}  "
    return [line.rstrip() for line in lines]


class Bar:
    """Progress over ``items``, or over calls of ``advance``: a bar in a terminal, a line every half minute in a file.

    ``start`` of them are done already; ``total`` is their number if ``items`` have no length. ``due()`` says when
    ``show(values)`` is worth what the values cost: nobody would see them in between.
    """

    def __init__(
        self, items: Iterable = (), description: str = "", start: int = 0, total: int | None = None, shown: bool = True
    ):
        self._items, self._description = items, description
        self._done, self._total = start, len(items) if total is None and isinstance(items, Sized) else total
        self._shown, self._bar = shown and process_number() == 0, None
        self._values: dict[str, str] = {}
        self._every = 1.0 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
        self._began = self._last_line = self._last_values = time.monotonic()
        self._skipped = start
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=description, initial=start, total=self._total, dynamic_ncols=True)

    def __iter__(self) -> Iterator:
        with self:
            for item in self._items:
                yield item
                self.advance()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._last_line > self._began:  # the last of several lines
            self._write_line()

    def advance(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def due(self) -> bool:
        """Whether the last values were shown long enough ago."""
        return time.monotonic() - self._last_values >= self._every

    def show(self, values: Mapping[str, float]) -> None:
        """Put the values next to the progress."""
        self._values = {name: f"{value:.3g}" for name, value in values.items()}
        self._last_values = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix(self._values, refresh=False)

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        took = self._last_line - self._began
        line = f"{self._description}: {self._done:,}" + (f" of {self._total:,}" if self._total else "")
        clock = f", {_clock(took)} so far"
        new = self._done - self._skipped
        if self._total and new > 0 and self._done < self._total:
            clock += f", {_clock(took * (self._total - self._done) / new)} to go"
        for name, value in self._values.items():
            if len(line) + len(f", {name} {value}") + len(clock) > LONGEST_LINE:
                break
            line += f", {name} {value}"
        print(line + clock, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
