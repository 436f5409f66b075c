"""Look at this machine before training does: each line says ok, or what to do. Nothing is downloaded or changed.

A "note" is something that works, but not as well as it might. Exit status: 0, or 1 where a line is a problem.
"""

import argparse
import json
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  # the modules below would fail with a traceback there
    sys.exit("problem  python: {}.{} is too old, 3.11 or newer is needed: bash setup.sh".format(*sys.version_info))

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser
from modules.runtime import health
from modules.runtime.errors import run_entry_point


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--text_encoder",
        default="zzxslp/RadBERT-RoBERTa-4m",
        metavar="NAME",
        help="the encoder that mining will use: hub id, folder or tfidf (default %(default)s)",
    )
    parser.add_argument(
        "--visual_extractor",
        default="resnet101",
        metavar="NAME",
        help="the visual extractor that training will use (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def main() -> int:
    """Run every check, print a line for each."""
    arguments = build_parser().parse_args()
    findings = health.examine(
        [
            ("python", health.python),
            ("packages", health.packages),
            ("gpu", health.gpu),
            ("meteor", health.meteor),
            ("text encoder", lambda: health.text_encoder(arguments.text_encoder)),
            ("visual extractor", lambda: health.visual_extractor(arguments.visual_extractor)),
            ("dicom", health.dicom),
            ("disk", health.disk),
            ("permissions", health.permissions),
            ("workers", health.workers),
        ]
    )
    problems = [finding for finding in findings if finding.state == health.PROBLEM]
    if arguments.json:
        print(json.dumps({"ok": not problems, "findings": [vars(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.check}: {finding.text}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    run_entry_point(main)
