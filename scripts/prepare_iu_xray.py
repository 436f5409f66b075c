"""Make data/iu_xray (annotation.json and images), in R2Gen's layout, from the files of Open-i or Kaggle.

  Open-i:  --reports NLMCXR_reports.tgz --images NLMCXR_png.tgz        (archives, or the folders they unpack to)
  Kaggle:  --reports FOLDER             --images FOLDER/images/images_normalized
           where FOLDER holds indiana_reports.csv and indiana_projections.csv

Studies with findings and two images or more are taken: R2Gen's 2,955. --split takes the published split from R2Gen's
annotation.json (only its ids are read); without it 7:1:2 are drawn with --seed.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.annotations import SPLITS
from modules.flags import Parser
from modules.labels.sentences import is_missing
from modules.prepare.image_placing import WAYS, Placing, add_placing_flags, check_placing, keep_settings
from modules.prepare.openi import OpeniStudy, annotation_record, order_of_views, place_images, read_openi
from modules.prepare.prepared_folder import write_prepared
from modules.prepare.splits import read_split, seeded_split
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import check_annotation

Studies = dict[str, list[tuple[str, OpeniStudy]]]  # (id, study) by split
# An id names a folder of images: CXR2_IM-0652, CXR2_IM-0652-1001, CXR2, 2, and nothing that leads elsewhere.
_ID = re.compile(r"(?:CXR)?(\d{1,9})(?:_[\w.-]*)?")
R2GEN = {"train": 2069, "val": 296, "test": 590}
HINT = "; --split FILE, with the file that you moved, keeps its split: R2Gen's, where it is R2Gen's annotation.json"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--reports",
        type=Path,
        required=True,
        metavar="PATH",
        help="NLMCXR_reports.tgz, a folder of its XML files, or Kaggle's indiana_reports.csv or folder",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="PATH",
        help="NLMCXR_png.tgz or the folder of the PNG files (without: the annotation alone is written)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, e.g. data/iu_xray")
    parser.add_argument(
        "--split",
        type=Path,
        metavar="FILE",
        help="R2Gen's annotation.json, JSON {train: [ids], val: [...], test: [...]} or CSV (id, split)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split drawn without --split (default %(default)s)")
    parser.add_argument(
        "--projections",
        type=Path,
        metavar="CSV",
        help="indiana_projections.csv: names each image's view (Kaggle's layout has it already)",
    )
    parser.add_argument(
        "--frontal_first",
        action="store_true",
        help="list a frontal view before a lateral one (R2Gen: the report's order)",
    )
    add_placing_flags(parser.add_argument, WAYS[:2])
    return parser


def choose_studies(studies: list[OpeniStudy], split: Path | None, seed: int) -> Studies:
    """(id, study) of every split, in the order of the split's file, or else of the studies.

    InputError where none is left.
    """
    usable = {study.number: study for study in studies if study.is_usable}
    if not usable:
        raise InputError("no study has findings and two images; are these all of Open-i's reports?")
    if split is None:
        # Open-i removed whatever would name a patient, so a report is the only unit that can be kept whole.
        print("note: Open-i's files name no patients: each report counts as one patient in the split")
        drawn = seeded_split(list(usable), seed)
        chosen = [(study.id, name, study) for study, name in zip(usable.values(), drawn, strict=True)]
    else:
        chosen = _named_studies(usable, split)
    return {name: [(identity, study) for identity, own, study in chosen if own == name] for name in SPLITS}


def _named_studies(usable: Mapping[str, OpeniStudy], split: Path) -> list[tuple[str, str, OpeniStudy]]:
    """(id, split, study) of the ids in the file ``split`` that are ``usable`` studies; warns of the others.

    InputError where none is, or two are one study.
    """
    named = read_split(split)
    chosen: dict[str, tuple[str, str, OpeniStudy]] = {}
    for identity, name in named.items():
        match = _ID.fullmatch(identity)
        if match is None or match[1] not in usable:
            continue
        first, home, _ = chosen.setdefault(match[1], (identity, name, usable[match[1]]))
        if first != identity:
            raise InputError(
                f"--split {split}: {first!r} ({home}) and {identity!r} ({name}) are both report CXR{match[1]}; name "
                "each report once"
            )
    if not chosen:
        raise InputError(f"--split {split}: none of its {len(named)} ids is a study of --reports")
    if len(chosen) < len(named):
        print(
            f"warning: {len(named) - len(chosen)} of the {len(named)} studies of {split.name} are not among the "
            "reports with findings and two images: left out",
            file=sys.stderr,
        )
    return list(chosen.values())


def records(chosen: Studies, orders: dict[str, list[int]]) -> dict[str, list[dict]]:
    """The annotation."""
    return {
        split: [annotation_record(identity, study, split, orders[identity]) for identity, study in own]
        for split, own in chosen.items()
    }


def without_missing_images(chosen: Studies, orders: dict[str, list[int]], arguments: argparse.Namespace) -> Studies:
    """Place the images; the studies whose two first ones could be read."""
    targets = {
        study.images[index]: arguments.out / "images" / identity / f"{place}.png"
        for studies in chosen.values()
        for identity, study in studies
        for place, index in enumerate(orders[identity])
    }
    placing = Placing(arguments.place, arguments.resize, os.path.realpath(arguments.images))
    keep_settings(arguments.out, placing)
    missing = place_images(arguments.images, targets, placing, arguments.workers)
    return {
        split: [
            (identity, study)
            for identity, study in own
            if missing.isdisjoint(study.images[index] for index in orders[identity][:2])
        ]
        for split, own in chosen.items()
    }


def check(arguments: argparse.Namespace) -> None:
    """InputError for values that cannot work."""
    check_placing(arguments.resize, arguments.workers)
    if arguments.images and not arguments.images.exists():
        raise InputError(f"--images {arguments.images}: no such file or folder")


def main() -> None:
    """Read the reports, split them, place the images, write the annotation."""
    arguments = build_parser().parse_args()
    check(arguments)

    studies = read_openi(arguments.reports, arguments.projections)
    if arguments.frontal_first and not any(study.views for study in studies):
        raise InputError(
            "--frontal_first: Open-i's reports do not say which view is which; give --projections "
            "indiana_projections.csv (from Kaggle)"
        )
    chosen = choose_studies(studies, arguments.split, arguments.seed)
    path = arguments.out / "annotation.json"
    orders = {
        identity: order_of_views(study, arguments.frontal_first)
        for studies in chosen.values()
        for identity, study in studies
    }
    check_annotation(path, records(chosen, orders), HINT)
    if arguments.images:
        chosen = without_missing_images(chosen, orders, arguments)
    annotation = records(chosen, orders)
    facts = {"name": "iu_xray", "language": "en", "licence": "CC BY-NC-ND 4.0"}
    images = arguments.out / "images" if arguments.images else None
    closing = write_prepared(arguments.out, annotation, facts, image_dir=images, hint=HINT)
    print(f"{len(studies)} reports read from {arguments.reports}")
    without = sum(is_missing(study.findings) for study in studies)
    few = sum(not study.is_usable for study in studies) - without
    print(f"  left out: {without} without findings, {few} with findings and fewer than two images")
    for split in SPLITS:
        print(f"  {split:<6}{len(annotation[split]):>6} studies    (R2Gen: {R2GEN[split]})")
    if empty := [split for split in SPLITS if not annotation[split]]:
        print(f"warning: {path}: no study for {' and '.join(empty)}; training needs all three splits", file=sys.stderr)
    print(closing)


if __name__ == "__main__":
    run_entry_point(main)
