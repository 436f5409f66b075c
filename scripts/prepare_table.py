"""Make annotation.json, dataset.json and, on request, images of any table of images and reports.

  python scripts/prepare_table.py reports.csv --out data/own --images scans --resize 256
  python scripts/prepare_table.py df_chexpert_plus_240401.csv --preset chexpert_plus --out data/chexpert_plus
  python scripts/prepare_table.py train.report.tok train.image.tok ... --preset vilmedic --out data/own

Tables are CSV, TSV, JSON, JSON lines, Parquet, Flickr's token file or pairs of .tok files; several are read one after
the other. Columns are given by flags, taken from a preset, or guessed from their names; what was taken is printed. A
flag takes a column, several to join, a dotted path into JSON (findings.sentence) or a template ("{folder}/{name}.png").
Where the table has no split, 7:1:2 are drawn by --seed; no patient is in two splits. A second run gives the same bytes.
"""

import argparse
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.annotations import SPLITS
from modules.data.dataset_specs import check_name, is_english
from modules.flags import Parser
from modules.prepare.image_placing import Placing, add_placing_flags, check_placing, place_images
from modules.prepare.prepared_folder import require_splits, write_prepared
from modules.prepare.splits import read_split
from modules.prepare.table_columns import (
    GUESSES,
    Columns,
    Preset,
    find_columns,
    header_names,
    joined_tables,
    preset_names,
    read_preset,
    texts,
)
from modules.prepare.table_records import Record, as_annotation, read_records, settle_splits
from modules.prepare.user_tables import read_pairs, read_user_table
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import check_annotation

ROLES = {
    "id": "the record's id",
    "study": "rows of one study are one record with all its images",
    "patient": "whose records stay in one split",
    "split": "train, val (valid, dev, ...) or test",
    "image": "path of the image, or of several (a list, or separated by ; or |)",
    "captions": "list of captions of the image, in place of a report",
    "report": "the report; several columns are joined in their order",
    "view": "projection of each image",
    "language": "a language code",
    "date": "date and time of the study, by which priors are found",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="the table, or several")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, e.g. data/own")
    parser.add_argument("--preset", default="", metavar="NAME", help=f"a published layout: {', '.join(preset_names())}")
    columns = parser.add_argument_group("columns (guessed from their names where not given)")
    for role, text in ROLES.items():
        columns.add_argument(f"--{role}", nargs="+", metavar="COLUMN", help=text)
    parser.add_argument("--records", choices=("study", "image"), help="one record per study (default), or per image")
    parser.add_argument(
        "--split_file", type=Path, metavar="FILE", help="annotation.json, JSON of id lists or CSV (id, split) to follow"
    )
    parser.add_argument("--new_split", action="store_true", help="draw a split, whatever the table says")
    parser.add_argument("--seed", type=int, default=0, help="of a split that is drawn (default %(default)s)")
    parser.add_argument("--name", metavar="NAME", help="name of the data set (default: the preset's, or of the folder)")
    parser.add_argument("--licence", default="", metavar="TEXT", help="licence of the data, for model cards")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder that image paths start from")
    add_placing_flags(parser.add_argument)
    return parser


def check(arguments: argparse.Namespace) -> None:
    """InputError for values that cannot work."""
    check_placing(arguments.resize, arguments.workers)
    if arguments.images and not arguments.images.is_dir():
        raise InputError(f"--images {arguments.images}: no such folder")
    arguments.name = arguments.name or arguments.preset or arguments.out.absolute().name
    check_name(arguments.name, "name")


def show_columns(columns: Columns, rows: int) -> None:
    """Print what was taken for what."""
    print(f"{rows:,} rows; columns taken:")
    for role, names in columns.roles.items():
        print(f"  {role:<10} {' + '.join(names)}  ({columns.origin[role]})")
    for name, own in columns.sections.items():
        print(f"  section    {name}: {' + '.join(own)}")


def placed(arguments: argparse.Namespace, records: list[Record], counts: Counter) -> list[Record]:
    """Place the images and leave out those that could not be read, and records without any."""
    placing = Placing(arguments.place, arguments.resize, os.path.realpath(arguments.images))
    names = dict.fromkeys(image for record in records for image in record.images)
    targets = _targets(list(names), arguments.resize)
    pairs = [(arguments.images / image, arguments.out / "images" / targets[image]) for image in names]
    found = place_images(arguments.out, placing, pairs, arguments.workers)
    reasons = {image: found[target] for image, (_, target) in zip(names, pairs, strict=True)}
    for record in records:
        kept = [index for index, image in enumerate(record.images) if reasons[image] is None]
        record.views = [record.views[index] for index in kept]
        record.images = [targets[record.images[index]] for index in kept]
    had = [record for record in records if record.images]
    if not had:
        image, reason = next(iter(reasons.items()))
        raise InputError(
            f"--images {arguments.images}: none of the images could be read, e.g. {image}: {reason}; give the folder "
            "from which these paths start"
        )
    counts["records without any image left"] += len(records) - len(had)
    return had


def _targets(images: list[str], resize: int) -> dict[str, str]:
    """The file of each image, no two the same: what is written again is written as PNG or JPEG."""
    targets = {image: image for image in images if not resize or image.lower().endswith((".png", ".jpg", ".jpeg"))}
    taken = set(targets)
    for image in (image for image in images if image not in taken):
        target = f"{image}.png"
        while target in taken:  # beside a.bmp there may be an a.bmp.png
            target += ".png"
        targets[image] = target
        taken.add(target)
    return targets


def language_of(rows: list, columns: Columns) -> str:
    """The code of the language that all rows name, "" without one; InputError for a text that is no code."""
    named = columns.roles.get("language", ())
    found = {"en" if is_english(text) else text.lower() for row in rows for text in texts(row, named)}
    for text in sorted(found):
        if not re.fullmatch(r"[a-z]{2,3}([-_][a-z0-9]+)*", text):
            raise InputError(
                f"--language {' '.join(named)}: {text[:40]!r} is no language code such as en, es or zh; write codes "
                "there, or name another column"
            )
    if len(found) > 1:
        print(f"languages {', '.join(sorted(found)[:8])}: dataset.json names none of them, and main_train.py takes en")
    return found.pop() if len(found) == 1 else ""


def describe(
    arguments: argparse.Namespace, preset: Preset, columns: Columns, rows: list, records: list[Record]
) -> dict[str, Any]:
    """The content of dataset.json."""
    facts = {"name": arguments.name} | preset.data
    if language := language_of(rows, columns):
        facts["language"] = language
    if any(record.captions for record in records):
        facts["captions"] = True
    facts.setdefault("views", min(2, max(len(record.images) for record in records)))
    if arguments.licence:
        facts["licence"] = arguments.licence
    return facts


def main() -> None:
    """Read the tables, find the columns, split, place the images, write."""
    arguments = build_parser().parse_args()
    check(arguments)
    preset = read_preset(arguments.preset)
    pairs = all(path.suffix == ".tok" for path in arguments.tables)
    given = {role: value for role in GUESSES if (value := getattr(arguments, role)) is not None}
    names = header_names(given, preset)
    tables = [read_user_table(path, preset.rows, names) for path in arguments.tables] if not pairs else []
    rows = joined_tables(tables) if not pairs else read_pairs(arguments.tables)
    columns = find_columns(rows, given, preset)
    show_columns(columns, len(rows))
    by_image = (arguments.records or preset.records) == "image"
    read = read_records(rows, columns, by_image=by_image, images=arguments.images)
    if not read.records:
        raise InputError(f"{arguments.tables[0]}: no study has both an image and a report")
    named = read_split(arguments.split_file, "--split_file") if arguments.split_file else None
    records, how = settle_splits(read, seed=arguments.seed, named=named, new=arguments.new_split)
    path = arguments.out / "annotation.json"
    check_annotation(path, as_annotation(records)[0])
    if arguments.images:
        records = placed(arguments, records, read.counts)
    annotation, priors, unread = as_annotation(records)
    require_splits(path, annotation)
    read.counts["dates that are not understood, whose studies have no prior (write them as 2024-01-31)"] = unread
    here = arguments.place != "none" or arguments.resize
    folder = arguments.out / "images" if arguments.images and here else arguments.images
    facts = describe(arguments, preset, columns, rows, records)
    closing = write_prepared(arguments.out, annotation, facts, image_dir=folder)
    for kind, count in read.counts.items():
        print(f"{kind}: {count:,}" if count else "", end="\n" if count else "")
    counts = ", ".join(f"{split} {len(annotation[split]):,}" for split in SPLITS)
    print(f"{len(records):,} records ({counts}; {how}), {priors:,} with a prior study")
    print(closing)


if __name__ == "__main__":
    run_entry_point(main)
