"""Read everything that a training run would read, once and in parallel, and list every problem that stops or harms it.

Takes main_train.py's flags and reads what they name: annotation, vocabulary, images, hard-negative index (where
--negative_index is given), labels and prototypes (of a backbone that needs them). Problems are listed with file, split,
id and field, by kind; beside them stands what the data set is like. Exit status 0: none found; 2: some.

This prints ids and paths of the data to the terminal.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.config import Config
from modules.data.annotations import Annotation, Study, read_annotation
from modules.data.captions import split_captions
from modules.data.tokenizers import Tokenizer
from modules.flags import build_parser, resolve_config, settle_flags
from modules.ithn.synthesis import DRAWING_NEIGHBOURS
from modules.runtime.errors import InputError, Problem, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

if TYPE_CHECKING:
    from modules.prepare.image_survey import ImageFacts

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


@dataclasses.dataclass
class Findings:
    """What was found so far."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def attempt(self, kind: str, file: str, read: Callable[[], Any]) -> Any:
        """What ``read`` returns, or None where it ends in an InputError, which becomes a problem."""
        try:
            return read()
        except InputError as error:
            self.problems.append(Problem(kind, str(error), file))
            return None

    def leak(self, kind: str, field: str, found: dict[str, tuple[str, ...]], file: str) -> None:
        """Note every key that stands in several splits."""
        for key, splits in found.items():
            self.problems.append(
                Problem(
                    kind,
                    f"{file}: {field} {key!r} stands in the splits {' and '.join(splits)}",
                    file,
                    " ".join(splits),
                    key,
                    field,
                )
            )


def check_annotation(config: Config, findings: Findings) -> Annotation | None:
    """The annotation without its faulty records; None where it cannot be read at all."""
    from modules.prepare.data_statistics import in_several_splits, view_statistics

    annotation = findings.attempt(
        "annotation cannot be read",
        config.ann_path,
        lambda: read_annotation(config.ann_path, on_problem=findings.problems.append),
    )
    if annotation is None:
        return None
    splits = annotation.splits
    findings.statistics |= {
        "synthetic": annotation.synthetic,
        "annotation_sha256": annotation.sha256,
        "views": {split: view_statistics(studies, config.dataset.max_views) for split, studies in splits.items()},
    }
    images = {split: [path for study in studies for path in study.image_paths] for split, studies in splits.items()}
    findings.leak("image is in two splits", "image_path", in_several_splits(images), config.ann_path)
    for field in ("study_id", "subject_id"):
        keys = {
            split: [getattr(study, field) for study in studies if getattr(study, field) not in ("", study.id)]
            for split, studies in splits.items()
        }
        findings.leak(f"{field} is in two splits", field, in_several_splits(keys), config.ann_path)
    return annotation


def check_reports(config: Config, annotation: Annotation, findings: Findings) -> None:
    """Vocabulary, lengths, unknown words, reports that are the same."""
    from modules.prepare import data_statistics

    cleaned = data_statistics.cleaned_reports(annotation.splits, config.dataset.cleaner)
    train = [study.report for study in annotation.splits["train"]]
    tokenizer = Tokenizer.from_reports(train, config.threshold, config.dataset.cleaner)
    if config.beam_size > tokenizer.num_ids:
        findings.problems.append(
            Problem(
                "vocabulary is too small",
                f"--beam_size {config.beam_size}: at most the {tokenizer.num_ids} token ids of the vocabulary",
                config.ann_path,
            )
        )
    findings.statistics["vocabulary"] = data_statistics.vocabulary_statistics(
        cleaned["train"], tokenizer, config.threshold
    )
    findings.statistics["reports"] = {
        split: data_statistics.report_statistics(texts, tokenizer, config.max_seq_length)
        for split, texts in cleaned.items()
    }
    findings.statistics["text_shared_with_train"] = data_statistics.shared_text(cleaned)


def check_images(config: Config, annotation: Annotation, findings: Findings, hashed: bool) -> None:
    """Every image of the annotation, those of its negatives too, decoded once."""
    from modules.data.images import ImageFolder
    from modules.prepare.data_statistics import in_several_splits
    from modules.prepare.image_survey import survey_images
    from modules.runtime.run_log import Bar

    folder = findings.attempt(
        "image_dir cannot be read",
        config.image_dir,
        lambda: ImageFolder(config.image_dir, follow_links=config.follow_links),
    )
    if folder is None:
        return
    users: dict[str, list[tuple[Study, str]]] = {}
    for study in (study for studies in annotation.splits.values() for study in studies):
        for field, paths in (("image_path", study.image_paths), ("neg_image_path", study.negative_image_paths)):
            for path in paths:
                users.setdefault(path, []).append((study, field))
    found: list[ImageFacts] = []
    surveyed = survey_images(folder, list(users), workers=config.num_workers, hashed=hashed)
    for path, facts in zip(Bar(list(users), "images"), surveyed, strict=True):
        found.append(facts)
        for study, field in users[path] if facts.problem else ():
            findings.problems.append(
                Problem(
                    facts.kind,
                    f"split '{study.split}', study {study.id!r}, {field}: {facts.problem}",
                    path,
                    study.split,
                    study.id,
                    field,
                )
            )
    findings.statistics["images"] = image_statistics([facts for facts in found if not facts.problem], config.image_size)
    if hashed:
        splits: dict[str, list[str]] = {}
        for facts in found:
            for study, field in users[facts.path] if facts.sha256 else ():
                if field == "image_path":
                    splits.setdefault(study.split, []).append(facts.sha256)
        names = {facts.sha256: facts.path for facts in reversed(found)}
        leaks = {names[digest]: where for digest, where in in_several_splits(splits).items()}
        findings.leak("equal images in two splits", "the content of image", leaks, config.image_dir)


def check_detections(config: Config, annotation: Annotation, findings: Findings) -> None:
    """The detection features of every image: there, and of one width."""
    from modules.data.detection_features import detections_of
    from modules.runtime.run_log import Bar

    file = config.detection_features
    reader = findings.attempt(
        "detection features cannot be read", file, lambda: detections_of(file, annotation.splits, config.max_detections)
    )
    if reader is None:
        return
    detections = []
    for path in Bar(list(reader.ids), "detection features"):
        found = findings.attempt("image has no detection features", path, lambda path=path: reader(path))
        if found is not None:
            detections.append(int((found != 0).any(dim=1).sum()))
    findings.statistics["detections"] = {
        "images": len(detections),
        "width": reader.shape[1],
        "per_image": sum(detections) / max(len(detections), 1),
    }


def image_statistics(found: "list[ImageFacts]", image_size: int) -> dict[str, Any]:
    """Sizes and modes of the images that can be read."""
    from modules.prepare.data_statistics import quantiles

    sizes = Counter("{} x {}".format(*facts.size) for facts in found)
    return {
        "readable": len(found),
        "modes": dict(Counter(facts.mode for facts in found)),
        "width_quantiles": quantiles([facts.size[0] for facts in found]),
        "height_quantiles": quantiles([facts.size[1] for facts in found]),
        "commonest_sizes": dict(sizes.most_common(3)),
        "different_sizes": len(sizes),
        "smaller_than_image_size": sum(min(facts.size) < image_size for facts in found),
    }


def check_index(config: Config, annotation: Annotation, findings: Findings) -> None:
    """The hard-negative index: whole, of these training reports, with enough neighbours."""
    from modules.mining.index import HardNegativeIndex

    path = config.negative_index
    index = findings.attempt("index cannot be used", path, lambda: HardNegativeIndex.load(path))
    if index is None:
        return
    if not any(problem.split == "train" for problem in findings.problems):  # else records are left out here
        findings.attempt("index is of other reports", path, lambda: index.check(annotation))
    rows, width = index.neighbours.shape
    if config.strategy in DRAWING_NEIGHBOURS and width < config.num_neighbours:
        findings.problems.append(
            Problem(
                "index has too few neighbours",
                f"{path}: {width} neighbours per study, but --num_neighbours {config.num_neighbours}",
                path,
            )
        )
    findings.statistics["index"] = {
        "studies": rows,
        "neighbours": width,
        "studies_without_neighbour": int((index.neighbours[:, :1] < 0).sum()),
    }


def check_labels(config: Config, annotation: Annotation, findings: Findings) -> None:
    """The label file, and that it has every study that needs a row."""
    from models import settings_class
    from modules.labels.study_labels import class_order, read_labels
    from modules.runtime.settings import part_of

    path, classes = config.label_path, class_order(config.cluster_order, "cluster_order")
    table = findings.attempt(
        "labels cannot be read",
        path,
        lambda: read_labels(path, classes, config.label_columns, on_problem=findings.problems.append),
    )
    if table is None:
        return
    unlabelled = {
        split: [study for study in studies if table.find(study) is None] for split, studies in annotation.splits.items()
    }
    leaks = part_of(config, settings_class(config.model_name)).reads_reference_labels
    needed = list(unlabelled) if leaks else ["train"]
    for study in (study for split in needed for study in unlabelled[split]):
        findings.problems.append(
            Problem(
                "study has no labels",
                f"{path}: no labels for study {study.id!r} of split '{study.split}'",
                path,
                study.split,
                study.id,
            )
        )
    positives = sum(table.labels.values())
    findings.statistics["labels"] = {
        "rows": len(table.labels),
        "without_labels": {split: len(studies) for split, studies in unlabelled.items()},
        "positives": {name: int(count) for name, count in zip(classes, positives, strict=True)} if table.labels else {},
    }


def check_prototypes(config: Config, findings: Findings) -> None:
    """The file of initial prototypes."""
    from modules.data.prototype_files import load_prototypes
    from modules.labels.study_labels import class_order

    findings.attempt(
        "prototypes cannot be used",
        config.init_protypes_path,
        lambda: load_prototypes(
            config.init_protypes_path,
            class_order(config.cluster_order, "cluster_order"),
            num_protype=config.num_protype,
            d_img_ebd=config.d_img_ebd,
            d_txt_ebd=config.d_txt_ebd,
        ),
    )


def check(config: Config, hashed: bool) -> Findings:
    """All of it."""
    from models import MODELS, backbone_class

    findings = Findings()
    annotation = check_annotation(config, findings)
    if annotation is None:
        return findings
    samples = split_captions(annotation) if config.captioning else annotation
    if annotation.splits["train"]:
        check_reports(config, samples, findings)
    if config.negative_index:
        check_index(config, samples, findings)
    if config.model_name in MODELS and backbone_class(config.model_name).needs_labels:
        check_labels(config, annotation, findings)
        if config.init_protypes_path:
            check_prototypes(config, findings)
    if config.detection_features:
        check_detections(config, annotation, findings)
    else:
        check_images(config, annotation, findings, hashed)
    return findings


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
