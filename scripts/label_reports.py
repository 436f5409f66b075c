"""Label the reports of a CSV file with the 14 CheXpert classes: by rules, or with CheXbert's weights.

The output has the input's columns, then the classes by name: 1 positive, 0 negative, -1 uncertain, empty unmentioned.
From an annotation.json the columns are id, split and report: main_train.py --label_path takes the output.
OUT.provenance.json, in the same folder, records what it was made from. An existing file is replaced only if this
program wrote it and it has not been changed since.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.annotations import read_annotation
from modules.flags import Parser
from modules.labels.labeler import CLASSES, label_report, with_parents
from modules.labels.sentences import is_missing
from modules.labels.tables import Table, class_columns, read_table, report_column, write_table
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.input_files import read_json
from modules.runtime.output_files import Output, check_outputs, contains
from modules.runtime.run_log import Bar


def read_reports(path: str, column: str | None) -> Table:
    """The table in a CSV file, with or without a header, or the records of all splits in an annotation.json."""
    if not path.lower().endswith(".json"):
        return read_table(path, column)
    splits = read_annotation(path, required_splits=()).splits
    rows = [[study.id, study.split, study.report] for studies in splits.values() for study in studies]
    return Table(path, ["id", "split", "report"], rows)


def label_all(reports: list[str], chexbert_path: str | None, encoder: str) -> list[dict[str, int | None]]:
    """Labels of each report by class, of the rules or, given its weights, of CheXbert."""
    if chexbert_path is None:
        return [label_report(report) for report in Bar(reports, "labels")]
    from modules.labels.chexbert import Chexbert
    from modules.runtime.environment import choose_device

    labels = Chexbert(chexbert_path, encoder).to(choose_device("auto")).label(reports)
    return [
        {
            name: None if value != value or is_missing(report) else int(value)
            for name, value in zip(CLASSES, row, strict=True)
        }
        for report, row in zip(reports, labels.tolist(), strict=True)
    ]


def main() -> None:
    """Read the reports, label them, write the labelled table."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "input", metavar="IN.csv", help="a CSV file with a column report or findings, or an annotation.json"
    )
    parser.add_argument("--out", required=True, metavar="OUT.csv", help="the labelled CSV file to write")
    parser.add_argument("--column", help="the column with the reports (default: report, reports or findings)")
    parser.add_argument(
        "--hierarchy",
        action="store_true",
        help="also label the parents of each observation, e.g. Lung Opacity for Edema",
    )
    parser.add_argument("--chexbert_path", metavar="PTH", help="chexbert.pth: label with CheXbert, not by rules")
    parser.add_argument(
        "--chexbert_encoder",
        default="bert-base-uncased",
        metavar="FOLDER",
        help="folder with config.json and vocab.txt of its BERT, or a hub id (default: %(default)s)",
    )
    arguments = parser.parse_args()
    check(arguments)

    table = read_reports(arguments.input, arguments.column)
    column = report_column(table, arguments.column)
    old_labels = set(class_columns(table).values())
    if old_labels:
        print(f"{table.path}: its {len(old_labels)} label columns are replaced in {arguments.out}", file=sys.stderr)
    kept = [index for index in range(len(table.columns)) if index not in old_labels]
    reports, rows = [row[column] for row in table.rows], []
    found = label_all(reports, arguments.chexbert_path, arguments.chexbert_encoder)
    for row, labels in zip(table.rows, found, strict=True):
        if arguments.hierarchy:
            labels = with_parents(labels)
        cells = ["" if label is None else str(label) for label in labels.values()]
        rows.append([row[index] for index in kept] + cells)
    write_table(arguments.out, [table.columns[index] for index in kept] + list(CLASSES), rows)
    write_origin(arguments)
    by = "CheXbert" if arguments.chexbert_path else "rules"
    print(f"wrote {arguments.out}: {len(rows):,} reports, labelled by {by}")


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError if something would be lost, such as labels that a person has corrected."""
    origin = origin_of(arguments.out)
    check_outputs(
        [
            Output("--out", arguments.out, f"an unchanged output of this program (by {origin.name})", is_own),
            Output("--out", origin, "a record of where labels come from", contains('"labeler":', '"output_sha256":')),
        ],
        [("the input", arguments.input), ("--chexbert_path", arguments.chexbert_path)],
    )


def origin_of(out: str | Path) -> Path:
    """Path of the record of what ``out`` was made from, in the same folder. InputError where ``out`` names no file."""
    try:
        return Path(out).with_suffix(".provenance.json")
    except ValueError:
        raise InputError(f"--out {out}: is not the name of a file") from None


def is_own(out: Path) -> bool:
    """Whether this program wrote ``out`` according to its record, and it has not been changed since."""
    from modules.runtime.environment import file_sha256

    return read_json(origin_of(out))["output_sha256"] == file_sha256(out)


def write_origin(arguments: argparse.Namespace) -> None:
    """Write OUT.provenance.json: what OUT.csv was made from, by what, with the hashes of both."""
    from modules.runtime.environment import file_sha256, provenance
    from modules.runtime.records import write_results

    out = Path(arguments.out)
    write_results(
        origin_of(out),
        {
            "labeler": "chexbert" if arguments.chexbert_path else "rule",
            "flags": vars(arguments),
            "input_sha256": file_sha256(arguments.input),
            "chexbert_sha256": file_sha256(arguments.chexbert_path or ""),
            "output_sha256": file_sha256(out),
            "provenance": provenance(),
        },
    )


if __name__ == "__main__":
    run_entry_point(main)
