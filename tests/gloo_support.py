"""Several processes for a test: forked from a server that has imported torch, which takes each of them no time."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing
from torch import distributed as dist


def _one(number: int, function: Callable, world: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=number, world_size=world)
    result = function(*arguments)
    torch.save(result, Path(folder) / f"{world}-{number}.pt")
    dist.destroy_process_group()


def run_together(function: Callable, world: int, folder: Path, *arguments) -> list:
    """What ``function(*arguments)`` returns (tensors, plain values) in each of ``world`` processes joined by gloo."""
    torch.multiprocessing.set_forkserver_preload(["pytest", "tests.tiny_backbone", "modules.run.training"])
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.start_processes(
        _one, args=(function, world, str(folder), arguments), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{world}-{number}.pt", weights_only=True) for number in range(world)]
