"""What a training step holds in memory and sends over the wire, and how it should scale: counted, then calculated.

Counted on the CPU, at the sizes given and with random weights: parameters, the bytes that a backward pass keeps of its
forward pass (at two batch sizes, the rest is linear), and the operations of both (torch's counter: products and
convolutions). Calculated from them: memory by kind; the time of the gradients' all-reduce, a ring in which every GPU
sends 2 (n - 1) / n times the gradients; and the share of the time that is left for computing, where nothing of it is
hidden behind the backward pass, and where all that fits is (DistributedDataParallel hides what it can).

  python benchmarks/cluster.py                                       R2GenCMN with ITHN, ResNet-101, one view, batch 64
  python benchmarks/cluster.py --batch_size 16 --views 2 --strategy off
  python benchmarks/cluster.py --tflops 125 --nvlink 150             a V100's tensor cores at their peak
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import operations, parser_of, prepare, save
from benchmarks.train_step import build_step
from modules.runtime.errors import run_entry_point

GPUS_PER_MACHINE = 8
COUNTED_AT = (2, 3)  # batch sizes


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=1)
    add_sizes(parser, batch_size=64)
    add = parser.add_argument
    add(
        "--precision",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of products and what is kept of them; default %(default)s",
    )
    add("--tflops", type=float, default=15.7, help="of a GPU; default: a V100's float32 peak, %(default)s")
    add(
        "--nvlink",
        type=float,
        default=150.0,
        help="GB/s in one direction between the GPUs of a machine; default: a V100's six links, %(default)s",
    )
    add("--network", type=float, default=100.0, help="Gb/s between machines; default %(default)s")
    add("--gpus", type=int, nargs="+", default=[1, 8, 64], help="default 1 8 64")
    return parser


def add_sizes(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """The flags that say what a step computes."""
    add = parser.add_argument
    add("--batch_size", type=int, default=batch_size, help="samples of each process; default %(default)s")
    add("--views", type=int, default=1, help="images of a sample; default %(default)s")
    add("--max_seq_length", type=int, default=60, help="default %(default)s")
    add("--strategy", default="ithn", choices=("off", "contrastive", "ithn"), help="default %(default)s")
    add("--model_name", default="r2gencmn", choices=("r2gen", "r2gencmn"), help="default %(default)s")
    add("--visual_extractor", default="resnet101", help="default %(default)s")
    add("--image_size", type=int, default=224, help="default %(default)s")
    add("--vocab_size", type=int, default=760, help="default %(default)s")


def count(arguments: argparse.Namespace, device: str, batch_size: int) -> dict[str, int]:
    """Bytes of parameters by part, bytes kept for the backward pass, and operations of a step with ``batch_size``."""
    import torch

    from modules.runtime.environment import autocast

    case = {
        "batch_size": batch_size,
        "views": arguments.views,
        "max_seq_length": arguments.max_seq_length,
        "precision": arguments.precision,
        "compile": False,
        "strategy": arguments.strategy,
    }
    step = build_step(arguments, device, case)
    objective, kept = step.objective, {}
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run() -> None:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            autocast(torch.device(device), arguments.precision),
        ):
            loss = objective(step.batch, 1)["loss"]
        loss.backward()

    flops = operations(run)
    parts = {"visual extractor": objective.backbone.visual_extractor}
    sizes = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    total = sum(parameter.numel() for parameter in objective.parameters())
    return {**sizes, "everything else": total - sum(sizes.values()), "kept": sum(kept.values()), "operations": flops}


def at_size(counted: Sequence[dict[str, int]], batch_size: int, name: str) -> float:
    """``name`` at ``batch_size``, on the line through what was counted at two."""
    (small, large), (low, high) = COUNTED_AT, (entry[name] for entry in counted)
    return low + (high - low) / (large - small) * (batch_size - small)


def memory(parameters: int, kept: float) -> dict[str, float]:
    """GiB of a process by kind, all but activations in float32; Adam with AMSGrad keeps three numbers per parameter."""
    each = 4 * parameters / 2**30
    return {"parameters": each, "gradients": each, "Adam with AMSGrad": 3 * each, "activations": kept / 2**30}


def efficiency(compute: float, wire: float) -> tuple[float, float]:
    """Share of the time left for computing, with nothing of the all-reduce hidden and with all that fits.

    What can hide it is the backward pass, two thirds of ``compute``; both in seconds of a step.
    """
    return compute / (compute + wire), compute / (compute + max(0.0, wire - compute * 2 / 3))


def scaling(parameters: int, operations: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step's computing and of its all-reduce, and the efficiency without and with overlap, by GPUs."""
    compute = operations / (arguments.tflops * 1e12)
    rows = []
    for gpus in arguments.gpus:
        sent = 4 * parameters * 2 * (gpus - 1) / gpus
        # All of a machine's GPUs share its network; a ring passes through it once.
        rate = arguments.nvlink * 1e9 if gpus <= GPUS_PER_MACHINE else arguments.network / 8 * 1e9
        without, overlap = efficiency(compute, sent / rate)
        rows.append(
            {
                "gpus": gpus,
                "sent": sent,
                "compute": compute,
                "all_reduce": sent / rate,
                "without overlap": without,
                "with overlap": overlap,
            }
        )
    return rows


def report(arguments: argparse.Namespace, counted: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Print the tables; what they hold."""
    parameters = counted[0]["visual extractor"] + counted[0]["everything else"]
    kept, operations = (at_size(counted, arguments.batch_size, name) for name in ("kept", "operations"))
    print(
        f"\nparameters: {counted[0]['visual extractor'] / 1e6:.1f} M visual extractor, "
        f"{counted[0]['everything else'] / 1e6:.1f} M everything else"
    )
    print(
        f"operations of a step of {arguments.batch_size} samples: {operations / 1e12:.2f} TFLOP, forward and backward"
    )
    by_kind = memory(parameters, kept)
    print(f"\nGiB of a process, {arguments.precision}, batch {arguments.batch_size}")
    for name, value in {**by_kind, "together": sum(by_kind.values())}.items():
        print(f"  {name:<24}{value:8.2f}")
    shared = sum(by_kind[name] for name in ("parameters", "gradients", "Adam with AMSGrad"))
    print(f"  FSDP over 8 GPUs would save {shared * 7 / 8:.2f}")
    rows = scaling(parameters, operations, arguments)
    print(
        f"\nexpected: {arguments.tflops:g} TFLOP/s, {arguments.nvlink:g} GB/s within a machine of "
        f"{GPUS_PER_MACHINE}, {arguments.network:g} Gb/s between machines"
    )
    print(f"{'GPUs':>6}{'sent by each':>16}{'computing':>12}{'all-reduce':>12}{'no overlap':>12}{'overlap':>10}")
    for row in rows:
        print(
            f"{row['gpus']:>6}{row['sent'] / 1e6:>13.0f} MB{row['compute'] * 1e3:>9.0f} ms"
            f"{row['all_reduce'] * 1e3:>9.1f} ms{row['without overlap']:>12.1%}{row['with overlap']:>10.1%}"
        )
    return {
        "counted": {size: entry for size, entry in zip(COUNTED_AT, counted, strict=True)},
        "memory_gib": by_kind,
        "operations": operations,
        "scaling": rows,
    }


def main() -> None:
    """Count, calculate, print."""
    arguments = build_parser().parse_args()
    device, made_by = prepare(arguments, ("batch_size", "views", "max_seq_length", "gpus"))
    counted = [count(arguments, device, batch_size) for batch_size in COUNTED_AT]
    save(arguments.out, {"benchmark": "cluster", **made_by, **report(arguments, counted)})


if __name__ == "__main__":
    run_entry_point(main)
