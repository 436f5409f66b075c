"""Train a report generator, with ITHN or without: ``python main_train.py --help`` lists the flags.

``--n_gpu 8`` trains in 8 processes, a GPU each; so does ``torchrun --nproc_per_node 8 main_train.py ...``, which also
spans machines (docs/CLUSTER.md).
"""

import sys

from modules.flags import parse_flags, resolve_config
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.launch import launched, process_number, start_processes
from modules.runtime.stopping import GracefulShutdown


def main() -> int:
    """Read the flags, then compose and run, or start the processes that do."""
    check_python()
    given, ignored = parse_flags(sys.argv[1:], "main_train.py", __doc__.split(":")[0])
    if not (given.get("resume") or given.get("load")):
        # Mistakes are found before torch is imported, which takes seconds; a checkpoint's settings are defaults.
        resolve_config(given)
    device, count, restarts = given.get("device", "auto"), given.get("n_gpu", 1), given.get("max_restarts", 0)
    if restarts and given.get("resume") != "auto":
        raise InputError(f"--max_restarts {restarts}: needs --resume auto, so that a restart continues")
    if (count > 1 or restarts) and not launched():
        return start_processes(max(1, count), device=device, max_restarts=restarts)
    with GracefulShutdown(leads=process_number() == 0) as shutdown:
        from modules.run.training import run_training
        from modules.runtime.distributed import processes

        with processes(device, shutdown):
            run_training(given, ignored, shutdown)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
