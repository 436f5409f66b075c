"""Test a checkpoint: ``python main_test.py --load results/iu_xray/model_best.pth`` writes the scores and report.html.

This project's checkpoints hold their settings, so ``--load`` alone is enough; command-line flags override them. A
published checkpoint of R2Gen, R2GenCMN, XProNet or the released ITHN needs the flags it was trained with:
``--backbone`` sets those of its paper, and XProNet's needs ``--xpronet_labels reference`` and ``--label_path`` too.
Several processes (``--n_gpu``, or torchrun) share the studies; the scores are the same.
"""

import sys

from modules.flags import parse_flags
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.launch import launched, process_number, start_processes
from modules.runtime.stopping import GracefulShutdown


def main() -> int:
    """Read the flags, load the checkpoint, generate the test split's reports, score them, write the results."""
    check_python()
    given, ignored = parse_flags(sys.argv[1:], "main_test.py", __doc__, testing=True)
    if not given.get("load"):
        raise InputError("--load is missing: name the checkpoint to test, as in --load results/iu_xray/model_best.pth")
    device, count = given.get("device", "auto"), given.get("n_gpu", 1)
    if count > 1 and not launched():
        return start_processes(count, device=device)
    with GracefulShutdown(leads=process_number() == 0) as shutdown:
        from modules.run.testing import run_testing
        from modules.runtime.distributed import processes

        with processes(device, shutdown):
            run_testing(given, ignored)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
