"""Several processes: joining them, the features and counts of all of them; with one process everything is the identity.

Batches must have the same number of rows in every process. What is no tensor travels as JSON, never as a pickle: a
process runs nothing that came over the network.
"""

import contextlib
import ctypes
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modules.runtime.errors import InputError, error_line
from modules.runtime.launch import launched
from modules.runtime.stopping import GracefulShutdown

# The longest that processes wait for one another: the first one scores a validation split alone.
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
    """Whether this process is the one that writes, scores and speaks."""
    return rank() == 0


@contextlib.contextmanager
def processes(device: str, shutdown: GracefulShutdown | None = None) -> Iterator[None]:
    """Join the processes that were launched together, NCCL between GPUs and gloo between CPUs; leave them at the end.

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
    # Both backends: tensors on the CPU, such as texts on their way to be scored, never pass through a GPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=own, world_size=count, timeout=TIMEOUT
    )
    try:
        yield
    except InputError as error:
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
        _say_once(store, f"error: process {own} of {count} lost the connection to another and stops: {reason[:80]}")
        _leave(1)
    dist.destroy_process_group()


def _end_with_parent() -> None:
    """Have the system end this process when its launcher is killed: nobody would be left to do it."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _say_once(store: dist.Store, line: str) -> None:
    """Print ``line`` unless another process has said it."""
    with contextlib.suppress(RuntimeError):  # the store's host is gone
        if store.add(f"said/{line}", 1) > 1:
            return
    print(line, file=sys.stderr, flush=True)


def _leave(code: int) -> None:
    """End this process and its children at once: the destructors of a broken group would wait for the others."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    os._exit(code)


class _Gather(torch.autograd.Function):
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
    """Sum of ``x`` over the processes, without gradient."""
    if not is_distributed():
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def broadcast_object(value: Any) -> Any:
    """What the first process passes as ``value`` (anything JSON can hold); the others' is not looked at."""
    if not is_distributed():
        return value
    content = _encoded(value) if is_main_process() else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(content)])
    dist.broadcast(length, 0)
    content = content if is_main_process() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return _decoded(content)


def broadcast_rows(rows: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The first process's float32 ``rows``, which have that ``shape``; the others' are not looked at."""
    if not is_distributed():
        return rows
    found = torch.from_numpy(rows).clone() if is_main_process() else torch.empty(shape)
    dist.broadcast(found, 0)
    return found.numpy()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """A block that the others enter when the first process has left it: what it fetched is in the cache then."""
    if not is_main_process():
        broadcast_object(None)
    yield
    if is_main_process():
        broadcast_object(None)


def gather_batches(texts: Sequence[Any], rows: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]] | None:
    """Bring batches that were shared out in turn (batch b to process b mod world) back into their order.

    ``texts`` and ``rows`` hold this process's batches: anything JSON can hold, and tensors on the CPU whose shapes
    differ in the first dimension only. Returns all of them in the first process, None in the others.
    """
    if not is_distributed():
        return list(texts), list(rows)
    headers = _gather_bytes(_encoded([list(texts), [len(part) for part in rows]]))
    own = torch.cat(list(rows)) if rows else torch.empty(0)
    contents = _gather_bytes(own.contiguous().view(-1).view(torch.uint8))
    if headers is None:
        return None
    found = [
        [*zip(*_of_process(header, content, own), strict=True)]
        for header, content in zip(headers, contents, strict=True)
    ]
    turns = range(max(map(len, found)))
    ordered = [batches[turn] for turn in turns for batches in found if turn < len(batches)]
    return [text for text, _ in ordered], [part for _, part in ordered]


def _of_process(header: Tensor, content: Tensor, like: Tensor) -> tuple[list[Any], list[Tensor]]:
    texts, counts = _decoded(header)
    rows = content.view(like.dtype).view(-1, *like.shape[1:]) if counts else like[:0]
    return texts, list(rows.split(counts))


def _gather_bytes(own: Tensor) -> list[Tensor] | None:
    """The 1-d uint8 tensors of all processes, of any lengths, in the first process; None in the others."""
    lengths = gather(torch.tensor([len(own)])).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in lengths] if is_main_process() else None
    dist.gather(padded, parts, 0)
    return None if parts is None else [part[:length].clone() for part, length in zip(parts, lengths, strict=True)]


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decoded(content: Tensor) -> Any:
    return json.loads(content.numpy().tobytes())


def data_parallel(module: nn.Module) -> nn.Module:
    """What to call instead of ``module`` so that its gradients are the mean over the processes.

    All of them start from the first one's weights and buffers. From then on buffers are each process's own: those
    that must agree are computed from gathered features, and running statistics are averaged now and then.
    """
    if not is_distributed():
        return module
    broadcast_weights(module)
    device, wrapper = next(module.parameters()).device, nn.parallel.DistributedDataParallel
    # Broadcasting before every forward pass would send the memory of the previous epoch's negatives along.
    name = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in inspect.signature(wrapper).parameters
        else "broadcast_buffers"
    )  # its name before torch 2.14
    return wrapper(
        module,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{name: False},
    )


def no_gradient_sync(parallel: nn.Module) -> contextlib.AbstractContextManager:
    """A block whose gradients each process adds up by itself, to be brought together with those that follow it."""
    return parallel.no_sync() if is_distributed() else contextlib.nullcontext()


@torch.no_grad()
def average_running_statistics(module: nn.Module) -> None:
    """Give all processes the mean of their running means and variances (batch normalisation).

    In training each process keeps its own, which no loss depends on. They are moving averages, linear in what was
    seen, so it makes no difference when or how often they are averaged.
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
    """Give all processes the first one's parameters and buffers."""
    if is_distributed():
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


# ---- the state of the random generators, which a checkpoint keeps; with several processes they are seeded by key


def rng_state() -> dict[str, Any]:
    """State of torch's generators on every device; augmentation and order are keyed by epoch and need none."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Set torch's generators to a kept state; GPU states are skipped where the number of GPUs has changed."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_by(*key: int) -> None:
    """Seed torch's generators on every device by ``key`` alone."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
