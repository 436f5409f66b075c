"""Kernels that only a GPU has are compared with the plain computation there before a training depends on them.

Tests on a CPU replace these kernels. A wrong argument, or another meaning of it in another version of torch, would show
on a GPU alone, and only in its results.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("ithn")
_nothing_is_computed = False


class Difference(NamedTuple):
    """The largest difference of two computations, relative to the largest value, and the most that rounding makes."""

    value: float
    most: float

    def is_rounding(self) -> bool:
        """Whether it is no more than that."""
        return self.value <= self.most


class DeviceCheck:
    """Whether the kernels of ``path`` compute on a device what the plain computation does, by a small fixed problem.

    ``compare(device, *sizes)`` yields differences. It runs once for each device and sizes, in float32 without TF32, and
    leaves no trace: not in random generators, nor in gradients or graphs of the caller.
    """

    def __init__(self, path: str, compare: Callable[..., Iterable[Difference]]):
        self.path, self.compare = path, compare
        self.passed: dict[tuple[object, ...], bool] = {}

    def passes(self, device: torch.device, *sizes: int) -> bool:
        """False, and the first time a line in the log, where they deviate or raise; False while a graph is recorded."""
        if _nothing_is_computed:
            return True
        key = device, *sizes
        if key not in self.passed:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            self.passed[key] = self._passes(device, *sizes)
        return self.passed[key]

    def _passes(self, device: torch.device, *sizes: int) -> bool:
        try:
            worst = self.worst(device, *sizes)
            reason = f"the largest relative difference is {worst.value:.1e}, not at most {worst.most:.0e}"
            passed = worst.is_rounding()
        except Exception as error:  # whatever it is, training goes on without them
            reason, passed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False
        if not passed:
            logger.warning(
                "%s: fused kernels are not used on %s: %s; the plain computation replaces them, results are unaffected",
                self.path,
                device,
                reason,
            )
        return passed

    def worst(self, device: torch.device, *sizes: int) -> Difference:
        """The difference that exceeds the most that it may be by the largest factor."""
        # A thread of its own has neither autocast nor inference mode nor hooks of the caller's graph.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._worst, device, *sizes).result()

    def _worst(self, device: torch.device, *sizes: int) -> Difference:
        with _undisturbed(device):
            return max(self.compare(device, *sizes), key=lambda found: found.value / found.most)


def pass_unchecked() -> None:
    """Every check passes from now on: for a null device, which counts launches and computes nothing to compare."""
    global _nothing_is_computed
    _nothing_is_computed = True


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], most: float) -> Difference:
    """That of the pair of tensors of one shape that differs most; infinite where there is a NaN."""
    pairs = zip(found, expected, strict=True)
    value = torch.stack([(ours.float() - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]).max()
    return Difference(float(value.nan_to_num(nan=math.inf, posinf=math.inf)), most)


def seed(device: torch.device) -> None:
    """Seed the generator of ``device``, and of no other one."""
    on_gpu = device.type == "cuda"
    generator = torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
    generator.manual_seed(0)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    on_gpu, products = device.type == "cuda", torch.backends.cuda.matmul
    allowed = products.allow_tf32
    with (
        torch.cuda.device(device) if on_gpu else contextlib.nullcontext(),
        torch.random.fork_rng([device.index] if on_gpu else []),
    ):
        products.allow_tf32 = False
        try:
            yield
        finally:
            products.allow_tf32 = allowed
