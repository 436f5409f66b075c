"""Read everything that a training run would read, once and in parallel, and list every problem that stops or harms it.

Takes main_train.py's flags and reads what they name: annotation, vocabulary, images, hard-negative index (where
--negative_index is given), labels and prototypes (of a backbone that needs them). Problems are listed with file, split,
id and field, by kind, after statistics of the data set. Exit status 0: none found; 2: some.

This prints ids and paths of the data to the terminal.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.config import Config
from modules.data.annotations import Annotation
from modules.data.captions import split_captions
from modules.flags import build_parser, resolve_config, settle_flags
from modules.ithn.synthesis import DRAWING_NEIGHBOURS
from modules.prepare import data_checks
from modules.prepare.data_checks import Findings
from modules.runtime.cores import worker_processes
from modules.runtime.errors import run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

OWN = ("json", "hash_images", "per_kind")


def build_arguments() -> argparse.ArgumentParser:
    """main_train.py's command line, and what belongs to this program."""
    parser = build_parser("check_data.py", __doc__.split("\n\n")[0])
    own = parser.add_argument_group("check_data.py's own")
    own.add_argument("--json", metavar="FILE", default="", help="write problems and statistics there too (mode 0600)")
    own.add_argument(
        "--hash_images", action="store_true", default=False, help="also look for equal image files in different splits"
    )
    own.add_argument(
        "--per_kind",
        type=int,
        default=0,
        metavar="N",
        help="problems of a kind that are printed (default: all of them)",
    )
    return parser


def check(config: Config, hashed: bool) -> Findings:
    """Everything that a run with these settings would read."""
    from models import MODELS, backbone_class

    findings = Findings()
    annotation = data_checks.check_annotation(config.ann_path, config.dataset.max_views, findings)
    if annotation is None:
        return findings
    if config.report_sections:
        from modules.data.study_context import with_sections

        found = findings.attempt(
            "report_sections are missing", config.ann_path, lambda: with_sections(annotation, config.report_sections)
        )
        annotation = found[0] if found else annotation
    samples = split_captions(annotation) if config.captioning else annotation
    if annotation.splits["train"]:
        data_checks.check_reports(
            samples,
            findings,
            tokenizer=check_vocabulary(config, samples, findings),
            threshold=config.threshold,
            beam_size=config.beam_size,
            max_seq_length=config.max_seq_length,
        )
    if config.negative_index:
        check_index(config, samples, findings)
    if config.model_name in MODELS and backbone_class(config.model_name).needs_labels:
        check_label_files(config, annotation, findings)
    if config.detection_features:
        data_checks.check_detections(
            annotation, findings, file=config.detection_features, max_detections=config.max_detections
        )
    else:
        data_checks.check_images(
            annotation,
            findings,
            image_dir=config.image_dir,
            follow_links=config.follow_links,
            image_size=config.image_size,
            workers=worker_processes(config.num_workers),
            hashed=hashed,
        )
    return findings


def check_vocabulary(config: Config, annotation: Annotation, findings: Findings) -> Any:
    """The tokenizer of the training reports, words in place of GPT-2's byte pairs, and whether it fits them."""
    from modules.data.tokenizers import Tokenizer, count_words
    from modules.run.vocabulary import build_tokenizer, many_unknown, needs_spaces

    reports = [study.report for study in annotation.splits["train"]]
    if config.tokenizer in ("subword", "character"):
        return build_tokenizer(config, reports, kind="word")
    counts = count_words(reports, config.dataset.cleaner)
    if problem := needs_spaces(config, reports):
        findings.add("reports have no spaces between words", problem, annotation.path)
    elif line := many_unknown(counts, config.threshold):
        findings.statistics["advice"] = line
    return Tokenizer.from_counts(counts, config.threshold, config.dataset.cleaner)


def check_index(config: Config, annotation: Annotation, findings: Findings) -> None:
    """The hard-negative index."""
    from modules.mining.index import HardNegativeIndex

    drawn = config.num_neighbours if config.strategy in DRAWING_NEIGHBOURS else 0
    path = config.negative_index
    data_checks.check_index(
        annotation,
        findings,
        path=path,
        load=HardNegativeIndex.load,
        neighbours_drawn=drawn,
        reading=config.mining_flags,
    )


def check_label_files(config: Config, annotation: Annotation, findings: Findings) -> None:
    """The labels, and the initial prototypes where a file of them is given."""
    from models import settings_class
    from modules.data.prototype_files import load_prototypes
    from modules.labels.study_labels import class_order
    from modules.runtime.settings import part_of

    classes = class_order(config.cluster_order, "cluster_order")
    leaks = part_of(config, settings_class(config.model_name)).reads_reference_labels
    data_checks.check_labels(
        annotation,
        findings,
        path=config.label_path,
        classes=classes,
        columns=config.label_columns,
        needed=tuple(annotation.splits) if leaks else ("train",),
    )
    if config.init_protypes_path:
        sizes = {name: getattr(config, name) for name in ("num_protype", "d_img_ebd", "d_txt_ebd")}
        findings.attempt(
            "prototypes cannot be used",
            config.init_protypes_path,
            lambda: load_prototypes(config.init_protypes_path, classes, **sizes),
        )


def main() -> int:
    """Read the flags, check, print, write the JSON."""
    from modules.prepare.check_page import render_problems, render_statistics

    given = vars(build_arguments().parse_args())
    own = {name: given.pop(name) for name in OWN}
    given, notes = settle_flags(given)
    config = resolve_config(given)
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    check_outputs(
        [
            Output(
                "--json",
                own["json"],
                "a JSON file of this program",
                contains('"problems":', '"kinds":', '"statistics":'),
            )
        ],
        [
            (f"--{name}", getattr(config, name))
            for name in ("ann_path", "negative_index", "label_path", "init_protypes_path", "detection_features")
        ],
    )
    findings = check(config, own["hash_images"])
    kinds = Counter(problem.kind for problem in findings.problems)
    print(render_statistics(findings.statistics, config.max_seq_length, config.image_size))
    print(render_problems(findings.problems, own["per_kind"]))
    if own["json"]:
        from modules.runtime.environment import provenance
        from modules.runtime.records import write_results

        write_results(
            own["json"],
            {
                "problems": [dataclasses.asdict(problem) for problem in findings.problems],
                "kinds": dict(kinds),
                "statistics": findings.statistics,
                "config": dataclasses.asdict(config),
                "provenance": provenance(),
            },
        )
    return 2 if findings.problems else 0


if __name__ == "__main__":
    run_entry_point(main)
