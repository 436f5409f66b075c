"""Features of past batches as further negatives (a memory across batches, as in MoCo, He et al., CVPR 2020)."""

import torch
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """The image and report features of the last ``size`` samples, (N, D) each, without gradient.

    Each has ``keys`` (N, 3): the sample's index (-1 for an empty place), its report key and its label key (-1 where
    there are no labels). The buffers are part of the state dict, so that a checkpoint has them.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("image", torch.zeros(size, dim))
        self.register_buffer("report", torch.zeros(size, dim))
        self.register_buffer("keys", torch.full((size, 3), -1))
        self.register_buffer("next", torch.tensor(0))

    # As in PreviousEpoch, a compiled backward pass must not read the buffers anew, after ``push`` has written to them.
    @torch.compiler.disable
    def past(self, keys: Tensor, compared: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the image and report features (N, D), and (B, N) bool: which are negatives of samples ``keys``.

        These are the places that are filled, by another sample, which differs in the keys of columns ``compared``. A
        sample whose features of an earlier epoch are still here is no negative of itself.
        """
        same = (keys.unsqueeze(1) == self.keys)[..., [0, *compared]].any(-1)
        return self.image.clone(), self.report.clone(), ~same & (self.keys[:, 0] >= 0)

    @torch.compiler.disable
    @torch.no_grad()
    def push(self, image: Tensor, report: Tensor, keys: Tensor) -> None:
        """Put B samples in the place of the oldest; features that are not finite leave their place empty."""
        size = len(self.keys)
        image, report, keys = image[-size:], report[-size:], keys[-size:]
        good = (image.isfinite() & report.isfinite()).all(1, keepdim=True)
        places = (self.next + torch.arange(len(keys), device=keys.device)) % size
        self.image[places] = torch.where(good, image, 0.0).to(self.image.dtype)
        self.report[places] = torch.where(good, report, 0.0).to(self.report.dtype)
        self.keys[places] = torch.where(good, keys, -1)
        self.next.copy_((self.next + len(keys)) % size)
