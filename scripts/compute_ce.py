"""Clinical efficacy of generated reports: precision, recall and F1 of their CheXpert labels against the references'.

Takes two CSV files, matched by their ids (a column such as id or study_id, known by name or values) or, where one has
none, row by row. Files with label columns (the CheXpert labeler's, CheXbert's, R2Gen's res_labeled.csv and
gts_labeled.csv, scripts/label_reports.py's) are scored as they are; files of reports are labelled with our rules
first, and the scores are then called ce_rule_*.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.report_files import ReportFile, refuse_copies, text_column
from modules.data.report_tables import Table
from modules.data.row_matching import match_rows
from modules.flags import Parser
from modules.labels.tables import class_columns, parse_labels, read_table
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from modules.runtime.records import write_results

if TYPE_CHECKING:
    import numpy as np


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--gts", required=True, metavar="CSV", help="the references: reports or labels")
    parser.add_argument("--res", required=True, metavar="CSV", help="the generated reports or their labels")
    for side in ("gts", "res"):
        parser.add_argument(
            f"--{side}_column", default="", metavar="NAME", help="its reports, where they are not found"
        )
    parser.add_argument("--labeler", metavar="NAME", help="who made the labels of labelled files, e.g. chexbert")
    parser.add_argument(
        "--uncertain",
        choices=("negative", "positive", "ignored"),
        default="negative",
        help="what an uncertain label counts as in the table of classes (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="JSON", help="where to write all scores and the table of classes")
    return parser


def main() -> None:
    """Read both files, score them, print the tables and write the JSON."""
    arguments = build_parser().parse_args()
    written = contains('"scores":', '"classes":', '"files_sha256":')
    check_outputs(
        [Output("--out", arguments.out, "a JSON file of this program's scores", written)],
        [("--gts", arguments.gts), ("--res", arguments.res)],
    )

    from modules.evaluation.bootstrap import intervals
    from modules.evaluation.clinical_scores import class_table, clinical_scores
    from modules.evaluation.report_statistics import ReportStatistics, clinical_tables
    from modules.evaluation.system_scorer import units_of

    references = read_table(arguments.gts, arguments.gts_column)
    hypotheses = match_rows(references, read_table(arguments.res, arguments.res_column))
    labeler = choose_labeler(references, hypotheses, arguments.labeler)
    truth, claim = both_labels(references, hypotheses, arguments.gts_column, arguments.res_column)
    scores = clinical_scores(truth, claim, labeler)
    rows = ReportFile(references, [[""]] * len(truth))
    studies, patients = units_of(rows.studies, rows.subjects)
    statistics = ReportStatistics(clinical_tables(truth, claim, labeler), "", "", studies=studies, patients=patients)
    limits = intervals(statistics)
    table = class_table(truth, claim, arguments.uncertain)
    print(render_scores(scores, limits), f"Intervals are a bootstrap over {statistics.units[0]}.", sep="\n\n")
    print("", render_classes(table, labeler, arguments.uncertain), sep="\n")
    if arguments.out:
        from modules.runtime.environment import file_sha256, provenance

        content = {
            "reports": len(truth),
            "scores": scores,
            "intervals": limits,
            "intervals_over": statistics.units[0],
            "uncertain": arguments.uncertain,
            "classes": table,
            "labeler": labeler,
            "files_sha256": {name: file_sha256(getattr(arguments, name)) for name in ("gts", "res")},
            "provenance": provenance(),
        }
        write_results(arguments.out, content)


def choose_labeler(references: Table, hypotheses: Table, name: str | None) -> str:
    """Return the labeler's name for the keys: ``rule`` for reports; whoever made them for labels.

    InputError where the two files or the name do not fit.
    """
    labelled = [bool(class_columns(table)) for table in (references, hypotheses)]
    if labelled[0] != labelled[1]:
        with_labels, without = (references, hypotheses) if labelled[0] else (hypotheses, references)
        raise InputError(f"{with_labels.path} has labels and {without.path} does not: label both with the same labeler")
    if not labelled[0]:
        if name not in (None, "rule"):
            raise InputError(f"--labeler {name}: these files hold reports, which only our rules can label here")
        return "rule"
    if name is None:
        raise InputError("--labeler is needed with labelled files: the scores are named after who made the labels")
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise InputError(f"--labeler {name}: a name of small letters and digits is needed, such as chexbert")
    return name


def both_labels(
    references: Table, hypotheses: Table, references_column: str = "", generated_column: str = ""
) -> "tuple[np.ndarray, np.ndarray]":
    """Return the labels of both tables, (N, 14) float64 with NaN for not mentioned; our rules label reports.

    InputError where a table has no reports, or where the generated ones may be copies of the references.
    """
    import numpy as np

    from modules.labels.labeler import label_reports

    if class_columns(references):
        return np.array(parse_labels(references), dtype=float), np.array(parse_labels(hypotheses), dtype=float)
    columns = text_column(references, "gts", references_column), text_column(hypotheses, "res", generated_column)
    truth, claim = (
        [row[column] for row in table.rows] for table, column in zip((references, hypotheses), columns, strict=True)
    )
    if not generated_column:
        refuse_copies(truth, claim, hypotheses)
    return label_reports(truth, progress=True), label_reports(claim, progress=True)


def render_scores(scores: dict[str, float], limits: dict[str, tuple[float, float]]) -> str:
    """Return all scores as a Markdown table of precision, recall and F1 per averaging, class set and policy.

    ``limits``: the bootstrap interval of each score that has one; that of F1 is shown.
    """
    lines = ["| averaging, classes, uncertain | precision | recall | F1 | 95 % interval of F1 |"]
    lines.append("|---|---|---|---|---|")
    for key, precision in scores.items():
        if "_precision_" in key:
            recall, f1 = (scores[key.replace("_precision_", f"_{name}_")] for name in ("recall", "f1"))
            interval = limits.get(key.replace("_precision_", "_f1_"))
            shown = "–" if interval is None else f"{interval[0]:.4f} – {interval[1]:.4f}"
            lines.append(
                f"| {key.replace('_precision_', '_*_')} | {precision:.4f} | {recall:.4f} | {f1:.4f} | {shown} |"
            )
    return "\n".join(lines)


def render_classes(table: list[dict], labeler: str, uncertain: str) -> str:
    """Return the table of classes as Markdown."""
    lines = [f"| class ({labeler}, uncertain as {uncertain}) | precision | recall | F1 | in gts | in res |"]
    lines.append("|---|---|---|---|---|---|")
    for row in table:
        values = " | ".join(f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))
        lines.append(f"| {row['class']} | {values} | {row['reference_positives']} | {row['generated_positives']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
