"""Several processes: joining them, and bringing together their features, counts and texts.

With one process every function is the identity. Batches must have the same number of rows in every process.
"""

import contextlib
import ctypes
import inspect
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.runtime.errors import InputError, error_line, log_failure
from modules.runtime.launch import launched
from modules.runtime.stopping import GracefulShutdown

# How long processes wait for one another: the main process scores a validation split alone.
TIMEOUT = timedelta(hours=1)
_LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "connection refused", "aborted")


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this process writes, scores and logs for all of them."""
    return rank() == 0


@contextlib.contextmanager
def processes(device: str, shutdown: GracefulShutdown | None = None) -> Iterator[None]:
    """Join the processes that were launched together (NCCL between GPUs, gloo between CPUs), and leave at the end.

    ``device`` as in --device. Inside, a user's mistake (InputError) is printed once, however many processes meet it,
    and ends this process with code 2. The loss of another process is one line and code 1, or no line where
    ``shutdown`` has received a signal, which ended that process too.
    """
    if not launched():
        yield
        return
    _end_with_parent()
    gpus = device != "cpu" and torch.cuda.is_available()
    store, own, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # Both backends: what is on the CPU, such as generated texts, never passes through a GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=own, world_size=count, timeout=TIMEOUT
    )
    try:
        yield
    except InputError as error:
        log_failure(error)
        _say_once(store, error_line(error))
        _leave(2)
    except SystemExit as error:
        _leave(error.code)
    except RuntimeError as error:
        reason = re.sub(r"^\[[^]]*\] ?", "", " ".join(str(error).split()))
        if count == 1 or not any(part in reason.lower() for part in _LOST):
            raise
        if shutdown is not None and shutdown.number is not None:
            _leave(128 + shutdown.number)
        log_failure(error)
        _say_once(store, f"error: process {own} of {count} lost the connection to another and stops: {reason[:80]}")
        _leave(1)
    dist.destroy_process_group()


def _end_with_parent() -> None:
    """Ask the system to end this process when its launcher is killed, which could not do so any more."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _say_once(store: dist.Store, line: str) -> None:
    """Print ``line`` unless another process has printed it."""
    with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
        if store.add(f"said/{line}", 1) > 1:
            return
    print(line, file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    """Exit immediately, with child processes: destructors of a broken process group would wait for the others."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(code)


class _Gather(torch.autograd.Function):
    """torch.distributed.nn has such a function, deprecated in favour of a private one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient)[rank() * ctx.rows :][: ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """The rows (B, ...) of all processes in rank order, (world * B, ...).

    The backward pass sums the gradient over the processes. A loss that every process computes from all rows then has,
    after the averaging of DistributedDataParallel, the gradient of one process that holds all rows.
    """
    return _Gather.apply(x) if is_distributed() else x


def gather(x: Tensor) -> Tensor:
    """The rows (B, ...) of all processes in rank order, (world * B, ...), without gradient."""
    if not is_distributed():
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` (any shape) over the processes, without gradient."""
    if not is_distributed():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def broadcast_object(value: Any) -> Any:
    """The main process's ``value`` (tensors and plain Python values) in every process."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, **_safe(dist.broadcast_object_list))
    return values[0]


def broadcast_rows(rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The main process's float32 ``rows``, which have that ``shape``, in every process."""
    if not is_distributed():
        return rows
    found = torch.from_numpy(rows).clone() if is_main_process() else torch.empty(shape)
    dist.broadcast(found, 0)
    return found.numpy()


def is_shared(value: Any) -> bool:
    """Whether processes share ``value``, a tensor of any shape or anything else."""
    return hasattr(value, "full_tensor")


def own_part(value: Any) -> Tensor:
    """This process's rows of ``value`` (of any shape) where it is shared out, else itself."""
    return value.to_local() if is_shared(value) else value


def largest(number: int) -> int:
    """The largest ``number`` of all processes."""
    return int(gather(torch.tensor([number])).max())


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """A block that the other processes enter after the main process has left it, when its downloads are cached."""
    if not is_main_process():
        broadcast_object(None)
    yield
    if is_main_process():
        broadcast_object(None)


def gather_batches(texts: Sequence[Any], rows: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]] | None:
    """Restore the order of batches that the processes took in turn (batch b by process b mod world).

    ``texts`` (plain Python values) and ``rows`` (b,) on the CPU are this process's batches. Returns those of all
    processes in the main process, None in the others.
    """
    if not is_distributed():
        return list(texts), list(rows)
    found = [[] for _ in range(world_size())] if is_main_process() else None
    dist.gather_object(list(zip(texts, rows, strict=True)), found, 0, **_safe(dist.gather_object))
    if found is None:
        return None
    turns = range(max(map(len, found)))
    ordered = [batches[turn] for turn in turns for batches in found if turn < len(batches)]
    return [text for text, _ in ordered], [part for _, part in ordered]


def _safe(collective: Callable) -> dict[str, bool]:
    """weights_only=True where this torch has it: without it, objects travel as pickles, which may run code."""
    return {"weights_only": True} if "weights_only" in inspect.signature(collective).parameters else {}


def data_parallel(module: nn.Module) -> nn.Module:
    """A wrapper of ``module`` whose gradients are averaged over the processes.

    All processes start from the main process's weights and buffers. Afterwards each has its own buffers: those that
    must agree are computed from gathered features, and running statistics are averaged when they are needed.
    """
    if not is_distributed():
        return module
    broadcast_weights(module)
    wrapper = nn.parallel.DistributedDataParallel
    # Otherwise every forward pass would broadcast all buffers, the memory of the previous epoch's negatives included.
    name = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in inspect.signature(wrapper).parameters
        else "broadcast_buffers"
    )  # its name before torch 2.14
    # Without device_ids: the wrapper would move what is on the CPU for good reason, such as the number of tokens.
    return wrapper(module, gradient_as_bucket_view=True, **{name: False})


def no_gradient_sync(parallel: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which gradients accumulate locally, to be averaged by the next backward pass outside it."""
    return parallel.no_sync() if is_distributed() else contextlib.nullcontext()


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Replace running means and variances (batch normalisation) by their mean over the processes.

    In training each process keeps its own, on which no loss depends. They are moving averages, linear in the batches,
    so it makes no difference when or how often they are averaged.
    """
    if not is_distributed():
        return
    buffers = [buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if buffers:
        mean = all_reduce_sum(torch.cat([buffer.flatten() for buffer in buffers])) / world_size()
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


@torch.no_grad()
def broadcast_weights(module: nn.Module) -> None:
    """Copy the main process's parameters and buffers to all processes."""
    if is_distributed():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


# ---- random generators: their state is part of a checkpoint; several processes seed them by key instead


def rng_state() -> dict[str, Any]:
    """State of torch's generators on every device; augmentation and order are seeded by epoch and need none."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Set torch's generators to a saved state; GPU states are skipped if the number of GPUs has changed."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_by(*key: int) -> None:
    """Seed torch's generators on every device from ``key`` alone."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
