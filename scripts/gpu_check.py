"""Everything that only a GPU can show, in one table and in less than six minutes; nothing is downloaded.

Values against the CPU's, fused kernels against the plain computation, places at which a step waits for the GPU,
milliseconds of a training step by precision, memory layout, batch, --compile and CUDA graph with their share of the
best product of matrices, decoding, reading images, memory, determinism. Weights and images are random. Exit status: 0;
1 where a line says BAD; 2 without a GPU.

  python scripts/gpu_check.py --out benchmarks/results/gpu_check.json
  python benchmarks/tables.py benchmarks/results --readme benchmarks/README.md      # puts the table there
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import save
from modules.flags import Parser
from modules.runtime.environment import check_python, choose_device, provenance, why_no_cuda
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

MARKS = {True: "ok", False: "BAD", None: ""}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--device", default="cuda:0", metavar="cuda:N", help="the GPU to look at (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write, which benchmarks/tables.py reads")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does every check run?")
    return parser


def main() -> int:
    """Run every check, print a line for each row as it comes, and write the JSON file."""
    check_python()
    arguments = build_parser().parse_args()
    check_outputs([Output("--out", arguments.out, "a result of a benchmark", contains('"benchmark":', '"rows":'))])
    import torch

    if not arguments.device.startswith("cuda"):
        raise InputError(f"--device {arguments.device}: this program looks at a GPU: cuda or cuda:N")
    if not torch.cuda.is_available():
        raise InputError(f"no GPU to check: {why_no_cuda(torch.__version__, torch.version.cuda)}")
    device = choose_device(arguments.device)
    from benchmarks.gpu_checks import Run, as_json, rows

    found, section = [], ""
    torch.cuda.set_device(device)
    run = Run(device, arguments.quick)
    for row in rows(run):
        if row.section != section:
            section = row.section
            print(f"\n{section}")
        print(f"  {MARKS[row.ok]:<4}{row.what:<72}{row.value}", flush=True)
        found.append(row)
    bad = sum(row.ok is False for row in found)
    print(f"\n{sum(row.ok is True for row in found)} ok, {bad} BAD, {run.seconds - run.left():.0f} s")
    made_by = {**provenance(str(device)), "threads": torch.get_num_threads(), "clock": "wall"}
    save(
        arguments.out,
        {"benchmark": "gpu_check", **made_by, "settings": {"quick": arguments.quick}, "rows": as_json(found)},
    )
    return 1 if bad else 0


if __name__ == "__main__":
    run_entry_point(main)
