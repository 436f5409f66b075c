"""Split an annotation again for cross-validation: K annotations, in which each study is in the test split once.

  python scripts/research/make_folds.py --ann_path data/iu_xray/annotation.json --folds 5 --out data/iu_xray_folds

writes fold1/annotation.json to fold5/annotation.json into that folder, for the same --image_dir. A small test split,
such as the 590 studies of IU X-Ray, tells only large differences from chance; the folds together test on every study.
Records of one patient (subject_id, where the annotation has it) or of one study (study_id) stay together. A table of
experiments with "folds" runs its rows on all of them: docs/EXPERIMENT_TABLES.md.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.data.annotations import SPLITS, Annotation, Study, read_annotation
from modules.data.dataset_specs import DESCRIPTION
from modules.flags import Parser
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.input_files import MAX_ANNOTATION, MAX_TEXT, read_bytes, read_json
from modules.runtime.records import new_folder, require_empty, write_private, write_results

RECORD = "folds.json"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--ann_path",
        required=True,
        metavar="JSON",
        help="the annotation; its present splits are taken together, in the file's order",
    )
    add("--out", required=True, type=Path, metavar="FOLDER", help="new or empty folder for the folds")
    add("--folds", type=int, default=5, metavar="K", help="default %(default)s")
    add(
        "--val_share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of all records, for the validation split of each fold; default %(default)s, as in R2Gen's IU X-Ray",
    )
    add("--seed", type=int, default=9233, metavar="S", help="deals patients to folds; default %(default)s")
    return parser


def patients_of(studies: Sequence[Study]) -> dict[str, list[str]]:
    """The ids of each patient's records; a study of which no record names the patient is a patient of its own.

    InputError for a study of two patients.
    """
    subjects: dict[str, str] = {}
    for study in studies:
        if study.subject_id and subjects.setdefault(study.study_id, study.subject_id) != study.subject_id:
            raise InputError(
                f"id {study.id!r}: its study_id {study.study_id!r} has two subject_ids; a study is of one patient"
            )
    found: dict[str, list[str]] = {}
    for study in studies:
        subject = subjects.get(study.study_id)
        found.setdefault(f"study {study.study_id}" if subject is None else f"subject {subject}", []).append(study.id)
    return found


def deal(patients: Sequence[Sequence[str]], folds: int, seed: int) -> list[list[Sequence[str]]]:
    """The patients of each fold: shuffled, then cut into runs of as many records each, to within one patient's."""
    import numpy as np

    total, done = sum(map(len, patients)), 0
    dealt: list[list[Sequence[str]]] = [[] for _ in range(folds)]
    for number in np.random.default_rng(seed).permutation(len(patients)):
        own = patients[number]
        # Where the middle of the patient's records falls.
        dealt[(2 * done + len(own)) * folds // (2 * total)].append(own)
        done += len(own)
    return dealt


def splits_of(dealt: Sequence[Sequence[Sequence[str]]], fold: int, val_count: int) -> dict[str, str]:
    """The split of each id where ``fold`` is tested; the patients dealt next are the validation split."""
    splits = {name: "test" for patient in dealt[fold] for name in patient}
    others = [patient for step in range(1, len(dealt)) for patient in dealt[(fold + step) % len(dealt)]]
    val = 0
    for patient in others:
        splits |= dict.fromkeys(patient, "val" if val < val_count else "train")
        val += len(patient)
    return splits


def check(arguments: argparse.Namespace) -> None:
    """InputError for values out of range."""
    folds, share = arguments.folds, arguments.val_share
    if folds < 2:
        raise InputError(f"--folds {folds}: must be at least 2")
    if not 0 < share < 1 - 1 / folds:
        raise InputError(
            f"--val_share {share:g}: must be above 0 and leave something to train on, that is, be below "
            f"{1 - 1 / folds:g} with --folds {folds}"
        )
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: must be 0 or more")
    require_empty(arguments.out)


def make(annotation: Annotation, folds: int, val_share: float, seed: int) -> list[dict[str, str]]:
    """The split of each id, for each fold; InputError where a split would be empty."""
    studies = [study for split in annotation.splits.values() for study in split]
    if any(study.negative_report for study in studies):
        raise InputError(
            f"{annotation.path}: its records carry negatives (neg_report), which were chosen for this "
            "split; take the annotation without them, and mine for each fold"
        )
    if not studies:
        raise InputError(f"--ann_path {annotation.path}: holds no records")
    patients = list(patients_of(studies).values())
    if folds > len(patients):
        raise InputError(f"--folds {folds}: there are {len(patients)} patients")
    dealt = deal(patients, folds, seed)
    found = [splits_of(dealt, fold, round(val_share * len(studies))) for fold in range(folds)]
    for number, splits in enumerate(found, start=1):
        empty = [split for split in SPLITS if split not in splits.values()]
        if empty:
            raise InputError(
                f"--folds {folds} --val_share {val_share:g}: fold {number} would have no {empty[0]} records; there are "
                f"{len(studies)}, of {len(patients)} patients, and up to {max(map(len, patients))} of one patient"
            )
    return found


def unequal_line(found: Sequence[dict[str, str]]) -> str | None:
    """A line of warning where folds differ so much in a split that their scores tell of its size."""
    share = len(found[0]) / len(found)
    for split in SPLITS:
        counts = [list(splits.values()).count(split) for splits in found]
        if max(counts) > 2 * min(counts) and max(counts) - min(counts) > share / 2:
            return (
                f"warning: the folds are very unequal, with {min(counts)} to {max(counts)} {split} records: a "
                "patient with many records stays in one split; fewer --folds even it out, or fewer of its records"
            )
    return None


def main() -> None:
    """Check the annotation and write the folds."""
    check_python()
    arguments = build_parser().parse_args()
    check(arguments)
    annotation = read_annotation(arguments.ann_path, required_splits=())
    found = make(annotation, arguments.folds, arguments.val_share, arguments.seed)
    content = read_json(arguments.ann_path, MAX_ANNOTATION)
    records = [record for split in SPLITS for record in content.get(split, ())]
    described = Path(arguments.ann_path).with_name(DESCRIPTION)
    with new_folder(arguments.out) as out:
        for number, splits in enumerate(found, start=1):
            _write(out / f"fold{number}" / "annotation.json", records, splits)
            if described.is_file():  # without it a fold would have another data set's defaults
                write_private(out / f"fold{number}" / DESCRIPTION, read_bytes(described, MAX_TEXT))
        write_results(
            out / RECORD,
            {
                "annotation_sha256": annotation.sha256,
                "folds": arguments.folds,
                "val_share": arguments.val_share,
                "seed": arguments.seed,
            },
        )
    for number, splits in enumerate(found, start=1):
        counts = Counter(splits.values())
        print(
            f"{arguments.out / f'fold{number}' / 'annotation.json'}: "
            + ", ".join(f"{split} {counts[split]}" for split in SPLITS)
        )
    if line := unequal_line(found):
        print(line, file=sys.stderr)


def _write(path: Path, records: Sequence[dict], splits: dict[str, str]) -> None:
    found: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for record in records:
        split = splits[str(record["id"])]
        found[split].append(record | ({"split": split} if "split" in record else {}))
    write_private(path, json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    run_entry_point(main)
