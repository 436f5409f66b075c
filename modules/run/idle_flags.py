"""Flags that were given and change nothing in this run: the log names them, and no result records them."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from models import backbone_class
from models.settings import declared_settings
from modules.config import BACKBONE_SETTINGS, TRAIN_ONLY, Config, settings_of, settings_with

ASKING = ("strategy", "ithn_variant")  # flags that ask for ITHN by being given, whatever their value
# Settings of ITHN that the plain backbone uses too, or that say whether ITHN is on.
ALWAYS_IN_USE = ("ithn", "ce_weight")
LABELS = ("label_path", "label_columns")


def flags_in_effect(
    given: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    *,
    testing: bool = False,
    loaded: bool = False,
    own_vocabulary: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The flags ``given`` that this run depends on, and lines for the log that name the others and why.

    ``saved`` are the settings of a checkpoint, if it has some; ``loaded`` says that weights come from one, and
    ``own_vocabulary`` that the vocabulary does too.
    """
    name = given.get("model_name", (saved or {}).get("model_name", Config.model_name))
    reads_leaked = ({**(saved or {}), **given}).get("xpronet_labels") == "reference"
    stored = settings_with("initial")
    stored = stored | settings_with("vocabulary") if own_vocabulary else stored - settings_with("vocabulary")
    labels = () if backbone_class(name).needs_labels else (*LABELS, "cluster_order")
    reasons: dict[str, Collection[str]] = {
        "only training depends on them": TRAIN_ONLY if testing else (),
        "stored in the checkpoint": stored if loaded else (),
        f"not settings of --model_name {name}": settings_of(*BACKBONE_SETTINGS) - settings_of(declared_settings(name)),
        f"--model_name {name} needs no labels": labels,
        "labels are predicted from the image": LABELS if testing and not reads_leaked else (),
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
    return not set(ASKING).isdisjoint(given)


def idle_without_ithn(given: Collection[str]) -> str | None:
    """A line for the log of a run without ITHN that names the flags ``given`` without effect there, if any."""
    idle = [
        f"--{item.name}"
        for item in dataclasses.fields(Config)
        if item.name in given and item.metadata["group"] in ("ITHN", "beyond ITHN") and item.name not in ALWAYS_IN_USE
    ]
    return f"no effect here (ITHN is off): {', '.join(idle)}" if idle else None
