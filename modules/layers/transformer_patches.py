"""The R2Gen family's embedding of patch features.

Shapes: B studies, S visual tokens of all views, C visual width, d = d_model.
"""

from torch import Tensor, nn


class PatchEmbedding(nn.Sequential):
    """Linear layer, ReLU and dropout over patches, with batch normalisation before (``use_bn`` 1) or around (2) it."""

    def __init__(self, image_dim: int, d_model: int, dropout: float, use_bn: int = 0):
        before = [nn.BatchNorm1d(image_dim)] if use_bn else []
        after = [nn.BatchNorm1d(d_model)] if use_bn == 2 else []
        super().__init__(*before, nn.Linear(image_dim, d_model), nn.ReLU(), nn.Dropout(dropout), *after)
        self.normalised = bool(use_bn)

    def forward(self, patches: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """(B, S, C) -> (B, S, d); ``patch_mask`` (B, S) bool keeps absent views out of the batch statistics."""
        batch, num_patches, _ = patches.shape
        patches = patches.flatten(0, 1)
        if patch_mask is None or not self.normalised:
            return super().forward(patches).view(batch, num_patches, -1)
        present = patch_mask.flatten().nonzero().squeeze(1)
        embedded = super().forward(patches[present])
        rows = embedded.new_zeros(len(patches), embedded.size(1))
        return rows.index_copy(0, present, embedded).view(batch, num_patches, -1)
