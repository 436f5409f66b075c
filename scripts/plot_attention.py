"""Show where a model looked for each word it wrote: a PNG per study, and a page on which words can be pointed at.

  python scripts/plot_attention.py --load results/iu_xray/model_best.pth --out attention/ chest.png
  python scripts/plot_attention.py --load results/iu_xray/model_best.pth --by word --out words/ --group folder studies/

The weights are those of the decoder's cross-attention, mean over heads, laid over the part of the image that each
visual token comes from. A token has seen its surroundings too: the maps show what was read, not why it was written.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser, add_flags, given_flags
from modules.inference.study_files import StudyFiles, checkpoint_name, find_studies, require_model
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from modules.study_flags import add_study_arguments
from scripts.predict import DECODING

TITLE = "Where the model looked"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    usage = "%(prog)s --load MODEL --out FOLDER [--flag value ...] PATH [PATH ...]"
    parser = Parser(usage=usage, description=__doc__)
    add_study_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the PNG files and attention.html")
    parser.add_argument(
        "--by",
        choices=("sentence", "word"),
        default="sentence",
        help="what the PNG has a picture of (default: %(default)s)",
    )
    parser.add_argument(
        "--layer",
        type=_layer,
        default=-1,
        metavar="N",
        help="decoder layer, from 0 or from the last, -1; or mean (default: %(default)s)",
    )
    add_flags(parser.add_argument_group("decoding (default: as the checkpoint was trained and tested)"), DECODING)
    return parser


def _layer(text: str) -> int | None:
    try:
        return None if text == "mean" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number, or mean") from None


def check(folder: Path, studies: list[StudyFiles]) -> None:
    """InputError where a picture would replace an input image, or a file that this program did not make."""
    taken: set[str] = set()
    drawn = contains("Software\0Matplotlib")
    outputs = [
        Output("--out", folder / "attention.html", "a page of this program", contains(f"<title>{TITLE}</title>"))
    ]
    outputs += [
        Output("--out", folder / file_name(study.name, taken), "a picture of this program", drawn) for study in studies
    ]
    check_outputs(outputs, [("an image", path) for study in studies for path in study.paths])


def main() -> int:
    """Write the reports again, record the attention, draw it; 2 where an image could not be read."""
    check_python()
    arguments = build_parser().parse_args()
    studies = find_studies(arguments.paths, arguments.group)
    require_model(arguments.load)
    check(Path(arguments.out), studies)

    from modules.inference.prediction import WARNING
    from modules.pages.attention_figures import attention_figure
    from modules.pages.prediction_page import PageStudy, write_page
    from modules.run.predictor import StudyReader, load_predictor
    from modules.runtime.records import private_folder, write_private
    from modules.runtime.run_log import Bar

    print(WARNING, file=sys.stderr)
    folder = private_folder(arguments.out)
    predictor = load_predictor(arguments.load, given_flags(arguments, DECODING))
    if not predictor.shows_attention:
        raise InputError(
            f"--load {arguments.load}: its backbone does not say which of its modules attend to the image "
            "(cross_attention in models/base.py)"
        )
    reader = StudyReader(studies, predictor.num_views, arguments.batch_size, predictor.transform.draft)
    page, names = [], set()
    for batch in Bar(reader, "reports"):
        written = predictor.write(
            [images for _, images, _ in batch],
            names=[study.name for study, _, _ in batch],
            attention=True,
            layer=arguments.layer,
        )
        for (study, images, _), report in zip(batch, written, strict=True):
            page.append(PageStudy.of(study.name, images, report))
            if report.maps is None:
                raise InputError(f"--load {arguments.load}: its visual tokens do not form a grid over the image")
            name = file_name(study.name, names)
            if report.words:
                figure = attention_figure(images, report, title=study.name, by=arguments.by)
                write_private(folder / name, figure)
            else:
                print(f"{study.name}: the report is empty, so there is no {name}", file=sys.stderr)
    write_page(folder / "attention.html", page, title=TITLE, checkpoint=checkpoint_name(arguments.load))
    print(f"{folder}: attention.html, and a PNG for each of {len(page)} studies")
    return 2 if reader.unreadable else 0


def file_name(study: str, taken: set[str]) -> str:
    """A file name for a study that is a path, different from those ``taken``, to which it is added."""
    stem = re.sub(r"[^\w.-]+", "_", study, flags=re.ASCII).strip("._")[-100:] or "study"
    name, number = f"{stem}.png", 2
    while name in taken:
        name, number = f"{stem}_{number}.png", number + 1
    taken.add(name)
    return name


if __name__ == "__main__":
    run_entry_point(main)
