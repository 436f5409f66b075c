"""Time, rate and memory of a training step: forward, backward and optimiser, as main_train.py takes it.

Beside it, in the same rounds: the visual extractor's forward and backward alone, and with ITHN the loss module alone
(projections, synthesis, similarities, all losses, forward and backward), from features that are given. The share is
that of the rate of a matrix product. Flags that take several values are measured in all combinations.

  python benchmarks/train_step.py                                    the sizes of run_iu_xray.sh, plain and with ITHN
  python benchmarks/train_step.py --visual_extractor none            from stored features, as with --feature_cache
  python benchmarks/train_step.py --device cuda --batch_size 16 64 256 --precision float32 float16 bfloat16 \\
      --compile false true --out train_step.json
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import (
    in_rounds,
    now,
    operations,
    parser_of,
    peak_memory,
    prepare,
    print_header,
    print_row,
    product_rate,
    save,
)
from benchmarks.reference_figures import print_reference
from modules.flags import boolean
from modules.runtime.errors import run_entry_point

SIZES = ("batch_size", "views", "max_seq_length", "image_size", "vocab_size", "patches")
VARIED = ("batch_size", "views", "max_seq_length", "precision", "compile", "strategy")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=3)
    add = parser.add_argument
    add("--batch_size", type=int, nargs="+", default=[16], help="default 16")
    add("--views", type=int, nargs="+", default=[2], help="images of a study; default 2")
    add("--max_seq_length", type=int, nargs="+", default=[60], help="default 60")
    add(
        "--strategy",
        nargs="+",
        default=["off", "ithn"],
        choices=("off", "contrastive", "ithn"),
        help="default off ithn",
    )
    add("--precision", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    add("--compile", type=boolean, nargs="+", default=[False], help="default false")
    add("--model_name", default="r2gencmn", choices=("r2gen", "r2gencmn"), help="default %(default)s")
    add("--visual_extractor", default="resnet101", help="none: features are given; default %(default)s")
    add("--image_size", type=int, default=224, help="default %(default)s")
    add("--patches", type=int, default=49, help="of a view, where features are given; default %(default)s")
    add("--vocab_size", type=int, default=760, help="default %(default)s")
    return parser


@dataclasses.dataclass
class Step:
    """What one combination of settings trains: the objective, its optimiser and loss scaler, and the batch."""

    objective: Any
    optimizer: Any
    scaler: Any
    batch: Any
    device: str
    precision: str

    def passes(self) -> list[Callable[[], object]]:
        """Forward, backward and optimiser, to be called in turn, as modules/training/trainer.py does."""
        import torch

        from modules.runtime.environment import autocast

        last = []

        def forward() -> None:
            with autocast(torch.device(self.device), self.precision):
                last[:] = [self.objective(self.batch, 1)["loss"]]

        def update() -> None:
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.after_step()

        return [forward, lambda: self.scaler.scale(last.pop()).backward(), update]

    def run(self) -> None:
        """The whole step."""
        for work in self.passes():
            work()


def build_step(arguments: argparse.Namespace, device: str, case: dict[str, Any]) -> Step:
    """The objective as modules/run/build.py builds it, with published sizes and random weights and data."""
    import torch

    from models import backbone_class, settings_class
    from modules.ithn.objective import Objective
    from modules.ithn.settings import ITHNSettings
    from modules.layers.visual_extractor import VisualExtractor
    from modules.training.optimizers import build_optimizer
    from modules.training.settings import OptimSettings

    torch.backends.cudnn.benchmark = True
    if arguments.visual_extractor == "none":
        extractor = given_features(arguments.patches)
    else:
        extractor = VisualExtractor(
            arguments.visual_extractor,
            channels_last=True,
            image_size=arguments.image_size,
            unfreeze=case.get("unfreeze", ""),
        )
        if case.get("stored"):
            extractor.cut()
    kind, settings = backbone_class(arguments.model_name), settings_class(arguments.model_name)()
    model = kind(visual_extractor=extractor, num_ids=arguments.vocab_size + 1, settings=settings)
    objective = Objective(model, ITHNSettings(strategy=case["strategy"])).to(device).train()
    if case["compile"]:
        objective.compile()
    optimizer = build_optimizer(objective, OptimSettings())
    scaler = torch.amp.GradScaler(device.split(":")[0], init_scale=2.0**16 if case["precision"] == "float16" else 1.0)
    batch = random_batch(arguments, device, case, extractor)
    return Step(objective, optimizer, scaler, batch, device, case["precision"])


def given_features(patches: int):
    """Stands for an extractor whose features are stored: 2048 wide, as ResNet-101's."""
    import torch
    from torch import nn

    class GivenFeatures(nn.Module):
        width, patches_per_view = 2048, patches

        def forward(self, features: torch.Tensor, view_mask: torch.Tensor):
            """(B, N, S, C) -> what VisualExtractor makes of stored features."""
            features = features.flatten(1, 2)
            return features, None, features.mean(dim=1)

    return GivenFeatures()


def random_batch(arguments: argparse.Namespace, device: str, case: dict[str, Any], extractor: Any):
    """Normalised images, or what is stored of them, and reports of full length; hard negatives where they are used."""
    import torch

    from modules.data.batches import Batch, Pair

    rows, views, length = case["batch_size"], case["views"], case["max_seq_length"]
    shape = (arguments.patches, 2048) if arguments.visual_extractor == "none" else (3,) + (arguments.image_size,) * 2
    if case.get("stored"):
        shape = (extractor.trunk.patches_per_view, extractor.trunk.width)

    def pair() -> Pair:
        tokens = torch.randint(1, arguments.vocab_size + 1, (rows, length), device=device)
        tokens[:, 0] = tokens[:, -1] = 0
        # The mask of views stays on the CPU, as Batch.to leaves it.
        return Pair(
            torch.randn(rows, views, *shape, device=device),
            torch.ones(rows, views, dtype=torch.bool),
            tokens,
            torch.ones(rows, length, dtype=torch.bool, device=device),
        )

    with_negatives = case["strategy"] == "ithn"
    numbers = torch.arange(rows, device=device)
    return Batch(
        pair(),
        pair() if with_negatives else None,
        torch.ones_like(numbers, dtype=torch.bool),
        numbers,
        numbers,
        [""] * rows,
        [""] * rows,
    )


def extractor_alone(step: Step) -> Callable[[], object]:
    """Forward and backward of the visual extractor on every image of the batch, from a given gradient."""
    import torch

    from modules.runtime.environment import autocast

    extractor = step.objective.backbone.visual_extractor
    pairs = [pair for pair in (step.batch.positive, step.batch.negative) if pair is not None]
    images, mask = (torch.cat([getattr(pair, name) for pair in pairs]) for name in ("images", "view_mask"))

    def work() -> None:
        with autocast(torch.device(step.device), step.precision):
            patches, _, _ = extractor(images, mask)
        patches.backward(torch.ones_like(patches))
        step.optimizer.zero_grad(set_to_none=True)

    return work


def loss_module_alone(step: Step, num_ids: int) -> Callable[[], object]:
    """The objective on a backbone that returns what is given, forward and backward."""
    import torch

    from models.base import Output

    objective, batch = step.objective, step.batch
    rows, length = batch.positive.tokens.shape
    together = 2 * rows if batch.negative is not None else rows
    backbone = objective.backbone
    shapes = ((rows, length - 1, num_ids), (together, backbone.image_dim), (together, length - 1, backbone.report_dim))
    given = [torch.randn(shape, device=step.device, requires_grad=True) for shape in shapes]
    images = batch.positive.images[:, :, ..., :1]  # joining the images of both pairs is the backbone's affair

    class Given(torch.nn.Module):
        image_dim, report_dim, pad_id = backbone.image_dim, backbone.report_dim, backbone.pad_id

        def forward(self, *_, **__) -> Output:
            return Output(*given)

    alone = type(objective)(Given(), objective.settings).to(step.device).train()
    small = dataclasses.replace(
        batch,
        positive=dataclasses.replace(batch.positive, images=images),
        negative=batch.negative and dataclasses.replace(batch.negative, images=images),
    )
    return lambda: alone(small, 1)["loss"].backward()


def measure(arguments: argparse.Namespace, device: str, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the step's parts and of what is held against it, operations, and peak memory."""
    step = build_step(arguments, device, case)
    flops = operations(step.run)
    parts: dict[str, list[float]] = {name: [] for name in ("forward", "backward", "optimiser")}

    def whole() -> None:
        for name, work in zip(parts, step.passes(), strict=True):
            start = now(arguments.clock, device)
            work()
            parts[name].append(now(arguments.clock, device) - start)

    works = {"step": whole}
    if arguments.visual_extractor != "none":
        works["visual extractor alone"] = extractor_alone(step)
    if case["strategy"] != "off":
        works["loss module alone"] = loss_module_alone(step, arguments.vocab_size + 1)
    seconds = in_rounds(works, arguments.rounds, arguments.clock, device)
    seconds |= {name: values[1:] for name, values in parts.items()}
    beyond, in_all = peak_memory(step.run, device)
    rate = product_rate(device, arguments.clock, case["precision"])
    return case | {
        "seconds": seconds,
        "flops": flops,
        "product_flops": rate,
        "peak_mib": in_all,
        "peak_beyond_mib": beyond,
    }


def print_case(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table of one combination."""
    rows = result["batch_size"] * (2 if result["strategy"] == "ithn" else 1)
    images, tokens = rows * result["views"], rows * (result["max_seq_length"] - 1)
    print_header(
        f"{arguments.model_name}, {arguments.visual_extractor}: "
        + ", ".join(f"{name} {result[name]}" for name in VARIED),
        "images/s",
        "tokens/s",
        "of product",
    )
    step = statistics.median(result["seconds"]["step"])
    for name in ("step", "forward", "backward", "optimiser", "visual extractor alone", "loss module alone"):
        if name in result["seconds"]:
            whole = (
                (
                    f"{images / step:.4g}",
                    f"{tokens / step:.4g}",
                    f"{result['flops'] / step / result['product_flops']:.0%}",
                )
                if name == "step"
                else ()
            )
            print_row(name, result["seconds"][name], *whole)
    print(
        f"operations {result['flops'] / 1e12:.3f} TFLOP, matrix product {result['product_flops'] / 1e9:.0f} GFLOP/s; "
        f"peak memory {result['peak_mib']:,.0f} MiB, {result['peak_beyond_mib']:,.0f} of it by the step"
    )
    for name, ratio in ratios(result).items():
        print(f"{name}: {ratio:.3f}")


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """What the parts are to one another: medians over the rounds of the ratio within a round."""
    seconds = result["seconds"]
    found = {}
    if "visual extractor alone" in seconds:
        least = [a + b for a, b in zip(seconds["visual extractor alone"], seconds["optimiser"], strict=True)]
        found["step over extractor alone + optimiser"] = least
    if "loss module alone" in seconds:
        found["step over loss module"] = seconds["loss module alone"]
    medians = {
        name: statistics.median(a / b for a, b in zip(seconds["step"], values, strict=True))
        for name, values in found.items()
    }
    if "step over loss module" in medians:
        medians["loss module's share of the step"] = 1 / medians.pop("step over loss module")
    return medians


def main() -> None:
    """Measure every combination, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    device, made_by = prepare(arguments, SIZES)
    results = []
    for values in itertools.product(*(getattr(arguments, name) for name in VARIED)):
        result = measure(arguments, device, dict(zip(VARIED, values, strict=True)))
        print_case(result, arguments)
        results.append(result | {"ratios": ratios(result)})
        save(arguments.out, {"benchmark": "train_step", **made_by, "results": results})
    if arguments.model_name == "r2gencmn":
        print_reference("train_step")


if __name__ == "__main__":
    run_entry_point(main)
