"""A page on this machine to try a model: drop a radiograph, read its report, see where the model looked.

  pip install -r requirements-serve.txt
  python scripts/serve.py --load results/iu_xray/model_best.pth
  python scripts/serve.py --load results/iu_xray/model_best.pth --index results/iu_xray/reports.safetensors

It answers this machine alone (127.0.0.1), and keeps nothing. With --index (scripts/index_reports.py) the reports of
the training images that look most alike stand below. This is research software and no medical device.
"""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser, add_flags
from modules.run.study_arguments import checkpoint_name, given_flags, require_checkpoint
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point

if TYPE_CHECKING:
    from modules.inference.prediction import Reporter
    from modules.inference.report_index import ReportIndex

RUNNING = ("device", "n_gpu", "precision", "max_seq_length", "beam_size", "guidance")
SIMILAR = 3  # training reports shown below


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--load", required=True, metavar="PTH", help="a checkpoint of main_train.py: model_best.pth")
    parser.add_argument("--index", metavar="FILE", help="training reports to show beside, by scripts/index_reports.py")
    parser.add_argument(
        "--port",
        type=int,
        default=7860,
        metavar="INT",
        help="port on 127.0.0.1; 0 takes any that is free (default: %(default)s)",
    )
    add_flags(parser, RUNNING)
    return parser


def main() -> None:
    """Load the model, then serve the page until interrupted."""
    check_python()
    arguments = build_parser().parse_args()
    require_checkpoint(arguments.load)
    require_extra()
    from modules.inference.prediction import WARNING
    from modules.inference.report_index import ReportIndex
    from modules.pages.local_page import LOOPBACK, build_app, upload_folder
    from modules.run.reporter import load_reporter

    print(WARNING, file=sys.stderr)
    reporter = load_reporter(arguments.load, given_flags(arguments, RUNNING))
    index = None
    if arguments.index:
        index = ReportIndex.load(arguments.index)
        index.check(arguments.index, reporter.extractor_sha256(), reporter.backbone.image_dim)
    with tempfile.TemporaryDirectory(prefix="uploads-", dir=upload_folder()) as folder, listening(arguments.port) as at:
        # Read by gradio when it is imported.
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
        app = build_app(
            Writer(reporter, index, checkpoint_name(arguments.load)),
            num_views=reporter.num_views,
            checkpoint=checkpoint_name(arguments.load),
            beam_size=reporter.decoding.beam_size,
        )
        import uvicorn

        # The server hands the signal on when it has shut down: the folder must still be deleted then.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        print(f"open http://{LOOPBACK}:{at.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[at])


def require_extra() -> None:
    """InputError where the packages of the page are not installed."""
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise InputError("scripts/serve.py needs gradio: pip install -r requirements-serve.txt")


def listening(port: int):
    """A socket that listens on loopback; InputError where the port is taken."""
    import socket

    from modules.pages.local_page import LOOPBACK

    try:
        return socket.create_server((LOOPBACK, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: cannot be listened on ({error}); choose another, or 0") from error


class Writer:
    """Turns dropped files into the page that shows their reports."""

    def __init__(self, reporter: "Reporter", index: "ReportIndex | None", checkpoint: str):
        self.reporter, self.index, self.checkpoint = reporter, index, checkpoint

    def __call__(self, paths: Sequence[Path], together: bool, beam_size: int) -> str:
        from modules.data.images import open_image
        from modules.pages.prediction_page import PageStudy, render_page

        self.reporter.decoding = dataclasses.replace(self.reporter.decoding, beam_size=beam_size, group_size=1)
        groups = [list(paths)] if together else [[path] for path in paths]
        for group in groups:
            if len(group) > self.reporter.num_views:
                raise InputError(f"{len(group)} images for one study, but this model reads {self.reporter.num_views}")
        names = [", ".join(path.name for path in group) for group in groups]
        studies = []
        for name, group in zip(names, groups, strict=True):
            try:
                images = [open_image(path) for path in group]
            except InputError as error:
                # Not where it lies: the browser's user knows the file by its name.
                raise InputError(str(error).replace(str(group[0].parent) + "/", "")) from error
            [report] = self.reporter.write([images], attention=self.reporter.shows_attention)
            similar = self.index.nearest(report.pooled, SIMILAR) if self.index is not None else ()
            studies.append(PageStudy.of(name, images, report, similar))
        return render_page(studies, title="Generated reports", checkpoint=self.checkpoint)


if __name__ == "__main__":
    run_entry_point(main)
