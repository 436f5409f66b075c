"""--cuda_graph: an optimiser step is recorded once for each shape of its batches, and replayed by a single launch.

What a step computes on is copied into the memory that the recording read: batches, the number of their tokens, the
epoch, learning rates. A batch of a new shape is first computed as without graphs, which fills caches and lets kernels
be chosen; the second is recorded.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.data.batches import Batch
from modules.runtime.transfers import copy_to

logger = logging.getLogger("ithn")

LENGTHS = 8  # reports are filled up to a multiple, so that shapes repeat
MOST_GRAPHS = 32  # each keeps what its step leaves behind

# What a step computes: terms of every batch, and whether the weights were left alone, a bool scalar.
Result = tuple[list[dict[str, Tensor]], Tensor]
Compute = Callable[[Sequence[Any], Any, Tensor], Result]


class Recorded:
    """``compute`` of inputs that stay where they are; ``replay`` computes it again of what they hold by then."""

    def __init__(self, compute: Callable[[], Result], pool: Any):
        self.graph = torch.cuda.CUDAGraph()
        # Other threads page-lock batches meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.result = compute()

    def replay(self) -> Result:
        """The result, in the same memory every time."""
        self.graph.replay()
        return self.result


class StepGraphs:
    """Steps of ``compute(batches, epoch, token_count)``, replayed where that is possible.

    ``optimizer`` is the one that ``compute`` uses; ``failed`` is called after a recording that did not succeed, and
    puts right what it left behind. ``lengthen`` allows longer reports. ``record`` stands for Recorded.
    """

    def __init__(
        self,
        compute: Compute,
        optimizer: torch.optim.Optimizer,
        failed: Callable[[], None],
        *,
        device: torch.device,
        lengthen: bool,
        record: Callable[[Callable[[], Result], Any], Any] = Recorded,
    ):
        self.compute, self.optimizer, self.failed, self.record = compute, optimizer, failed, record
        self.device, self.multiple = device, LENGTHS if lengthen else 1
        self.seen: set[Any] = set()
        self.graphs: dict[Any, tuple[Any, list[Batch]]] = {}
        self.epoch = torch.zeros((), dtype=torch.float64, device=device)
        self.token_count = torch.zeros((), dtype=torch.int64, device=device)
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.held: list[float] = []  # what epoch and rates hold
        self.told: set[str] = set()
        self.possible = True

    def step(self, batches: Sequence[Batch], epoch: int, token_count: Tensor) -> Result:
        """The result of a step over ``batches``, which are on the CPU; ``token_count`` is a scalar."""
        ready = [whole for batch in batches if (whole := batch.lengthened(self.multiple).without_masks()) is not None]
        if not self.possible:
            return self.compute(batches, epoch, token_count)
        if len(ready) < len(batches):
            self._tell("where a view is missing")
            return self.compute(batches, epoch, token_count)
        shapes = tuple((tensor.shape, tensor.dtype) for batch in ready for tensor in batch.tensors())
        is_new = shapes not in self.seen or len(self.graphs) == MOST_GRAPHS
        if shapes not in self.graphs and (is_new or not self._record(shapes, ready)):
            self.seen.add(shapes)
            return self.compute(ready, epoch, token_count)
        recorded, held = self.graphs[shapes]
        self._fill_scalars(epoch, token_count)
        for own, batch in zip(held, ready, strict=True):
            for place, value in zip(own.tensors(), batch.tensors(), strict=True):
                copy_to(place, value)
        return recorded.replay()

    def _fill_scalars(self, epoch: int, token_count: Tensor) -> None:
        copy_to(self.token_count, token_count)
        held = [float(epoch), *(group["lr"] for group in self.optimizer.param_groups)]
        if held != self.held:
            for place, value in zip((self.epoch, *self.rates), held, strict=True):
                place.fill_(value)
            self.held = held

    def _record(self, shapes: Any, ready: Sequence[Batch]) -> bool:
        held = [batch.with_tensors([value.to(self.device) for value in batch.tensors()]) for batch in ready]
        pool = next((recorded.graph.pool() for recorded, _ in self.graphs.values()), None)
        try:
            with self._rates_as_tensors():
                recorded = self.record(lambda: self.compute(held, self.epoch, self.token_count), pool)
        except RuntimeError as error:
            self.possible = False
            self.failed()
            _renew_generator(self.device)
            self._tell(f"from here on: this one cannot be recorded ({str(error).splitlines()[0]})")
            return False
        self.graphs[shapes] = recorded, held
        return True

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """While a step is recorded: numbers would be part of the recording."""
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = True
            yield
        finally:
            for group, own in zip(groups, before, strict=True):
                group.update(own)

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            logger.info("--cuda_graph: steps are computed without a graph %s", reason)


def _renew_generator(device: torch.device) -> None:
    """Random numbers outside of a graph again: where recording fails, torch 2.10 leaves the generator recording."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        generator.graphsafe_set_state(generator.clone_state())
