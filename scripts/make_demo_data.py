"""Draw SYNTHETIC chest radiographs, frontal and lateral, from structured findings, and write their reports.

The same seed gives the same files with any number of workers (and the same versions of numpy and Pillow).

--findings takes a CSV with one row per finding: id,finding,kind,side,zone,size,severity (README.txt in the output
folder lists the values). A study without findings has one row "No Finding"; what is left empty is drawn at random.
The findings.csv of an earlier folder will do: edit a copy of it elsewhere, and name another --out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.dataset_specs import write_description
from modules.flags import Parser
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import check_outside
from modules.runtime.run_log import Bar
from scripts.synthetic.drawing_arguments import add_drawing_arguments, check_drawing


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add_drawing_arguments(parser)
    parser.add_argument("--studies", type=int, metavar="N", help="number of studies to sample (default 600)")
    parser.add_argument(
        "--normal_fraction",
        type=float,
        metavar="P",
        help="share of studies without findings (default 0.6, as in IU X-Ray)",
    )
    parser.add_argument(
        "--departments",
        action="store_true",
        help="films carry the empty identification plate of the department whose radiologist dictates, as a real "
        "film often shows where it was made; without it nothing in an image says how its report is worded",
    )
    parser.add_argument("--findings", type=Path, metavar="CSV", help="draw these findings instead of sampling")
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="FILE",
        help="reports for the studies of --findings: CSV (id,report[,split]) or annotation.json",
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """InputError for values that cannot work together or at all."""
    if arguments.findings is None and arguments.reports is not None:
        raise InputError("--reports needs --findings: a report must belong to given findings")
    for flag in ("studies", "normal_fraction"):
        if arguments.findings is not None and getattr(arguments, flag) is not None:
            raise InputError(f"--{flag} does not go with --findings: the CSV says which studies there are")
    studies = 600 if arguments.studies is None else arguments.studies
    normal_fraction = 0.6 if arguments.normal_fraction is None else arguments.normal_fraction
    if studies < 3:
        raise InputError(f"--studies {studies}: must be 3 or more, one for each of train, val and test")
    if not 0 <= normal_fraction <= 1:
        raise InputError(f"--normal_fraction {normal_fraction}: must lie between 0 and 1")
    check_drawing(arguments)
    check_outside(arguments.out, [("--findings", arguments.findings), ("--reports", arguments.reports)])
    arguments.studies, arguments.normal_fraction = studies, normal_fraction


def main() -> None:
    """Plan the studies, draw them behind a progress bar, write the tables."""
    arguments = build_parser().parse_args()
    check(arguments)

    from scripts.synthetic.dataset import draw_images, plan_studies, prepare_folder, require_splits, write_tables
    from scripts.synthetic.findings_csv import describe_format, read_findings
    from scripts.synthetic.given_reports import read_reports

    findings = None if arguments.findings is None else read_findings(arguments.findings)
    reports = None if arguments.reports is None else read_reports(arguments.reports, findings)
    studies = plan_studies(
        seed=arguments.seed,
        number=arguments.studies,
        normal_fraction=arguments.normal_fraction,
        findings=findings,
        reports=reports,
        departments=arguments.departments,
    )
    if findings is not None:
        require_splits(studies, f"--reports {arguments.reports}" if reports else f"--findings {arguments.findings}")
    prepare_folder(arguments.out)
    drawn = draw_images(arguments.out, studies, seed=arguments.seed, size=arguments.size, workers=arguments.workers)
    for _ in Bar(drawn, "synthetic studies", total=len(studies)):
        pass
    if findings is None:
        origin = f"sampled with --normal_fraction {arguments.normal_fraction}"
    else:
        origin = f"drawn from {arguments.findings.name}"
    origin += ", --departments" * arguments.departments
    origin = f"{len(studies)} studies {origin}, --seed {arguments.seed}"
    wording = "written by a grammar" if reports is None else f"taken from {arguments.reports.name}"
    write_tables(arguments.out, studies, f"{origin}, {arguments.size} px; reports {wording}.\n\n{describe_format()}")
    write_description(arguments.out, name="demo", language="en", views=2, licence="synthetic data of no patient")
    print(f"{len(studies)} synthetic studies in {arguments.out}")


if __name__ == "__main__":
    run_entry_point(main)
