"""SIGTERM and SIGINT end a run as soon as what it would save is consistent."""

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

# An exception raised inside a destructor or callback is swallowed: raise it again after this time.
SECONDS_TO_TRY_AGAIN = 5.0
SECONDS_BETWEEN_LOOKS = 0.2  # at the clock, while an answer is waited for


class Stopped(SystemExit):
    """A signal ended the run; exit code 128 + its number, 143 for SIGTERM and 130 for SIGINT."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class GracefulShutdown:
    """Context in which SIGTERM and SIGINT raise Stopped: immediately, or at the end of a ``deferred`` block.

    A SIGINT after the first signal exits immediately with 130 and saves nothing; further SIGTERMs are ignored. Only
    entry points enter the context; the previous handlers are restored on exit. Elsewhere, an instance that was never
    entered serves runs that handle no signals.

    With several processes only the one that ``leads`` raises: the others record the signal and continue, because the
    leader may need their part of the current step before it can save; they end when it has exited.
    """

    def __init__(self, leads: bool = True) -> None:
        self.number: int | None = None
        self._leads = leads
        self._deferred, self._accepted = 0, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "GracefulShutdown":
        for number, handler in (
            (signal.SIGTERM, self._arrived),
            (signal.SIGINT, self._arrived),
            (signal.SIGALRM, lambda *_: self.check()),
        ):
            self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_) -> None:
        self.accept()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            self.check()
        elif number == signal.SIGINT:
            os.write(2, b"interrupted again: exiting now; the last checkpoint is unchanged\n")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signal.SIGINT)

    def check(self) -> None:
        """Raise Stopped if a signal has been received, outside ``deferred`` blocks and before ``accept``."""
        if self.number is not None and self._leads and not self._deferred and not self._accepted:
            if self._before:
                signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_TRY_AGAIN)
            raise Stopped(self.number)

    def follow(self) -> None:
        """Only record signals from now on: the processes stop together, as none can save without the others."""
        self._leads = False

    def accept(self) -> None:
        """The run is already ending: do not raise Stopped again."""
        self._accepted = True
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context that a signal does not interrupt: Stopped is raised at its end."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        self.check()


def get_awake(answers: queue.SimpleQueue, seconds: float) -> Any:
    """The next of ``answers``; queue.Empty after ``seconds``, of which those in which the job was stopped do not count.

    SIGSTOP for a whole job, or a machine that was suspended, is no sign that another process hangs.
    """
    waited = 0.0
    while True:
        since = time.monotonic()
        try:
            return answers.get(timeout=min(SECONDS_BETWEEN_LOOKS, seconds))
        except queue.Empty:
            waited += min(time.monotonic() - since, 2 * SECONDS_BETWEEN_LOOKS)
            if waited >= seconds:
                raise
