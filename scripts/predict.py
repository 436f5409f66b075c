"""Write reports for images: a file, several, or a folder; nothing but a checkpoint of main_train.py is needed.

  python scripts/predict.py --load results/iu_xray/model_best.pth chest.png
  python scripts/predict.py --load results/iu_xray/model_best.pth --group all frontal.dcm lateral.dcm
  python scripts/predict.py --load results/iu_xray/model_best.pth --group folder studies/ --csv reports.csv --quiet
  python scripts/predict.py --load results/own/model_best.pth --ann_path new.csv --image_dir scans --json reports.json
  python scripts/predict.py --load results/iu_xray/model_best.pth --rexrank ReXRank_IUXray_test.json out.json images/

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

from modules.data.annotations import SPLITS, Annotation
from modules.flags import Parser, add_flags, given_flags
from modules.inference.rexrank import FLAG as REXRANK
from modules.inference.rexrank import PREDICTION, read_rexrank, rexrank_files
from modules.inference.study_files import StudyFiles, checkpoint_name, find_studies, require_model
from modules.runtime.environment import check_python, provenance
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from modules.study_flags import add_study_arguments

if TYPE_CHECKING:
    from modules.inference.prediction import WrittenReport
    from modules.pages.prediction_page import PageStudy

# Flags of main_test.py that change how reports are written; the checkpoint has its own values.
DECODING = (
    "sample_method",
    "beam_size",
    "group_size",
    "diversity_lambda",
    "temperature",
    "top_p",
    "sample_n",
    "block_trigrams",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "min_length",
    "length_penalty",
    "guidance",
    "suppress_unk",
    "max_seq_length",
    "device",
    "n_gpu",
    "precision",
    "seed",
)

READING = (*DECODING, "follow_links")

TITLE = "Generated reports"
COLUMNS = ("id", "report", "log_prob", "sentence_mean_log_probs")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add_study_arguments(parser, paths="*")
    parser.add_argument(
        REXRANK,
        nargs=3,
        metavar=("IN.json", "OUT.json", "FOLDER"),
        help="read the studies of a file of ReXrank, whose images lie in FOLDER, and write it with model_prediction",
    )
    described = parser.add_argument_group("studies with their context, in place of paths")
    described.add_argument(
        "--ann_path",
        metavar="FILE",
        help="annotation.json, a list of such records, or a table (CSV, ...) as prepare_table.py reads it; no record "
        "needs a report, and context is read as in a test (docs/PREDICTION.md)",
    )
    described.add_argument("--image_dir", metavar="DIR", help="folder from which its image paths start")
    described.add_argument("--split", choices=SPLITS, default="test", help="of what has splits (default: %(default)s)")
    add_flags(described, ("follow_links",))
    parser.add_argument("--json", metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--csv", metavar="FILE", help="also write a table: id, report, log-probabilities")
    parser.add_argument("--html", metavar="FILE", help="also write a page with the images, and where the model looked")
    parser.add_argument("--quiet", action="store_true", help="print no report in the terminal")
    add_flags(parser.add_argument_group("decoding (default: as the checkpoint was trained and tested)"), DECODING)
    return parser


def read_studies(arguments: argparse.Namespace) -> tuple[list[StudyFiles], dict[str, Any] | None, Annotation | None]:
    """The studies to read; with --rexrank its content, to which the reports are added; with --ann_path what it says,
    all of whose images are one study here until the model is known.

    InputError where none or two sources are named.
    """
    if (described := read_annotated(arguments)) is not None:
        paths = [path for study in described.splits[arguments.split] for path in study.image_paths]
        return [StudyFiles("", tuple(Path(arguments.image_dir, path) for path in paths))], None, described
    if not arguments.rexrank:
        if not arguments.paths:
            raise InputError(
                "no images: name files or folders, or give --ann_path FILE --image_dir DIR, or --rexrank IN.json "
                "OUT.json FOLDER"
            )
        return find_studies(arguments.paths, arguments.group), None, None
    if arguments.paths or arguments.group != "none":
        raise InputError("--rexrank names the images and their studies itself: leave out other paths and --group")
    source, _, root = arguments.rexrank
    content = read_rexrank(source)
    return rexrank_files(source, content, root), content, None


def read_annotated(arguments: argparse.Namespace) -> Annotation | None:
    """What --ann_path describes, None without it; InputError where other studies are named beside it."""
    if not arguments.ann_path:
        if arguments.image_dir:
            raise InputError("--image_dir goes with --ann_path FILE, which names the images")
        return None
    if arguments.paths or arguments.group != "none" or arguments.rexrank:
        raise InputError(
            f"--ann_path names the images and their studies itself: leave out paths, --group and {REXRANK}"
        )
    if not arguments.image_dir:
        raise InputError("--ann_path needs --image_dir DIR, the folder from which its image paths start")
    from modules.run.described_studies import read_described

    return read_described(arguments.ann_path, arguments.image_dir, arguments.split)


def check_files(arguments: argparse.Namespace, studies: list[StudyFiles]) -> None:
    """InputError where an output would replace an input, or a file that this program did not make."""
    source, target, _ = arguments.rexrank or (None, None, None)
    marks = contains('"checkpoint":', '"warning":', '"reports":')
    check_outputs(
        [
            Output("--json", arguments.json, "a JSON file of this program", marks),
            Output("--csv", arguments.csv, "a table of this program", contains(",".join(COLUMNS))),
            Output("--html", arguments.html, "a page of this program", contains(f"<title>{TITLE}</title>")),
            Output(REXRANK, target, "a file of ReXrank with predictions", contains(f'"{PREDICTION}":')),
        ],
        [
            ("--load", arguments.load),
            ("--ann_path", arguments.ann_path),
            (f"the first file of {REXRANK}", source),
            *(("an image", path) for study in studies for path in study.paths),
        ],
    )


def main() -> int:
    """Read the images, write their reports; 2 where an image could not be read."""
    check_python()
    arguments = build_parser().parse_args()
    studies, rexrank, described = read_studies(arguments)
    check_files(arguments, studies)
    require_model(arguments.load)
    from tqdm import tqdm

    from modules.inference.prediction import ABSENT_CONTEXT, WARNING
    from modules.pages.prediction_page import PageStudy
    from modules.run.predictor import StudyReader, load_with_settings
    from modules.runtime.run_log import Bar

    print(WARNING, file=sys.stderr)
    predictor, config = load_with_settings(arguments.load, given_flags(arguments, READING))
    if described is not None:
        from modules.run.described_studies import study_files

        studies = study_files(described, arguments.image_dir, config, predictor.tokenizer)
    elif predictor.backbone.study_context is not None:
        print(f"{ABSENT_CONTEXT} (--ann_path brings it)", file=sys.stderr)
    if rexrank is not None:  # in the order in which a model with fewer views needs them
        studies = [StudyFiles(study.name, study.paths[: predictor.num_views]) for study in studies]
    reader = StudyReader(studies, predictor.num_views, arguments.batch_size, predictor.transform.draft)
    rows, page = [], []
    for batch in Bar(reader, "reports"):
        written = predictor.write(
            [images for _, images, _ in batch],
            names=[study.name for study, _, _ in batch],
            contexts=[context for _, _, context in batch],
            attention=bool(arguments.html) and predictor.shows_attention,
        )
        for (study, images, _), report in zip(batch, written, strict=True):
            rows.append(describe(study.name, [str(path) for path in study.paths[: len(images)]], report))
            if not arguments.quiet:
                tqdm.write(render(study.name, report), file=sys.stdout)
            if arguments.html:
                page.append(PageStudy.of(study.name, images, report))
    write_files(arguments, rows, page, rexrank, str(predictor.device))
    if reader.unreadable:
        print(f"{reader.unreadable} of {len(studies)} studies could not be read", file=sys.stderr)
    return 2 if reader.unreadable else 0


def write_files(
    arguments: argparse.Namespace,
    rows: list[dict[str, Any]],
    page: "list[PageStudy]",
    rexrank: dict[str, Any] | None,
    device: str,
) -> None:
    """Write the files that were asked for."""
    from modules.inference.prediction import WARNING
    from modules.pages.prediction_page import write_page
    from modules.runtime.records import write_results

    checkpoint = checkpoint_name(arguments.load)
    if arguments.json:
        write_json(
            arguments.json, rows, {"checkpoint": checkpoint, "warning": WARNING, "provenance": provenance(device)}
        )
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.html:
        write_page(arguments.html, page, title=TITLE, checkpoint=checkpoint)
    if rexrank is not None:
        reports = {row["id"]: {PREDICTION: row["report"]} for row in rows}
        write_results(arguments.rexrank[1], {name: study | reports.get(name, {}) for name, study in rexrank.items()})


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
