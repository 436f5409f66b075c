"""The backbones by name."""

from typing import Any

from models.base import Backbone, Output, VisualFeatures
from models.r2gen import R2Gen
from models.r2gencmn import R2GenCMN
from models.visualgpt import VisualGPT
from models.xpronet import XProNet

MODELS: dict[str, type[Backbone]] = {"r2gen": R2Gen, "r2gencmn": R2GenCMN, "xpronet": XProNet, "visualgpt": VisualGPT}


def build_model(name: str, **options: Any) -> Backbone:
    """Make the backbone ``name`` with its constructor's keyword arguments; ValueError where there is no such name."""
    if name not in MODELS:
        raise ValueError(f"model_name {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](**options)


__all__ = ["MODELS", "Backbone", "Output", "VisualFeatures", "build_model"]
