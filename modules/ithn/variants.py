"""The paper's and the released code's ITHN as sets of choices, and the strategies by name."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from modules.ithn.synthesis import STRATEGIES
from modules.runtime.errors import InputError


@dataclass(frozen=True)
class Variant:
    """The points at which the paper and the released code differ, the batch-mixing projection apart."""

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
# Where the features of the contrastive terms are taken; the encoder is beyond the paper.
CONTRASTIVE_FEATURES = ("extractor", "encoder")
WITHOUT_NEGATIVES = ("off", "contrastive")
SYNTHESES = tuple(name for name in STRATEGIES if name != "released")  # that one comes with the variant


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """InputError that names the choices where ``value`` is none of them."""
    if value not in choices:
        raise InputError(f"{name} {value!r}: must be one of {', '.join(choices)}")


def variant_rules(variant: str, **given: bool | float | None) -> Variant:
    """The variant's choices, with those of ``given`` in their place that are not None."""
    check_choice("variant", variant, tuple(VARIANTS))
    return replace(VARIANTS[variant], **{name: value for name, value in given.items() if value is not None})


def synthesis(strategy: str, variant: str, clamp_segment: bool) -> Callable | None:
    """The function of modules/ithn/synthesis.py behind a strategy's name; None where there is no synthesis."""
    check_choice("strategy", strategy, (*SYNTHESES, *WITHOUT_NEGATIVES))
    if strategy == "off":
        return None
    if clamp_segment and (strategy, variant) != ("ithn", "paper"):
        raise InputError(
            f"clamp_segment acts on strategy 'ithn' of variant 'paper' only, not on {strategy!r} of {variant!r}"
        )
    if clamp_segment:
        return functools.partial(STRATEGIES["ithn"], clamp_segment=True)
    return STRATEGIES.get("released" if (strategy, variant) == ("ithn", "released") else strategy)
