"""Which hard negatives a run trains with, and so which strategy."""

import dataclasses
from collections.abc import Collection

from modules.config import Config
from modules.data.annotations import Annotation
from modules.ithn.synthesis import DRAWING_NEIGHBOURS, NEEDING_NEGATIVES
from modules.mining.index import HardNegativeIndex
from modules.runtime.errors import InputError

ASKING = ("strategy", "ithn_variant")  # flags that ask for ITHN by being given, whatever their value
# Flags of ITHN that the plain backbone goes by too, or that say whether it is trained.
ALWAYS_IN_USE = ("ithn", "ce_weight")


def asks_for_ithn(given: Collection[str]) -> bool:
    """Whether one of the flags ``given`` asks for ITHN; a Config does not tell a default that was typed out."""
    return not set(ASKING).isdisjoint(given)


def idle_line(given: Collection[str]) -> str | None:
    """A line for the log of a run without ITHN that names the flags ``given`` that do nothing there, if any."""
    idle = [
        f"--{item.name}"
        for item in dataclasses.fields(Config)
        if item.name in given and item.metadata["group"] in ("ITHN", "beyond ITHN") and item.name not in ALWAYS_IN_USE
    ]
    return f"ignored, because ITHN is off: {', '.join(idle)}" if idle else None


def hard_negatives(
    config: Config, annotation: Annotation, *, asked: bool = False
) -> tuple[str, HardNegativeIndex | None]:
    """The strategy that --ithn and the available hard negatives lead to, and the index if one was given.

    ``asked``: a flag that was given asks for ITHN (``asks_for_ithn``).
    """
    in_annotation = any(study.negative_report for study in annotation.splits["train"])
    # A strategy, variant or option that was asked for must not quietly end in the plain backbone.
    asked = asked or config.strategy != "ithn" or config.released or config.on_encoder
    wanted = config.ithn == "on" or (config.ithn == "auto" and (config.negative_index or in_annotation or asked))
    if not wanted:
        return "off", None
    if config.strategy not in NEEDING_NEGATIVES:
        return config.strategy, None
    if config.negative_index:
        index = HardNegativeIndex.load(config.negative_index)
        index.check(annotation)
        return config.strategy, index
    if not in_annotation:
        raise InputError(
            f"--strategy {config.strategy} needs hard negatives and {config.ann_path} has no neg_report: "
            f"run python scripts/mine_hard_negatives.py --ann_path {config.ann_path} --out FILE, then "
            "give --negative_index FILE (or --ithn off for the plain backbone)"
        )
    if config.strategy in DRAWING_NEIGHBOURS:
        raise InputError(
            f"--strategy {config.strategy} draws from several neighbours, the annotation's neg_report is one: mine an "
            "index with scripts/mine_hard_negatives.py and give --negative_index"
        )
    return config.strategy, None
