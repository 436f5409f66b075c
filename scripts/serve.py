"""A page on this machine to try a model: drop a radiograph, read its report, see where the model looked.

  pip install -r requirements/serve.txt
  python scripts/serve.py --load results/iu_xray/model_best.pth
  python scripts/serve.py --load results/iu_xray/model_best.pth --index results/iu_xray/reports.safetensors

It prints an address with a secret in it, answers only those who know it, on this machine (127.0.0.1), and keeps
nothing. With --index (scripts/index_reports.py) the reports of the training images that look most alike are shown
below. This is research software and no medical device.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser, add_flags, given_flags
from modules.inference.study_files import checkpoint_name, require_model
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from modules.study_flags import add_load

RUNNING = (
    "device",
    "n_gpu",
    "precision",
    "max_seq_length",
    "beam_size",
    "guidance",
    "block_trigrams",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "min_length",
    "length_penalty",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add_load(parser)
    parser.add_argument("--index", metavar="FILE", help="training reports to show as well, by scripts/index_reports.py")
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="INT",
        help="port on 127.0.0.1; 0 takes any that is free (default: %(default)s)",
    )
    parser.add_argument(
        "--time_limit",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="a request that takes longer is given up (default: %(default)s)",
    )
    add_flags(parser, RUNNING)
    return parser


def main() -> None:
    """Load the model, then serve the page until interrupted."""
    check_python()
    arguments = build_parser().parse_args()
    require_model(arguments.load)
    require_extra()
    if not 0 < arguments.time_limit < float("inf"):
        raise InputError(f"--time_limit {arguments.time_limit:g}: must be a positive number of seconds")
    import secrets

    from modules.inference.prediction import WARNING
    from modules.pages.local_page import LOOPBACK, LocalPage, listen, run_server
    from modules.run.serving import report_writer
    from modules.runtime.answering import AnsweringProcess

    print(WARNING, file=sys.stderr)
    given = given_flags(arguments, RUNNING)
    with listen(arguments.port) as socket:
        port = socket.getsockname()[1]
        worker = AnsweringProcess(report_writer, arguments.load, given, arguments.index, timeout=arguments.time_limit)
        try:
            model = worker.wait_until_ready()
            page = LocalPage(
                worker.ask,
                token=(token := secrets.token_urlsafe(24)),
                port=port,
                checkpoint=checkpoint_name(arguments.load),
                **model,
            )
            print(f"open http://{LOOPBACK}:{port}/{token}/ (Ctrl-C ends it)", flush=True)
            run_server(page, [socket])
        finally:
            worker.close()


def require_extra() -> None:
    """InputError where the packages of the page are not installed."""
    import importlib.util

    if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn")):
        raise InputError("scripts/serve.py needs starlette and uvicorn: pip install -r requirements/serve.txt")


if __name__ == "__main__":
    run_entry_point(main)
