"""Split an annotation anew for cross-validation: K annotations, in which each study is in the test split once.

  python scripts/make_folds.py --ann_path data/iu_xray/annotation.json --folds 5 --out data/iu_xray_folds

writes fold1/annotation.json to fold5/annotation.json into that folder, for the same --image_dir. A small test split,
such as the 590 studies of IU X-Ray, tells only large differences from chance; the folds together test on every study.
Records of one patient (subject_id) or one study (study_id) stay together. A table of experiments with "folds" runs its
rows on all of them: docs/EXPERIMENT_TABLES.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.annotations import SPLITS, Study, read_annotation
from modules.environment import check_python
from modules.errors import InputError, run_entry_point
from modules.records import write_private


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ann_path", required=True, metavar="JSON", help="the annotation; how it is split now does not matter")
    add("--out", required=True, type=Path, metavar="FOLDER", help="new or empty folder for the folds")
    add("--folds", type=int, default=5, metavar="K", help="default %(default)s")
    add("--val_share", type=float, default=0.1, metavar="SHARE",
        help="of all records, for the validation split of each fold; default %(default)s, as in R2Gen's IU X-Ray")
    add("--seed", type=int, default=9233, metavar="S", help="deals patients to folds; default %(default)s")
    return parser


def deal(studies: Sequence[Study], folds: int, seed: int) -> list[list[list[str]]]:
    """The ids, by patient and fold: shuffled patients, dealt so that the folds have about as many records each."""
    import numpy as np

    patients: dict[str, list[str]] = {}
    for study in studies:
        patients.setdefault(study.subject_id or study.study_id, []).append(study.id)
    names = list(patients)
    dealt: list[list[list[str]]] = [[] for _ in range(folds)]
    done = 0
    for number in np.random.default_rng(seed).permutation(len(names)):
        dealt[done * folds // len(studies)].append(patients[names[number]])
        done += len(patients[names[number]])
    return dealt


def split_of(dealt: Sequence[Sequence[Sequence[str]]], fold: int, val_count: int) -> dict[str, str]:
    """The split of each id where ``fold`` is tested; the patients dealt next are the validation split."""
    splits = {name: "test" for patient in dealt[fold] for name in patient}
    others = [patient for step in range(1, len(dealt)) for patient in dealt[(fold + step) % len(dealt)]]
    val = 0
    for patient in others:
        splits |= dict.fromkeys(patient, "val" if val < val_count else "train")
        val += len(patient)
    return splits


def main() -> None:
    """Check the annotation and write the folds."""
    check_python()
    arguments = build_parser().parse_args()
    folds, share, out = arguments.folds, arguments.val_share, arguments.out
    if folds < 2:
        raise InputError(f"--folds {folds}: must be at least 2")
    if not 0 < share < 1 - 1 / folds:
        raise InputError(f"--val_share {share:g}: must be above 0 and leave something to train on, that is, be below "
                         f"{1 - 1 / folds:g} with --folds {folds}")
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: must be 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is not empty; give a new folder")
    annotation = read_annotation(arguments.ann_path, required_splits=())
    studies = [study for split in annotation.splits.values() for study in split]
    if any(study.negative_report for study in studies):
        raise InputError(f"{arguments.ann_path}: its records carry negatives (neg_report), which were chosen for this "
                         "split; take the annotation without them, and mine for each fold")
    dealt = deal(studies, folds, arguments.seed)
    if len({study.subject_id or study.study_id for study in studies}) < 3 * folds or not all(dealt):
        raise InputError(f"--folds {folds}: too many for {len(studies)} records; each needs a patient for every split")
    content = json.loads(Path(arguments.ann_path).read_text(encoding="utf-8-sig"))
    records = {record["id"]: record for split in SPLITS for record in content.get(split, ())}
    for fold in range(folds):
        _write(out / f"fold{fold + 1}" / "annotation.json", records, split_of(dealt, fold, round(share * len(studies))))


def _write(path: Path, records: dict[Any, dict], splits: dict[str, str]) -> None:
    found: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for name, record in records.items():
        split = splits[str(name)]
        found[split].append(record | ({"split": split} if "split" in record else {}))
    write_private(path, json.dumps(found, ensure_ascii=False))
    print(f"{path}: " + ", ".join(f"{split} {len(own)}" for split, own in found.items()))


if __name__ == "__main__":
    run_entry_point(main)
