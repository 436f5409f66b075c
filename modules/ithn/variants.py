"""The choices at which the paper and the released code differ, and the other named choices of the objective."""

import math
from dataclasses import dataclass

NEGATIVES_AS = ("average", "columns")
CONTRASTIVE_TARGETS = ("own", "labels", "text")
CONTRASTIVE_FEATURES = ("extractor", "encoder")  # where the contrastive terms' features come from


@dataclass(frozen=True)
class Variant:
    """One side of every choice; another projection (synthesis.released) comes on top."""

    first_epoch: int  # the epoch, as logged from 1, whose hardness is 0
    ce_weight: float
    masked_mean: bool  # a report's feature is the mean over its own positions; else padding is averaged in
    own_harder_scale: bool  # S_3 has a temperature of its own
    keep_off_diagonal: bool  # of S_3'; else it is 0 there
    absolute_cosine: bool
    max_log_scale: float  # cap of t = log 1/tau
    detach_negative: bool  # u~ is an auxiliary variable: no gradient through it
    renormalise_negative: bool  # S_3 is a cosine; else the plain product with u~
    joint_pass: bool  # positives and negatives in one batch; else two calls, positives first


VARIANTS = {
    "paper": Variant(
        first_epoch=1,
        ce_weight=1.0,
        masked_mean=True,
        own_harder_scale=False,
        keep_off_diagonal=True,
        absolute_cosine=False,
        max_log_scale=math.log(100),
        detach_negative=True,
        renormalise_negative=True,
        joint_pass=True,
    ),
    "released": Variant(
        first_epoch=0,
        ce_weight=0.7,
        masked_mean=False,
        own_harder_scale=True,
        keep_off_diagonal=False,
        absolute_cosine=True,
        max_log_scale=math.inf,
        detach_negative=False,
        renormalise_negative=False,
        joint_pass=False,
    ),
}
