"""An objective's weights under the names of the published codes (visual_extractor.*, encoder_decoder.*), both ways.

An objective here is a module with a ``backbone`` (models/base.py) and the heads of ITHN.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from modules.runtime.errors import InputError

# Entries that are not the backbone's; published files have them too.
HEADS = ("temp_1", "temp_3", "contrastive_bias", "img_projection.", "text_projection.")
# State needed only to resume training.
TRAINING_STATE = ("previous.", "queue.")


def published_state(objective: Any) -> dict[str, Tensor]:
    """The state dict under the published names."""
    return published_names(objective.state_dict())


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of an objective's ``state``, of any shape, that are not for training alone, by published names."""
    return {key.removeprefix("backbone."): state[key] for key in state if not key.startswith(TRAINING_STATE)}


def load_published_state(
    objective: Any, state: Mapping[str, Tensor], owner_of: Callable[..., str | None] = lambda *entries: None
) -> list[str]:
    """Load the state dict of a published code, or of ``published_state``; returns the entries that it does not have.

    These are heads, which keep their initial values; heads in the file that this objective lacks (``temp_3`` in the
    paper's variant) are ignored. ``owner_of`` (models/__init__.py) names the backbone that has the entries which this
    one lacks. InputError where the backbone has no entry of a name, needs one that is missing, or has another shape.
    """
    own = objective.state_dict()
    # Trained on several GPUs, the published codes save the wrapper's names.
    state = objective.backbone.adopt({key.removeprefix("module."): value for key, value in state.items()})
    named = {key if key.startswith(HEADS) else f"backbone.{key}": value for key, value in state.items()}
    named = {key: value for key, value in named.items() if key in own or not key.startswith(HEADS)}
    for key, value in named.items():
        if key in own and value.shape != own[key].shape:
            raise InputError(
                f"entry {key.removeprefix('backbone.')}: shape {tuple(value.shape)}, "
                f"but this model has {tuple(own[key].shape)}"
            )
    missing, unexpected = objective.load_state_dict(named, strict=False)
    if unexpected:
        unknown = [key.removeprefix("backbone.") for key in unexpected]
        if owner := owner_of(unknown, objective.backbone.state_dict()):
            raise InputError(f"these are weights of {owner}; give --backbone {owner}")
        raise InputError(f"it does not fit this model: {len(unknown)} entries are unknown, the first is {unknown[0]}")
    absent = [key.removeprefix("backbone.") for key in missing if key.startswith("backbone.")]
    try:
        objective.backbone.check_missing(absent)
    except ValueError as error:
        raise InputError(str(error)) from error
    return missing
