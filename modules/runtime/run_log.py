"""The run's log: to the terminal without breaking progress bars, and to a file that only its owner can read."""

import logging
import os
import sys
from pathlib import Path

from tqdm import tqdm

from modules.runtime.errors import InputError
from modules.runtime.launch import process_number


class _BarSafeHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


class _FileHandler(logging.StreamHandler):
    """Says once that the file takes no more, as on a full disk, instead of a traceback for every line."""

    said = False

    def handleError(self, _record: logging.LogRecord) -> None:
        if not self.said:
            tqdm.write(f"the log file cannot be written: {sys.exc_info()[1]}")
        self.said = True


def start_log(path: Path) -> logging.Logger:
    """The logger "ithn", writing to the terminal and appending to ``path`` (mode 0600); call it once per run.

    Of several processes the first one writes. InputError where the file cannot be written.
    """
    logger = logging.getLogger("ithn")
    logger.setLevel(logging.INFO)
    logger.handlers.clear()
    logger.propagate = False
    if process_number() > 0:
        logger.addHandler(logging.NullHandler())
        return logger
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise InputError(f"file {str(path)!r} cannot be written: {error.strerror}") from error
    terminal = _BarSafeHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    file = _FileHandler(os.fdopen(handle, "a", encoding="utf-8"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(terminal)
    logger.addHandler(file)
    return logger
