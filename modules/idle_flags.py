"""Which of the flags that were given have no effect on a run: they are named in its log and not recorded."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from models import backbone_class, settings_class
from modules.config import BACKBONE_SETTINGS, TRAIN_ONLY, Config, settings_of, settings_with
from modules.decoding.options import DecodingOptions
from modules.ithn.settings import ITHNSettings
from modules.runtime.settings import part_of
from modules.training.settings import OptimSettings, SelfCriticalSettings

ASKING_FOR_ITHN = ("strategy", "ithn_variant")  # flags that ask for ITHN by being given, whatever their value
# Settings of ITHN that the plain backbone uses too, or that say whether ITHN is on.
WITHOUT_ITHN = ("ithn", "ce_weight")
_DESCRIBED = ("visual_extractor_config",)
LABEL_FILES = ("label_path", "label_columns")
_WITH_CHOICES = (OptimSettings, SelfCriticalSettings, DecodingOptions)


def flags_in_effect(
    given: Mapping[str, Any],
    config: Config,
    *,
    testing: bool = False,
    loaded: bool = False,
    own_vocabulary: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The flags ``given`` that this run depends on, and lines for the log that name the others and why.

    ``config`` is what all of them resolve to; ``loaded`` says that weights come from a checkpoint, and
    ``own_vocabulary`` that the vocabulary does too.
    """
    name = config.model_name
    own = part_of(config, settings_class(name))
    stored = settings_with("initial")
    stored = stored | settings_with("vocabulary") if own_vocabulary else stored - settings_with("vocabulary")
    ithn = part_of(config, ITHNSettings)
    labels = () if backbone_class(name).needs_labels or ithn.needs_labels else (*LABEL_FILES, "cluster_order")
    read = {backbone_class(name).tokenizer_files} if config.tokenizer == "bpe" else set()
    reasons: dict[str, Collection[str]] = {
        "only training depends on them": TRAIN_ONLY if testing else (),
        "stored in the checkpoint": stored if loaded else (),
        f"not settings of --model_name {name}": settings_of(*BACKBONE_SETTINGS) - settings_of(own) - read,
        f"--model_name {name} needs no labels": labels,
        "only an hf: visual extractor has one": () if config.visual_extractor.startswith("hf:") else _DESCRIBED,
        **ithn.idle_options,
        **own.idle_options,
        **dict(item for part in _WITH_CHOICES for item in part_of(config, part).idle_options.items()),
        "the visual extractor is not trained": ("lr_ve",) if config.freeze_visual_extractor else (),
        "only --tokenizer subword depends on it": () if config.tokenizer == "subword" else ("subword_vocabulary",),
        "labels are predicted from the image": LABEL_FILES if testing and not own.reads_reference_labels else (),
    }
    left, lines = dict(given), []
    for reason, names in reasons.items():
        idle = [item.name for item in dataclasses.fields(Config) if item.name in left and item.name in names]
        if idle:
            lines.append(f"no effect here ({reason}): {', '.join(f'--{flag}' for flag in idle)}")
        left = {flag: value for flag, value in left.items() if flag not in idle}
    return left, lines


def asks_for_ithn(given: Collection[str]) -> bool:
    """Whether one of the flags ``given`` asks for ITHN; a Config cannot tell a default that was typed out."""
    return not set(ASKING_FOR_ITHN).isdisjoint(given)


def idle_without_ithn(given: Collection[str]) -> str | None:
    """A line for the log of a run without ITHN that names the flags ``given`` without effect there, if any."""
    idle = [
        f"--{item.name}"
        for item in dataclasses.fields(Config)
        if item.name in given and item.metadata["group"] in ("ITHN", "beyond ITHN") and item.name not in WITHOUT_ITHN
    ]
    return f"no effect here (ITHN is off): {', '.join(idle)}" if idle else None
