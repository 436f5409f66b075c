"""What every backbone promises to the objective, the trainer and the tester.

Shapes: B samples, N views, S visual tokens (all views, view 0 first), C visual width, T decoder inputs,
D decoder width, V words (ids 1..V, so V+1 logits), L generated tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modules.decoding import DecodingOptions


@dataclass
class VisualFeatures:
    """What the visual extractor saw in a batch of studies; it may be cached and passed in instead of images."""

    patches: Tensor  # (B, S, C)
    patch_mask: Tensor | None  # (B, S) bool, True = patch of a present view; None = every view is present
    pooled: Tensor  # (B, C) mean over the patches of the present views


@dataclass
class Output:
    """A teacher-forced pass."""

    log_probs: Tensor  # (B, T, V+1), row t predicts the token after input t
    image_features: Tensor  # (B, C) pooled visual features
    report_features: Tensor  # (B, T, D) last hidden states, after the final norm
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # the backbone's further losses, already weighted


class Backbone(nn.Module):
    """A report generator: subclasses set ``image_dim`` and ``report_dim`` and define the two passes."""

    image_dim: int  # C, the width of Output.image_features
    report_dim: int  # D, the width of Output.report_features
    visual_extractor: nn.Module

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        *,
        view_mask: Tensor | None = None,
        labels: Tensor | None = None,
        features: VisualFeatures | None = None,
    ) -> Output:
        """Log-probabilities of the next token at every position under teacher forcing.

        ``images`` (B, N, 3, H, W) may be None where ``features`` are given. ``tokens`` (B, T) are the decoder's
        inputs, bos to the last word: the shift against the targets is the caller's. ``view_mask`` (B, N) bool,
        None = all views present; kept on the CPU it costs no device synchronisation.
        """
        raise NotImplementedError

    def generate(
        self,
        images: Tensor | None,
        *,
        view_mask: Tensor | None = None,
        labels: Tensor | None = None,
        features: VisualFeatures | None = None,
        decoding: DecodingOptions,
    ) -> Tensor:
        """Token ids (B * sample_n, max_seq_length), a study's samples in neighbouring rows; 0 after the end."""
        raise NotImplementedError

    def extract(
        self, images: Tensor | None, view_mask: Tensor | None = None, features: VisualFeatures | None = None
    ) -> VisualFeatures:
        """The visual features of ``images``, unless they are given."""
        if features is not None:
            return features
        return VisualFeatures(*self.visual_extractor(images, view_mask))

    @torch.no_grad()
    def cache_features(self, images: Tensor, view_mask: Tensor | None = None) -> VisualFeatures:
        """Visual features with evaluation statistics, for storage beside a frozen extractor."""
        training = self.visual_extractor.training
        self.visual_extractor.eval()
        features = self.extract(images, view_mask)
        self.visual_extractor.train(training)
        return features
