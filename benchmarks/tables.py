"""Writes tables.md from the JSON files of benchmarks/run_all.sh: what each stage costs, and what follows for an epoch.

python benchmarks/tables.py benchmarks/results
python benchmarks/tables.py benchmarks/results --readme benchmarks/README.md      # and what gpu_check.py found, there
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.reference_figures import PRODUCT_FLOPS, SECONDS, TRAINING_PEAK_MIB
from modules.flags import Parser
from modules.runtime.errors import InputError, run_entry_point

GPU = ("<!-- GPU -->", "<!-- end of GPU -->")  # where the table of scripts/gpu_check.py lies in a page
MIMIC_IMAGES = 270_790  # of R2Gen's training split, one image a sample


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the JSON files; tables.md is written into it")
    parser.add_argument(
        "--readme", type=Path, help=f"page that gets the table of scripts/gpu_check.py, between {GPU[0]} and {GPU[1]}"
    )
    return parser


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table under its title."""
    lines = ["", f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def spread(seconds: Sequence[float]) -> str:
    """Median, fastest and slowest."""
    return f"{statistics.median(seconds):.4g} ({min(seconds):.4g} to {max(seconds):.4g})"


def training(result: dict[str, Any]) -> list[str]:
    """Every combination of settings with its parts."""
    rows = []
    for case in result["results"]:
        step = statistics.median(case["seconds"]["step"])
        images = case["batch_size"] * case["views"] * (2 if case["strategy"] == "ithn" else 1)
        setting = (
            f"batch {case['batch_size']}, {case['views']} views, {case['max_seq_length']} tokens, "
            f"{case['precision']}, strategy {case['strategy']}"
        )
        share = f"{case['flops'] / step / case['product_flops']:.0%}"
        ratios = "; ".join(f"{name} {value:.3f}" for name, value in case["ratios"].items())
        rows.append(
            (
                setting,
                spread(case["seconds"]["step"]),
                f"{images / step:.3g}",
                share,
                f"{case['peak_mib']:,.0f}",
                ratios,
            )
        )
        rows += [
            (f"- {name}", spread(values), "", "", "", "") for name, values in case["seconds"].items() if name != "step"
        ]
    extractor = result["settings"]["visual_extractor"]
    title = f"Training step, {result['settings']['model_name']}, " + (
        "features given" if extractor == "none" else extractor
    )
    return table(title, ("", "seconds: median (range)", "images/s", "of matrix product", "peak MiB", "ratios"), rows)


def generation(result: dict[str, Any]) -> list[str]:
    """Searches, with their first and last steps."""
    rows = []
    for case in result["results"]:
        steps, median = case["step_seconds"], statistics.median(case["seconds"])
        tenth = max(1, len(steps) // 10)
        rows.append(
            (
                f"{case['batch_size']} studies, beam {case['beam_size']}, {case['max_seq_length']} tokens",
                spread([seconds / case["batch_size"] for seconds in case["seconds"]]),
                f"{case['batch_size'] * case['max_seq_length'] / median:,.0f}",
                *(f"{1000 * statistics.median(part):.1f}" for part in (steps[1 : tenth + 1], steps[-tenth:])),
            )
        )
    return table(
        "Beam search, features given",
        ("", "seconds per study", "tokens/s", "ms per step, first tenth", "last tenth"),
        rows,
    )


def images(result: dict[str, Any]) -> list[str]:
    """Images per second of one core."""
    rows = []
    for case in result["results"]:
        base = statistics.median(case["seconds"]["torchvision"])
        same = "same bits" if case["bit_equal"] else "DIFFERENT bits"
        for name, seconds in case["seconds"].items():
            rows.append(
                (
                    f"{case['format']} {case['channels']} {case['size']} px ({same}): {name}"
                    + (f", {case['draft_grey_levels']:.2f} grey levels off" if "draft" in name else ""),
                    f"{case['images'] / statistics.median(seconds):,.0f}",
                    f"{base / statistics.median(seconds):.1f}",
                )
            )
    return table("Images from file to training tensor", ("", "images/s", "times torchvision's pipeline"), rows)


def mining(result: dict[str, Any]) -> list[str]:
    """Seconds and rates by number of reports."""
    rows = []
    for case in result["search"]:
        rate = 2 * case["rows"] ** 2 * case["width"] / statistics.median(case["search_seconds"])
        rows.append(
            (
                f"{case['rows']:,} x {case['width']}",
                spread(case["search_seconds"]),
                f"{rate / 1e9:.0f}",
                f"{rate / case['product_flops']:.0%}",
                f"{case['search_peak_mib']:.0f}",
            )
        )
    return table("Mining", ("", "seconds", "GFLOP/s", "of matrix product", "MiB beside the embeddings"), rows)


def evaluation(result: dict[str, Any]) -> list[str]:
    """Shares of the parts."""
    rows = []
    for case in result["results"]:
        whole = statistics.median(case["seconds"]["all"])
        rows += [
            (
                f"{case['reports']:,} reports, {case['java_starts']} Java process: {name}",
                spread(seconds),
                f"{statistics.median(seconds) / whole:.0%}",
            )
            for name, seconds in case["seconds"].items()
        ]
    return table("Evaluation", ("", "seconds", "share"), rows)


def startup(result: dict[str, Any]) -> list[str]:
    """Seconds to help."""
    return table("Start-up", ("", "seconds"), [(name, spread(values)) for name, values in result["seconds"].items()])


def beside_reference(result: dict[str, Any]) -> list[str]:
    """The plain step at the published sizes beside the public code on another machine, in units of matrix products."""
    sizes = {"batch_size": 16, "views": 2, "max_seq_length": 60, "strategy": "off", "precision": "float32"}
    case = next((one for one in result["results"] if all(one[name] == value for name, value in sizes.items())), None)
    if case is None:
        return []
    step = statistics.median(case["seconds"]["step"])
    theirs = next(iter(SECONDS["train_step"].values()))
    rows = [
        (
            "public code, another machine",
            f"{theirs:.1f}",
            f"{PRODUCT_FLOPS / 1e9:.0f}",
            f"{theirs * PRODUCT_FLOPS / 1e12:.2f}",
            f"{TRAINING_PEAK_MIB:,.0f}",
        ),
        (
            "this code, this machine",
            f"{step:.1f}",
            f"{case['product_flops'] / 1e9:.0f}",
            f"{step * case['product_flops'] / 1e12:.2f}",
            f"{case['peak_mib']:,.0f}",
        ),
    ]
    per_image = step / (case["batch_size"] * case["views"])
    flops = case["flops"] / (case["batch_size"] * case["views"])
    lines = table(
        "Beside the public R2GenCMN code",
        (
            "training step, batch 16",
            "seconds",
            "GFLOP/s of its machine",
            "TFLOP of matrix products in that time",
            "peak MiB",
        ),
        rows,
    )
    return lines + [
        "",
        "## An epoch of MIMIC-CXR, extrapolated",
        "",
        f"On this machine: {MIMIC_IMAGES:,} images x {per_image:.3f} s = "
        f"{MIMIC_IMAGES * per_image / 3600:.1f} hours, reading not counted.",
        f"Elsewhere: {flops / 1e9:.1f} GFLOP per image x {MIMIC_IMAGES:,} = "
        f"{flops * MIMIC_IMAGES / 1e15:.2f} PFLOP; divided by what the device sustains (its matrix-product "
        "rate times the share that `--device cuda` measures there). ITHN: twice that, for the negatives.",
        "No GPU was measured.",
    ]


def gpu(result: dict[str, Any]) -> list[str]:
    """What scripts/gpu_check.py found on one card."""
    marks = {True: "", False: "**BAD** ", None: ""}
    title = f"On {result['device_name']}" + (", tiny sizes (--quick)" if result["settings"]["quick"] else "")
    rows = [(row["section"], row["what"], marks[row["ok"]] + row["value"]) for row in result["rows"]]
    return table(title, ("", "", ""), rows)


def into_page(page: str, lines: Sequence[str]) -> str:
    """``page`` with ``lines`` between the two marks; InputError where it has no place for them."""
    before, start, rest = page.partition(GPU[0])
    _, end, after = rest.partition(GPU[1])
    if not (start and end):
        raise InputError(f"--readme: the page has no {GPU[0]} before {GPU[1]}")
    return before + start + "\n" + "\n".join(lines).strip() + "\n" + end + after


WRITERS = {
    "startup": startup,
    "train_step": training,
    "train_step_bfloat16": training,
    "train_step_features": training,
    "generate": generation,
    "generate_beams": generation,
    "generate_lengths": generation,
    "images_png": images,
    "images_jpeg": images,
    "images_large_jpeg": images,
    "mine": mining,
    "evaluate": evaluation,
    "gpu_check": gpu,
}


def write(folder: Path) -> Path:
    """All tables whose files are there; InputError where there is none."""
    found = {name: folder / f"{name}.json" for name in WRITERS if (folder / f"{name}.json").is_file()}
    if not found:
        raise InputError(f"{folder} holds none of the JSON files that benchmarks/run_all.sh writes")
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}
    first = next(iter(results.values()))
    lines = [
        "# Measured",
        "",
        f"{first['device_name']}, {first['threads']} thread(s), torch "
        f"{first['packages']['torch']}, {first['clock']} time, {first['created'][:10]}.",
    ]
    if "train_step" in results:
        lines += beside_reference(results["train_step"])
    for name, result in results.items():
        lines += WRITERS[name](result)
    target = folder / "tables.md"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Write and say where."""
    arguments = build_parser().parse_args()
    print(write(arguments.folder))
    if arguments.readme:
        found = arguments.folder / "gpu_check.json"
        if not found.is_file():
            raise InputError(f"{found}: no such file; python scripts/gpu_check.py --out {found} makes it, on a GPU")
        lines = gpu(json.loads(found.read_text(encoding="utf-8")))
        arguments.readme.write_text(into_page(arguments.readme.read_text(encoding="utf-8"), lines), encoding="utf-8")
        print(arguments.readme)


if __name__ == "__main__":
    run_entry_point(main)
