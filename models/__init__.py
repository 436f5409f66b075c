"""The backbones by name, one per file; a run imports only the one that it uses.

To add one, write a file with a subclass of models.base.Backbone and its ``Settings``, and enter the class here: flags,
defaults, presets and checkpoints derive from the file.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from modules.runtime.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from models.base import Backbone, BackboneSettings

MODELS = {
    "r2gen": "models.r2gen.R2Gen",
    "r2gencmn": "models.r2gencmn.R2GenCMN",
    "xpronet": "models.xpronet.XProNet",
    "visualgpt": "models.visualgpt.VisualGPT",
    "hf": "models.encoder_decoder.EncoderDecoder",
}
# Published systems that are one of the backbones with settings of their own (SYSTEMS in its file): names of --backbone.
SYSTEMS = {"cvt2distilgpt2": "hf", "r2gengpt": "hf"}


def location(name: str) -> tuple[str, str]:
    """Module and class of the backbone ``name``; InputError where there is no such name."""
    if name in SYSTEMS:
        raise InputError(f"--model_name {name}: is a --backbone; give --backbone {name}")
    if name not in MODELS:
        raise InputError(f"--model_name {name}: must be one of {', '.join(MODELS)}{did_you_mean(name, MODELS)}")
    module, _, kind = MODELS[name].rpartition(".")
    return module, kind


def backbone_class(name: str) -> "type[Backbone]":
    """The backbone ``name``, imported when it is asked for; InputError where there is no such name."""
    module, kind = location(name)
    return getattr(importlib.import_module(module), kind)


def settings_class(name: str) -> "type[BackboneSettings]":
    """The dataclass ``Settings`` of the backbone's file; InputError where there is no such name."""
    module, _ = location(name)
    return importlib.import_module(module).Settings


def owner_of(entries: Iterable[str], besides: Iterable[str]) -> str | None:
    """The backbone whose published files alone have one of these state-dict ``entries``, unless ``besides`` has too."""
    entries, besides = tuple(entries), tuple(besides)
    for name in MODELS:
        start = backbone_class(name).published_entries
        theirs, own = (any(start and entry.startswith(start) for entry in names) for names in (entries, besides))
        if theirs and not own:
            return name
    return None
