"""Which hard negatives a run trains with, and so which strategy."""

from modules.annotations import Annotation
from modules.config import Config
from modules.errors import InputError
from modules.mining import HardNegativeIndex


def hard_negatives(config: Config, annotation: Annotation) -> tuple[str, HardNegativeIndex | None]:
    """The strategy that --ithn and the available hard negatives lead to, and the index if one was given."""
    in_annotation = any(study.negative_report for study in annotation.splits["train"])
    # A strategy, variant or option that was asked for must not quietly end in the plain backbone.
    asked = config.strategy != "ithn" or config.released or config.on_encoder
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
