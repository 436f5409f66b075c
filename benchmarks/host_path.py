"""What the GPU path does on the host, counted on a null CUDA device and held against benchmarks/host_budgets.json.

Counts need no GPU: calls that wait for the device, launches, copies, graphs that --compile makes. Sizes are narrow and
as deep as published, on which launches depend. The milliseconds are estimates: launches times 7 microseconds of host
time. Needs gcc and the CUDA build of torch.

  python benchmarks/host_path.py                       the table of budgets
  python benchmarks/host_path.py --out host_path.json  and every case's counts
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import null_device
from modules.flags import Parser
from modules.runtime.errors import run_entry_point

BUDGETS = Path(__file__).with_name("host_budgets.json")
MICROSECONDS = 7  # of host time for a launch in eager mode: an assumption
LAUNCHES = ("launches", "products", "fills", "device_copies", "pinned_uploads", "unpinned_uploads", "graph_launches")
COPIES = ("pinned_uploads", "unpinned_uploads", "downloads")
# How objectives differ on the host.
STRATEGIES: dict[str, dict[str, Any]] = {
    "off": {"strategy": "off"},
    "ithn": {"strategy": "ithn"},
    "mochi": {"strategy": "mochi"},
    "prior": {"strategy": "prior"},
    "unconstrained": {"strategy": "unconstrained"},
    "contrastive": {"strategy": "contrastive"},
    "encoder": {"strategy": "contrastive", "contrastive_features": "encoder"},
    "released": {"strategy": "ithn", "ithn_variant": "released"},
    "previous epoch": {"strategy": "ithn", "previous_epoch_start": True, "mask_identical": True},
}
# What else a step can be, with ITHN.
VARIATIONS: dict[str, dict[str, Any]] = {
    "views missing": {"missing_views": True},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "clipped": {"optim": {"clip_norm": 1.0, "clip_value": 0.1}},
    "accumulated": {"batches": 2},
    "extractor frozen": {"frozen": True},
    "SGD": {"optim": {"optim": "SGD"}},
    "accumulated in two processes": {"processes": 2},
}
# With --quick: where backbones, not strategies, make the difference.
QUICK = ("ithn", "encoder", "views missing", "float16", "accumulated in two processes")
SEARCHES: dict[str, dict[str, Any]] = {
    "beam 3": {"beam_size": 3},
    "guided beam 3": {"beam_size": 3, "guidance": 0.5},
    "diverse beam 4": {"beam_size": 4, "group_size": 2},
    "greedy": {"sample_method": "greedy"},
    "sampled": {"sample_method": "sample", "sample_n": 2},
}
# Whose launches are counted, with the visual extractor of the published settings.
DEEP = (("ithn", "bfloat16"), ("ithn", "float32"), ("off", "bfloat16"), ("off", "float32"))
NAMED = [("hf", "views missing")]  # transformers asks whether a mask hides anything
STEPS_TO_THE_GUARD = 51  # the guard against what is not finite looks at 25 steps at a time


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a selection of the cases, in seconds")
    return parser


def total(counts: Mapping[str, int]) -> int:
    """Everything that the host hands to the device: kernels, products, fills, copies, whole graphs."""
    return sum(counts.get(name, 0) for name in LAUNCHES)


def measure(quick: bool = False) -> Iterator[tuple[str, str, str, Counter[str]]]:
    """Kind, backbone, case and counts of everything that is counted; on the null device only."""
    from benchmarks.host_cases import NARROW, StepCase, Steps, graphs, recurrence, search

    null = null_device.prepare()
    deep, shallow = Steps(null, "resnet101"), Steps(null, "resnet18")
    for name in NARROW:
        for strategy, precision in DEEP[:1] if quick else DEEP:
            case = StepCase(name, STRATEGIES[strategy], precision=precision)
            yield "deep step", name, f"{strategy} {precision}", deep.take(case)
        short = QUICK if quick and name != "r2gencmn" else (*STRATEGIES, *VARIATIONS)
        for label, settings in ((label, STRATEGIES[label]) for label in STRATEGIES if label in short):
            yield "step", name, label, shallow.take(StepCase(name, settings))
        for label, changed in ((label, VARIATIONS[label]) for label in VARIATIONS if label in short):
            kind = "named wait" if (name, label) in NAMED else "step"
            yield kind, name, label, shallow.take(StepCase(name, STRATEGIES["ithn"], **changed))
        recorded = StepCase(name, STRATEGIES["ithn"], precision="bfloat16", cuda_graph=True)
        yield "replayed step", name, "ithn bfloat16", shallow.take(recorded)
        for label, decoding in list(SEARCHES.items())[:1] if quick else SEARCHES.items():
            yield "search", name, label, search(null, name, masked=name != "hf", **decoding)
        if not quick:
            number, _ = graphs(name, STRATEGIES["ithn"], shallow.device)
            yield "graphs", name, "20 epochs", Counter(graphs=number)
    yield "recurrence", "r2gen", "forward and backward", recurrence(null, shallow.device)
    many = shallow.take(StepCase("r2gencmn", STRATEGIES["ithn"]), steps=STEPS_TO_THE_GUARD)
    yield "step", "r2gencmn", f"{STEPS_TO_THE_GUARD} steps", many
    yield "named wait", "r2gencmn", "RAdam", shallow.take(StepCase("r2gencmn", optim={"optim": "RAdam"}))
    bn = StepCase("r2gencmn", settings={"use_bn": 2}, missing_views=True)
    yield "named wait", "r2gencmn", "use_bn, views missing", shallow.take(bn)


def held_against(
    budgets: Mapping[str, Any], measured: Sequence[tuple[str, str, str, Mapping[str, int]]]
) -> list[list[str]]:
    """Rows of the table: what, counted, budget, and "over" where it is exceeded."""
    rows = []

    def row(what: str, counted: float, budget: float, note: str = "") -> None:
        rows.append([what, f"{counted:g}", f"{budget:g}", note, "over" if counted > budget else ""])

    for kind, name, case, counts in measured:
        own = budgets["backbones"][name]
        if kind == "deep step":
            milliseconds = f"{total(counts) * MICROSECONDS / 1000:.0f} ms of host time, estimated"
            row(f"{name}: launches of a step, {case}", total(counts), own["launches of a step"][case], milliseconds)
            copies = sum(counts.get(copy, 0) for copy in COPIES)
            row(f"{name}: copies between host and device in a step, {case}", copies, budgets["copies of a step"])
        elif kind == "replayed step":
            row(f"{name}: launches of a step with --cuda_graph, {case}", total(counts), budgets["launches of a replay"])
        elif kind == "recurrence":
            row(f"{name}: launches of the recurrence in a step", total(counts), own["launches of the recurrence"])
        elif kind == "graphs":
            row(f"{name}: graphs of {case} with --compile and ITHN", counts["graphs"], own["graphs of 20 epochs"])
        elif kind == "search":
            row(f"{name}: waits of a search, {case}", counts.get("waits", 0), budgets["waits of a search"])
            if case in own["launches of a token"]:
                row(f"{name}: launches of a token, {case}", total(counts) / 60, own["launches of a token"][case])
    for kind, budget in (("step", 0), ("deep step", 0), ("replayed step", 0), ("named wait", 1)):
        if not (cases := [counts for own, _, _, counts in measured if own == kind]):
            continue
        row(
            f"waits in the worst of {len(cases)} cases: {kind}", max(counts.get("waits", 0) for counts in cases), budget
        )
        unpinned = max(counts.get("unpinned_uploads", 0) for counts in cases)
        row(f"unpinned uploads in the worst of {len(cases)} cases: {kind}", unpinned, 0)
    return rows


def main() -> None:
    arguments = build_parser().parse_args()
    null_device.start_on_it()
    measured = list(measure(arguments.quick))
    rows = held_against(json.loads(BUDGETS.read_text(encoding="utf-8")), measured)
    print("counts on a null device, whose kernels do nothing; seconds are estimates")
    for what, counted, budget, note, over in [["", "counted", "budget", "", ""], *rows]:
        print(f"{what:<66}{counted:>9}{budget:>9}  {over}{note}")
    result = {"cases": [[*case, dict(counts)] for *case, counts in measured], "over": [row for row in rows if row[4]]}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_entry_point(main)
