"""Train a report generator, with ITHN or without: ``python main_train.py --help`` lists the flags."""

import sys

from modules.environment import check_python
from modules.errors import run_entry_point
from modules.flags import parse_flags, resolve_config
from modules.stopping import Stop


def main() -> None:
    """Read the flags, then compose and run."""
    check_python()
    given, ignored = parse_flags(sys.argv[1:], "main_train.py", __doc__.split(":")[0])
    if not given.get("resume"):
        # Mistakes are found before torch is imported, which takes seconds.
        resolve_config(given)
    with Stop() as stop:
        from scripts.training import run_training

        run_training(given, ignored, stop)


if __name__ == "__main__":
    run_entry_point(main)
