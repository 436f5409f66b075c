"""SIGTERM and SIGINT as requests: a run ends at the next moment at which what it would save is whole."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import FrameType

# A destructor or a callback that the signal happened to meet swallows the exception: it is raised again after this.
SECONDS_TO_TRY_AGAIN = 5.0


class Stopped(SystemExit):
    """A signal has ended the run: the exit code is 128 + its number, 143 for SIGTERM and 130 for SIGINT."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Stop:
    """Within ``with Stop() as stop``, SIGTERM and SIGINT raise Stopped, at once or at the end of a ``held`` block.

    A SIGINT after the first signal leaves at once with 130 and saves nothing; further SIGTERMs change nothing. Only
    entry points enter it; the handlers that were there before come back afterwards. Elsewhere a ``Stop()`` that was
    never entered stands for a run that no signal can reach.

    Of several processes one ``leads``: the others take note of a signal and go on, because the leader may still need
    their part of a step before it can save; they end when it has left.
    """

    def __init__(self, leads: bool = True) -> None:
        self.number: int | None = None
        self._leads = leads
        self._held, self._accepted = 0, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
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
            os.write(2, b"interrupted again: leaving at once; the last checkpoint is as it was\n")
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + signal.SIGINT)

    def check(self) -> None:
        """Raise Stopped where a signal has come, unless a ``held`` block runs or somebody has accepted it."""
        if self.number is not None and self._leads and not self._held and not self._accepted:
            if self._before:
                signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_TRY_AGAIN)
            raise Stopped(self.number)

    def accept(self) -> None:
        """The run is ending as it was asked to: Stopped is not raised again."""
        self._accepted = True
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A block that a signal does not break off: Stopped is raised at its end."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        self.check()
