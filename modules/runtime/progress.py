"""Progress bars that cost the device no synchronisation when nobody would see the numbers."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping

from modules.runtime.launch import process_number


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
