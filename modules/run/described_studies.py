"""Studies that an annotation or a table describes, with their context, for scripts/predict.py."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from modules.config import Config
from modules.data.annotations import SPLITS, Annotation, frontal_first, read_unreported, split_of
from modules.data.study_context import ContextReader, sections_text
from modules.inference.study_files import StudyFiles, images_in
from modules.prepare.table_columns import Preset, find_columns, texts
from modules.prepare.table_records import as_annotation, read_records
from modules.prepare.user_tables import read_user_table
from modules.runtime.errors import InputError


def read_described(path: str, image_dir: str, split: str) -> Annotation:
    """``split`` of an annotation, or all records of a JSON list of such or of a table as prepare_table.py reads it (of
    a table that has splits, ``split``); none needs a report. InputError for other content.
    """
    if not Path(image_dir).is_dir():
        raise InputError(f"--image_dir {image_dir}: no such folder")
    if Path(path).suffix.lower() == ".json":
        return read_unreported(path, split)
    rows = read_user_table(Path(path))
    for row in rows:
        row["prior"] = "".join(texts(row, ["prior"])[:1]) or None
    columns = dataclasses.replace(find_columns(rows, {}, Preset(), reports=False), extra=("prior",))
    read = read_records(rows, columns, by_image=False, images=Path(image_dir), reports=False)
    records = read.records
    for kind, count in read.counts.items():
        print(f"--ann_path {path}: {kind}: {count}", file=sys.stderr)
    if any(record.split for record in records):
        records = [record for record in records if split_of(record.split) == split]
    if not records:
        raise InputError(f"--ann_path {path}: no row with an image is in split {split} (--split {', '.join(SPLITS)})")
    for record in records:
        record.split = split
    return read_unreported(path, split, rows=as_annotation(records)[0][split])


def study_files(described: Annotation, image_dir: str, config: Config, tokenizer: Any) -> list[StudyFiles]:
    """The studies as a model with the settings ``config`` reads them in a test, without opening an image.

    InputError for an image outside ``image_dir``.
    """
    separate = config.views == "separate"
    if config.max_views and not separate:
        described = frontal_first(described)
    [studies] = described.splits.values()
    known = studies
    if config.report_sections:  # a study without them is no prior in training either
        known = tuple(
            dataclasses.replace(study, report=text)
            for study in studies
            if (text := sections_text(study, config.report_sections))
        )
    reader = ContextReader(known, tokenizer, config.contexts, config.max_seq_length)
    most = 1 if separate else config.dataset.max_views
    found = []
    for study in studies:
        where = f"{described.path}: study {study.id!r}"
        images = images_in(image_dir, study.image_paths, where, config.follow_links)
        before = reader.prior(study) if reader.prior_images else None
        prior = images_in(image_dir, before.image_paths[:most], where, config.follow_links) if before else ()
        context = reader.tokens(study)
        if separate:
            found += [StudyFiles(f"{study.id}#{view}", (image,), prior, context) for view, image in enumerate(images)]
        else:
            found.append(StudyFiles(study.id, images, prior, context))
    return found
