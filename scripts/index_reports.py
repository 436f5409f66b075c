"""Index the training reports by what their images look like, for scripts/serve.py to show next to a generated one.

  python scripts/index_reports.py --load results/iu_xray/model_best.pth --ann_path data/iu_xray/annotation.json \\
      --image_dir data/iu_xray/images/ --out results/iu_xray/reports.safetensors

The file holds the training reports: it is as private as the annotation.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.annotations import read_annotation
from modules.flags import Parser, add_flags, given_flags
from modules.runtime.environment import check_python
from modules.runtime.errors import run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from modules.study_flags import add_batch_size, add_load

RUNNING = ("device", "n_gpu", "precision")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add_load(parser)
    parser.add_argument("--ann_path", required=True, metavar="JSON", help="the annotation with the training split")
    parser.add_argument("--image_dir", required=True, metavar="FOLDER", help="where its image paths start")
    parser.add_argument("--out", required=True, metavar="FILE", help="the index to write (safetensors)")
    add_batch_size(parser)
    add_flags(parser, RUNNING)
    return parser


def main() -> None:
    """Pool the features of every training study's images; write them with the reports."""
    check_python()
    arguments = build_parser().parse_args()
    check_outputs(
        [Output("--out", arguments.out, "an index of this program", contains("ithn-report-index"))],
        [("--load", arguments.load), ("--ann_path", arguments.ann_path)],
    )
    studies = read_annotation(arguments.ann_path, required_splits=("train",)).splits["train"]

    import numpy as np

    from modules.data.images import ImageFolder
    from modules.inference.report_index import ReportIndex
    from modules.run.predictor import load_predictor
    from modules.runtime.run_log import Bar

    folder = ImageFolder(arguments.image_dir)
    predictor = load_predictor(arguments.load, given_flags(arguments, RUNNING) | {"guidance": 0.0})
    folder.draft = predictor.transform.draft
    samples = [(paths, study.report) for study in studies for paths in views_of(study.image_paths, predictor.num_views)]
    features = []
    for start in Bar(range(0, len(samples), arguments.batch_size), "features of the training images"):
        batch = samples[start : start + arguments.batch_size]
        features.append(predictor.pooled([[folder(path) for path in paths] for paths, _ in batch]))
    ReportIndex.of(np.concatenate(features), [report for _, report in samples], predictor.extractor_sha256()).save(
        arguments.out
    )
    print(f"{len(samples)} training samples indexed in {arguments.out}")


def views_of(paths: tuple[str, ...], num_views: int) -> list[tuple[str, ...]]:
    """The images that the model reads together: each alone, or the study's first ones."""
    return [(path,) for path in paths] if num_views == 1 else [paths[:num_views]]


if __name__ == "__main__":
    run_entry_point(main)
