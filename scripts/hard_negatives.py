"""Which hard negatives a run trains with, and so which strategy."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modules.annotations import Annotation, Study
from modules.config import Config
from modules.config_checks import beyond_ithn
from modules.errors import InputError
from modules.label_files import LabelTable, labels_by_rules, read_labels
from modules.mining import HardNegativeIndex, group_ids

logger = logging.getLogger("ithn")


def hard_negatives(config: Config, annotation: Annotation) -> tuple[str, HardNegativeIndex | None]:
    """The strategy that --ithn and the available hard negatives lead to, and the index if one was given."""
    in_annotation = any(study.negative_report for study in annotation.splits["train"])
    # A strategy, variant or option that was asked for must not quietly end in the plain backbone.
    asked = config.strategy != "ithn" or config.released or beyond_ithn(config)
    wanted = config.ithn == "on" or (config.ithn == "auto" and (config.negative_index or in_annotation or asked))
    if not wanted:
        return "off", None
    if config.strategy == "contrastive":
        return config.strategy, None
    if config.negative_index:
        index = HardNegativeIndex.load(config.negative_index)
        index.check(annotation)
        return config.strategy, index
    if not in_annotation:
        raise InputError(f"--strategy {config.strategy} needs hard negatives and {config.ann_path} has no neg_report: "
                         f"run python scripts/mine_hard_negatives.py --ann_path {config.ann_path} --out FILE, then "
                         "give --negative_index FILE (or --ithn off for the plain backbone)")
    if config.strategy == "mochi":
        raise InputError("--strategy mochi draws from several neighbours, the annotation's neg_report is one: mine an "
                         "index with scripts/mine_hard_negatives.py and give --negative_index")
    return config.strategy, None


def same_labels(config: Config, studies: Sequence[Study], labels: LabelTable | None) -> np.ndarray:
    """A number for each study (N,), equal for equal labels: those of the backbone, of --label_path, or by rules.

    InputError for a study that the file has no labels for, or for a file that was named and is not there.
    """
    if labels is None and (config.label_path != Config.label_path or Path(config.label_path).is_file()):
        labels = read_labels(config.label_path, columns=config.label_columns)
    found = labels_by_rules([study.report for study in studies]) if labels is None else labels.of(studies)
    keys = group_ids(row.tobytes() for row in found)
    logger.info("--mask_same_labels: %d different sets of labels among %d training studies, %s; the commonest has %d",
                keys.max() + 1, len(keys), f"of {labels.path}" if labels else "by rules", np.bincount(keys).max())
    return keys
