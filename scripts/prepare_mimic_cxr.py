"""Make data/mimic_cxr (annotation.json, images, summary.json) from PhysioNet's files, in R2Gen's layout.

  --reports  mimic-cxr-reports.zip, or the folder of MIMIC-CXR in which files/p10/... holds the reports
  --tables   the folder with mimic-cxr-2.0.0-split.csv.gz and -metadata.csv.gz (-chexpert.csv.gz for --labels_out)
  --images   the folder of MIMIC-CXR-JPG in which files/p10/... holds the images; DICOM files of MIMIC-CXR will do

All of this needs credentialed access at PhysioNet, whose data use agreement also covers what is written here. The split
is the official one, which keeps patients whole. Nothing is written outside --out, except --labels_out.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.annotations import SPLITS
from modules.flags import Parser
from modules.labels.tables import write_table
from modules.prepare.image_placing import Placing, add_placing_flags, check_placing, place_images
from modules.prepare.mimic_cxr import (
    SECTIONS,
    MimicImage,
    find_suffix,
    find_tree,
    label_columns,
    read_chexpert,
    read_images,
    read_reports,
    read_sections,
)
from modules.prepare.prepared_folder import write_prepared
from modules.prepare.priors import add_priors
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_annotation, check_outputs, contains
from modules.runtime.records import write_results

SUMMARY = "summary.json"
LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
R2GEN = {"train": 270790, "val": 2130, "test": 3858}
_FRONTAL, _LATERAL = ("PA", "AP"), ("LATERAL", "LL")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--reports",
        type=Path,
        required=True,
        metavar="PATH",
        help="mimic-cxr-reports.zip, or a folder of reports (files/p10/p10000032/s50414267.txt)",
    )
    parser.add_argument("--tables", type=Path, required=True, metavar="DIR", help="folder of the .csv.gz tables")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images (without: the annotation alone is written)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, e.g. data/mimic_cxr")
    parser.add_argument(
        "--section",
        choices=SECTIONS,
        default="findings",
        help="section of the report to write (default %(default)s, as R2Gen)",
    )
    parser.add_argument(
        "--records",
        choices=("image", "study"),
        default="image",
        help="one record per image, as R2Gen, or per study with all its images (default image)",
    )
    parser.add_argument("--views", nargs="+", metavar="VIEW", help="take only these view positions, e.g. PA AP")
    add_placing_flags(parser.add_argument)
    parser.add_argument(
        "--labels_out",
        type=Path,
        metavar="CSV",
        help="write the CheXpert labels of every study, for --label_path of main_train.py",
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """InputError for values that cannot work."""
    check_placing(arguments.resize, arguments.workers)
    for flag in ("tables", "images"):
        folder = getattr(arguments, flag)
        if folder and not folder.is_dir():
            raise InputError(f"--{flag} {folder}: no such folder")
    check_outputs(
        [
            Output(
                "--labels_out",
                arguments.labels_out,
                "a table of labels of this program",
                contains(",".join(label_columns())),
            ),
            Output("--out", arguments.out / SUMMARY, "a summary of this program", contains('"undecidable"')),
        ],
        [("--reports", arguments.reports), ("annotation.json", arguments.out / "annotation.json")],
    )


def extract_reports(
    source: Path, images: list[MimicImage], section: str
) -> tuple[dict[str, str], dict[str, dict[str, str]], dict[str, list[str]]]:
    """Study id -> the section of its report, without studies that have none; study id -> all its sections by name; and
    reason -> undecidable study ids. InputError where no report is there.
    """
    from modules.runtime.run_log import Bar

    studies = list({image.study_id: image for image in images}.values())
    found, named, undecidable = {}, {}, defaultdict(list)
    for study, text in Bar(read_reports(source, studies), "reports", total=len(studies)):
        sections = read_sections(text)
        found[study], named[study] = sections.text(section), sections.named
        for doubt in sections.doubts_about(section):
            undecidable[doubt].append(study)
    if not found:
        raise InputError(f"--reports {source}: holds none of the {len(studies)} reports (s{studies[0].study_id}.txt)")
    if len(found) < len(studies):
        print(f"warning: {len(studies) - len(found)} of {len(studies)} reports are not in {source}", file=sys.stderr)
    return {study: text for study, text in found.items() if text}, named, undecidable


def placed(arguments: argparse.Namespace, images: list[MimicImage]) -> tuple[list[MimicImage], str]:
    """The images that could be read, and the extension of their files in the output folder."""
    tree = find_tree(arguments.images)
    suffix = find_suffix(tree, images)
    placing = Placing(arguments.place, arguments.resize, os.path.realpath(tree))
    ending = ".jpg" if arguments.resize else suffix
    pairs = [
        (
            tree / image.folder / f"{image.dicom_id}{suffix}",
            arguments.out / "images" / image.folder / f"{image.dicom_id}{ending}",
        )
        for image in images
    ]
    reasons = place_images(arguments.out, placing, pairs, arguments.workers)
    had = [image for image, (_, target) in zip(images, pairs, strict=True) if reasons[target] is None]
    return had, ending


def frontal_and_lateral_first(images: list[MimicImage]) -> list[MimicImage]:
    """The first frontal image, the first lateral one, then the others: two-view networks read two."""
    leading = [next((image for image in images if image.view in views), None) for views in (_FRONTAL, _LATERAL)]
    leading = [image for image in leading if image is not None]
    return leading + [image for image in images if image not in leading]


def build_records(
    images: list[MimicImage], reports: dict[str, str], named: dict[str, dict[str, str]], records: str, ending: str
) -> dict[str, list]:
    """The annotation: one record per image, or one per study with a frontal view first; with the sections ``named`` and
    each study's prior.
    """
    groups = defaultdict(list)
    for image in images:
        groups[image.dicom_id if records == "image" else f"s{image.study_id}"].append(image)
    annotation, moments = {split: [] for split in SPLITS}, {}
    for identity, group in groups.items():
        group = frontal_and_lateral_first(group)
        first = group[0]
        annotation[first.split].append(
            {
                "id": identity,
                "study_id": int(first.study_id),
                "subject_id": int(first.subject_id),
                "report": reports[first.study_id],
                "split": first.split,
                "view": [image.view for image in group],
                "image_path": [f"{image.folder}/{image.dicom_id}{ending}" for image in group],
                "sections": named[first.study_id],
            }
        )
        moments[identity] = first.moment
    add_priors((record for own in annotation.values() for record in own), moments)
    return annotation


def show_counts(stages: dict[str, Counter], records: str, section: str) -> None:
    """Print one row per stage, and R2Gen's numbers."""
    width = max(map(len, stages)) + 2
    print(" " * width + "".join(f"{split:>10}" for split in SPLITS))
    for name, counts in (stages | {"R2Gen's records": Counter(R2GEN)}).items():
        print(f"{name:<{width}}" + "".join(f"{counts[split]:>10,}" for split in SPLITS))
    if (records, section) != ("image", "findings"):
        print("(R2Gen: --section findings --records image, all views)")


def write_summary(arguments: argparse.Namespace, counts: dict[str, Counter], undecidable: dict[str, list[str]]) -> None:
    """Write summary.json: the counts of every stage, and the studies whose section is undecidable, by reason."""
    for reason, studies in undecidable.items():
        print(f"undecidable: {reason}: {len(studies):,} studies, listed in {arguments.out / SUMMARY}")
    write_results(
        arguments.out / SUMMARY,
        {
            "section": arguments.section,
            "records": arguments.records,
            "counts": {stage: {split: own[split] for split in SPLITS} for stage, own in counts.items()},
            "undecidable": {
                reason: {"studies": len(studies), "study_ids": sorted(studies)}
                for reason, studies in undecidable.items()
            },
        },
    )


def main() -> None:
    """Read tables and reports, place the images, write the annotation and the labels."""
    arguments = build_parser().parse_args()
    check(arguments)

    images = read_images(arguments.tables)
    stages = {"images of the official split": images}
    if arguments.views:
        views = {view.upper() for view in arguments.views}
        known = {image.view for image in images}
        if views - known:
            raise InputError(
                f"--views {' '.join(sorted(views - known))}: no image of this view; the metadata list "
                f"{', '.join(sorted(filter(None, known)))}"
            )
        images = [image for image in images if image.view in views]
        stages[f"of the views {' '.join(sorted(views))}"] = images
    labels = read_chexpert(arguments.tables) if arguments.labels_out else None
    reports, named, undecidable = extract_reports(arguments.reports, images, arguments.section)
    images = [image for image in images if image.study_id in reports]
    stages[f"with {'findings or impression' if arguments.section == 'both' else arguments.section}"] = images
    if not images:
        raise InputError(f"--reports {arguments.reports}: no report has the section, --section {arguments.section}")
    path, ending = arguments.out / "annotation.json", ".jpg"
    check_annotation(path, build_records(images, reports, named, arguments.records, ending))
    if arguments.images:
        images, ending = placed(arguments, images)
        stages["whose file is there"] = images
        if not images:
            raise InputError(f"--images {arguments.images}: none of the images could be read")
    annotation = build_records(images, reports, named, arguments.records, ending)
    place = arguments.out / "images" if arguments.images else None
    if arguments.place == "none" and not arguments.resize and arguments.images:
        place = find_tree(arguments.images)
    views = {"views": 2} if arguments.records == "study" else {}  # a frontal and a lateral one; R2Gen reads one
    facts = {"name": "mimic_cxr", "language": "en", **views, "licence": LICENCE}
    closing = write_prepared(arguments.out, annotation, facts, image_dir=place)
    if arguments.labels_out:
        write_table(arguments.labels_out, label_columns(), labels)

    counts = {name: Counter(image.split for image in own) for name, own in stages.items()}
    counts["records written"] = Counter({split: len(records) for split, records in annotation.items()})
    show_counts(counts, arguments.records, arguments.section)
    write_summary(arguments, counts, undecidable)
    print(closing)


if __name__ == "__main__":
    run_entry_point(main)
