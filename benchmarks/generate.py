"""Time of generating reports by beam search, from given patch features, and of each step by its position.

Weights are untrained, so that no report ends before the last token: the longest that a search can take. A step's time
by position shows whether the prefix is computed again. Flags that take several values are measured in all combinations.

  python benchmarks/generate.py                                              16 studies, beam 3, 60 tokens
  python benchmarks/generate.py --beam_size 1 3 5 10 --max_seq_length 60 100 --out generate.json
"""

import argparse
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
from modules.runtime.errors import run_entry_point

VARIED = ("batch_size", "beam_size", "max_seq_length", "precision")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=3)
    add = parser.add_argument
    add("--batch_size", type=int, nargs="+", default=[16], help="studies; default 16")
    add("--beam_size", type=int, nargs="+", default=[3], help="default 3")
    add("--max_seq_length", type=int, nargs="+", default=[60], help="default 60")
    add("--precision", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    add("--model_name", default="r2gencmn", choices=("r2gen", "r2gencmn"), help="default %(default)s")
    add("--patches", type=int, default=98, help="visual tokens of a study; default %(default)s")
    add("--vocab_size", type=int, default=760, help="default %(default)s")
    return parser


def build_search(
    arguments: argparse.Namespace, device: str, case: dict[str, Any], positions: list[float]
) -> Callable[[], object]:
    """A whole search; the times at which its steps begin are added to ``positions``."""
    import torch
    from torch import nn

    from models import backbone_class, settings_class
    from models.base import VisualFeatures
    from modules.decoding.options import DecodingOptions
    from modules.runtime.environment import autocast

    class NoExtractor(nn.Module):
        width = 2048

    torch.manual_seed(0)
    kind, settings = backbone_class(arguments.model_name), settings_class(arguments.model_name)()
    model = kind(visual_extractor=NoExtractor(), num_ids=arguments.vocab_size + 1, settings=settings)
    model.to(device).eval().requires_grad_(False)
    patches = torch.randn(case["batch_size"], arguments.patches, 2048, device=device)
    features = VisualFeatures(patches, None, patches.mean(dim=1))
    options = DecodingOptions(beam_size=case["beam_size"], max_seq_length=case["max_seq_length"])
    note_steps(model, lambda: positions.append(now(arguments.clock, device)))

    def search() -> None:
        with torch.inference_mode(), autocast(torch.device(device), case["precision"]):
            model.generate(None, features=features, decoding=options)
        positions.append(now(arguments.clock, device))

    return search


def note_steps(model, note: Callable[[], object]) -> None:
    """Have ``note`` called when the words of a step are embedded, which every step does once."""
    embedding = next(module for module in model.modules() if type(module).__name__ == "TokenEmbedding")
    embedding.register_forward_pre_hook(lambda *_: note())


def measure(arguments: argparse.Namespace, device: str, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of searches and of their steps, operations, and peak memory."""
    positions: list[float] = []
    search = build_search(arguments, device, case, positions)
    flops = operations(search)
    positions.clear()
    seconds = in_rounds({"search": search}, arguments.rounds, arguments.clock, device)["search"]
    length = case["max_seq_length"] + 1
    searches = [positions[start : start + length] for start in range(length, len(positions), length)]
    steps = [statistics.median(one[step + 1] - one[step] for one in searches) for step in range(length - 1)]
    beyond, in_all = peak_memory(search, device)
    return case | {
        "seconds": seconds,
        "step_seconds": steps,
        "flops": flops,
        "product_flops": product_rate(device, arguments.clock, case["precision"]),
        "peak_mib": in_all,
        "peak_beyond_mib": beyond,
    }


def print_case(result: dict[str, Any], model_name: str) -> None:
    """The table of one combination."""
    print_header(f"{model_name}: " + ", ".join(f"{name} {result[name]}" for name in VARIED), "tokens/s", "of product")
    studies, steps = result["batch_size"], result["step_seconds"]
    median = statistics.median(result["seconds"])
    share = f"{result['flops'] / median / result['product_flops']:.0%}"
    print_row("search", result["seconds"], f"{studies * result['max_seq_length'] / median:.4g}", share)
    print_row("per study", [value / studies for value in result["seconds"]])
    for first in range(0, len(steps), 10):
        print_row(f"a step, positions {first} to {min(first + 10, len(steps)) - 1}", steps[first : first + 10])
    print(
        f"operations {result['flops'] / 1e9:.1f} GFLOP, matrix product {result['product_flops'] / 1e9:.0f} GFLOP/s; "
        f"peak memory {result['peak_mib']:,.0f} MiB, {result['peak_beyond_mib']:,.0f} of it by the search"
    )


def main() -> None:
    """Measure every combination, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    device, made_by = prepare(arguments, ("batch_size", "beam_size", "max_seq_length", "patches", "vocab_size"))
    results = []
    for values in itertools.product(*(getattr(arguments, name) for name in VARIED)):
        results.append(measure(arguments, device, dict(zip(VARIED, values, strict=True))))
        print_case(results[-1], arguments.model_name)
        save(arguments.out, {"benchmark": "generate", **made_by, "results": results})
    if arguments.model_name == "r2gencmn":
        print_reference("generate")


if __name__ == "__main__":
    run_entry_point(main)
