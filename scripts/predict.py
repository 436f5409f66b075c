"""Write reports for images: a file, several, or a folder; nothing but a checkpoint of main_train.py is needed.

  python scripts/predict.py --load results/iu_xray/model_best.pth chest.png
  python scripts/predict.py --load results/iu_xray/model_best.pth --group all frontal.dcm lateral.dcm
  python scripts/predict.py --load results/iu_xray/model_best.pth --group folder studies/ --csv reports.csv --quiet

Each sentence is printed after the mean log-probability of its words (0: certain). This is research software and no
medical device: no report it writes is fit for care.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser, add_flags, add_study_arguments, given_flags
from modules.inference.study_files import checkpoint_name, find_studies, require_checkpoint
from modules.runtime.environment import check_python, provenance
from modules.runtime.errors import run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

if TYPE_CHECKING:
    from modules.inference.prediction import WrittenReport

# Flags of main_test.py that change how reports are written; the checkpoint has its own values.
DECODING = (
    "sample_method",
    "beam_size",
    "group_size",
    "diversity_lambda",
    "temperature",
    "sample_n",
    "block_trigrams",
    "guidance",
    "suppress_unk",
    "max_seq_length",
    "device",
    "n_gpu",
    "precision",
    "seed",
)

TITLE = "Generated reports"
COLUMNS = ("id", "report", "log_prob", "sentence_mean_log_probs")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add_study_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--csv", metavar="FILE", help="also write a table: id, report, log-probabilities")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the images, and where the model looked")
    parser.add_argument("--quiet", action="store_true", help="print no report in the terminal")
    add_flags(parser.add_argument_group("decoding (default: as the checkpoint was trained and tested)"), DECODING)
    return parser


def main() -> int:
    """Read the images, write their reports; 2 where an image could not be read."""
    check_python()
    arguments = build_parser().parse_args()
    studies = find_studies(arguments.paths, arguments.group)
    check_outputs(
        [
            Output(
                "--json",
                arguments.json,
                "a JSON file of this program",
                contains('"checkpoint":', '"warning":', '"reports":'),
            ),
            Output("--csv", arguments.csv, "a table of this program", contains(",".join(COLUMNS))),
            Output("--html", arguments.html, "a page of this program", contains(f"<title>{TITLE}</title>")),
        ],
        [("--load", arguments.load), *(("an image", path) for study in studies for path in study.paths)],
    )
    require_checkpoint(arguments.load)
    from tqdm import tqdm

    from modules.inference.prediction import WARNING
    from modules.pages.prediction_page import PageStudy, write_page
    from modules.run.predictor import StudyReader, load_predictor
    from modules.runtime.run_log import Bar

    print(WARNING, file=sys.stderr)
    predictor = load_predictor(arguments.load, given_flags(arguments, DECODING))
    reader = StudyReader(studies, predictor.num_views, arguments.batch_size)
    rows, page = [], []
    for batch in Bar(reader, "reports"):
        written = predictor.write(
            [images for _, images in batch], attention=bool(arguments.html) and predictor.shows_attention
        )
        for (study, images), report in zip(batch, written, strict=True):
            rows.append(describe(study.name, [str(path) for path in study.paths[: len(images)]], report))
            if not arguments.quiet:
                tqdm.write(render(study.name, report), file=sys.stdout)
            if arguments.html:
                page.append(PageStudy.of(study.name, images, report))
    if arguments.json:
        write_json(
            arguments.json,
            rows,
            {
                "checkpoint": checkpoint_name(arguments.load),
                "warning": WARNING,
                "provenance": provenance(str(predictor.device)),
            },
        )
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.html:
        write_page(arguments.html, page, title=TITLE, checkpoint=checkpoint_name(arguments.load))
    if reader.unreadable:
        print(f"{reader.unreadable} of {len(studies)} studies could not be read", file=sys.stderr)
    return 2 if reader.unreadable else 0


def render(name: str, report: "WrittenReport") -> str:
    """A report for the terminal, a sentence a line."""
    lines = [f"{sentence.mean_log_prob:8.2f}  {sentence.text}" for sentence in report.sentences]
    return "\n".join([name, *(lines or ["          (empty report)"]), ""])


def describe(name: str, files: list[str], report: "WrittenReport") -> dict[str, Any]:
    """A report in JSON's types."""
    return {
        "id": name,
        "files": files,
        "report": report.text,
        "log_prob": report.log_prob,
        "cut": report.end_log_prob is None,
        "sentences": [
            {"text": sentence.text, "log_prob": sentence.log_prob, "mean_log_prob": sentence.mean_log_prob}
            for sentence in report.sentences
        ],
    }


def write_json(path: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """All reports, with what wrote them."""
    from modules.runtime.records import write_results

    write_results(path, about | {"reports": rows})


def write_csv(path: str, rows: list[dict[str, Any]]) -> None:
    """One line per study; ``sentence_mean_log_probs`` has a number for each sentence, separated by spaces."""
    from modules.runtime.records import write_private

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        means = " ".join(f"{sentence['mean_log_prob']:.4f}" for sentence in row["sentences"])
        writer.writerow([row["id"], row["report"], f"{row['log_prob']:.4f}", means])
    write_private(path, text.getvalue())


if __name__ == "__main__":
    run_entry_point(main)
