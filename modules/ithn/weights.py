"""An objective's heads, and its weights under the names of the published codes, in both directions."""

from collections.abc import Mapping

from torch import Tensor, nn

from modules.ithn.losses import normalise
from modules.runtime.errors import InputError

# Names beside the backbone's; published files have them too.
HEADS = ("temp_1", "temp_3", "img_projection.", "text_projection.")
# What only training goes on from.
REMEMBERED = "previous."


class Projection(nn.Module):
    """Bias-free linear map into the joint embedding."""

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(width, embedding_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, E) of unit length."""
        return normalise(self.linear1(x.to(self.linear1.weight.dtype)))


class PublishedNames(nn.Module):
    """A module with a ``backbone`` (models/base.py) and heads beside it."""

    def published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the published names (visual_extractor.*, encoder_decoder.*, img_projection.*, temp_*)."""
        state = self.state_dict()
        return {key.removeprefix("backbone."): state[key] for key in state if not key.startswith(REMEMBERED)}

    def load_published(self, state: Mapping[str, Tensor]) -> list[str]:
        """Load the state dict of a published code, or ours; returns our entries that it does not have.

        These are heads, which keep their initial values; heads of the file that have no place here (``temp_3`` in
        the paper's variant) are ignored. InputError where the backbone knows no entry of a name, cannot do without
        one that is missing, or has another shape.
        """
        own = self.state_dict()
        # Trained on several GPUs, the published codes save the wrapper's names.
        state = self.backbone.adopt({key.removeprefix("module."): value for key, value in state.items()})
        ours = {key if key.startswith(HEADS) else f"backbone.{key}": value for key, value in state.items()}
        ours = {key: value for key, value in ours.items() if key in own or not key.startswith(HEADS)}
        for key, value in ours.items():
            if key in own and value.shape != own[key].shape:
                raise InputError(
                    f"checkpoint entry {key.removeprefix('backbone.')}: shape {tuple(value.shape)}, "
                    f"but this model has {tuple(own[key].shape)}"
                )
        missing, unexpected = self.load_state_dict(ours, strict=False)
        if unexpected:
            raise InputError(
                f"checkpoint does not fit this model: {len(unexpected)} entries are unknown, the first is "
                f"{unexpected[0].removeprefix('backbone.')}"
            )
        absent = [key.removeprefix("backbone.") for key in missing if key.startswith("backbone.")]
        try:
            self.backbone.check_missing(absent)
        except ValueError as error:
            raise InputError(f"checkpoint does not fit this model: {error}") from error
        return missing
