"""A step of decoding whose tensors keep their shapes and places, so that a GPU can replay it as one CUDA graph.

In eager mode a step is some hundred launches, and the host takes longer for them than a GPU for their work.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Columns of the histories of a study, with which a step may have a fixed shape: with more, computing with those that
# are not filled yet costs more than the launches that it saves.
MOST_FIXED = 2048
logger = logging.getLogger("ithn")
Capture = Callable[[Callable[[], None]], Callable[[], None] | None]
_last: dict[int, torch.cuda.CUDAGraph] = {}  # by device: the next graph takes its memory


class FixedStep:
    """A step of ``search``, a Search, with its ``session`` after their first one; from the second call on ``capture``
    repeats it.

    ``capture`` makes a function that does what the given one does, or None where it cannot.
    """

    def __init__(self, search: Any, session: Any, capture: Capture):
        self.search, self.session, self.capture = search, session, capture
        self.calls = 0
        self.repeat: Callable[[], None] | None = None
        found = {name: getattr(search, name) for name in ("step", *search.row_names) if name != "studies"}
        self.places = {name: value.clone() for name, value in found.items() if value is not None}
        search.fixed = True
        self._place()

    @classmethod
    def of(cls, search: Any, session: Any, capture: Capture | None = None) -> "FixedStep | None":
        """None where a step cannot have tensors of constant shapes, or its results do not depend on them alone."""
        if not search.repeatable or search.tokens[0].numel() > MOST_FIXED or not session.fix():
            return None
        return cls(search, session, capture or captured)

    def __call__(self) -> None:
        """Take the step."""
        self.calls += 1
        if self.calls == 2:  # the first call has loaded kernels and allocated workspaces outside of the graph
            self.repeat = self.capture(self.take)
            self._place()
        (self.repeat or self.take)()

    def take(self) -> None:
        """The step itself."""
        self.search.take(self.session, columns=self.search.options.max_seq_length)
        for name, place in self.places.items():
            place.copy_(getattr(self.search, name))
        self._place()

    def _place(self) -> None:
        for name, place in self.places.items():
            setattr(self.search, name, place)


def captured(function: Callable[[], None]) -> Callable[[], None] | None:
    """``function`` as a CUDA graph on the current stream; None, with a line in the log, where that is impossible.

    Capturing runs no kernel: whatever the function changes on the device is unchanged afterwards. It may wait for
    nothing, and its tensors must keep their places. The graph captured before it may no longer be replayed.
    """
    graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
    try:
        # Other threads, such as one that pins memory, may call CUDA meanwhile.
        pool = _last[device].pool() if device in _last else None
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    except RuntimeError as error:
        _tell(" ".join(str(error).split())[:200])
        return None
    _last[device] = graph
    return graph.replay


@functools.cache  # once for each reason
def _tell(reason: str) -> None:
    logger.warning("decoding launches each kernel by itself, as a step cannot be captured as a CUDA graph: %s", reason)


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A block on a stream of its own, as capturing needs; it begins after the current one's work, which waits for it.

    Nothing happens where ``device`` is no GPU.
    """
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_stream(device)
    own = _stream(current.device_index)
    own.wait_stream(current)
    with torch.cuda.stream(own):
        yield
    current.wait_stream(own)
