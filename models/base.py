"""What every backbone promises to the objective, the trainer and the tester.

Shapes: B samples, N views, S visual tokens (all views, view 0 first), C visual width, T decoder inputs,
D decoder width, V words (ids 1..V, so V+1 logits), L generated tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from modules.decoding.guidance import Guided
from modules.decoding.options import DecodingOptions
from modules.decoding.search import Decoded, DecodingSession, Search, decode


@dataclass
class VisualFeatures:
    """What the visual extractor saw in a batch of studies; it may be cached and passed in instead of images."""

    patches: Tensor  # (B, S, C)
    patch_mask: Tensor | None  # (B, S) bool, True = patch of a present view; None = every view is present
    pooled: Tensor  # (B, C) mean over the patches of the present views, in float32 at least

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, 1, 1, S) mask that keeps attention off absent views, None where all are present."""
        return None if self.patch_mask is None else self.patch_mask[:, None, None, :]


@dataclass
class Output:
    """A teacher-forced pass."""

    log_probs: Tensor  # (R, T, V+1) of the R supervised rows; row t predicts the token after input t
    image_features: Tensor  # (B, C) pooled visual features
    report_features: Tensor  # (B, T, D) last hidden states, after the final norm
    auxiliary: dict[str, Tensor] = field(default_factory=dict)  # the backbone's further losses, already weighted


class Backbone(nn.Module):
    """A report generator: subclasses set ``image_dim`` and ``report_dim``, define ``forward`` and ``session``.

    ``mean_patches`` (S, C) are the patches of the mean training image, which decoding with guidance needs.
    """

    image_dim: int  # C, the width of Output.image_features
    report_dim: int  # D, the width of Output.report_features
    vocabulary_entry: str = "encoder_decoder.logit.weight"  # state-dict entry with a row for every token id
    pad_id: int = 0  # the token that fills up the shorter of two joined batches
    # Names of the settings that the constructor takes beside visual_extractor and num_ids; each is a flag.
    flags: tuple[str, ...] = ("d_model", "d_ff", "num_heads", "num_layers", "dropout", "drop_prob_lm", "use_bn")
    any_length: bool = True  # whether an exported step can take reports of any length
    needs_labels: bool = False  # whether training needs the 14 labels of every study
    visual_extractor: nn.Module
    mean_patches: Tensor | None = None

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor,
        *,
        view_mask: Tensor | None = None,
        labels: Tensor | None = None,
        features: VisualFeatures | None = None,
        supervised_rows: int | None = None,
    ) -> Output:
        """Log-probabilities of the next token at every position under teacher forcing.

        ``images`` (B, N, 3, H, W) may be None where ``features`` are given. ``tokens`` (B, T) are the decoder's
        inputs, bos to the last word: the shift against the targets is the caller's. ``view_mask`` (B, N) bool,
        None = all views present; kept on the CPU it costs no device synchronisation. Only the first
        ``supervised_rows`` rows (None = all) have log-probabilities and enter the auxiliary losses: the others are
        hard negatives, of which only the features are wanted.
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
        """Token ids (B, max_seq_length) of each study's likeliest report, 0 after the end."""
        return self.search(images, view_mask=view_mask, labels=labels, features=features, decoding=decoding).tokens[
            :, 0
        ]

    @torch.no_grad()
    def search(
        self,
        images: Tensor | None,
        *,
        view_mask: Tensor | None = None,
        labels: Tensor | None = None,
        features: VisualFeatures | None = None,
        decoding: DecodingOptions,
    ) -> Decoded:
        """All returned hypotheses with their scores; ``generate`` takes the best."""
        features = self.extract(images, view_mask, features)
        session = self.session(features, labels, decoding)
        if decoding.guidance:
            session = Guided(session, self.session(self.mean_study(features), labels, decoding), decoding.guidance)
        return decode(session, len(features.patches), features.patches.device, decoding, self.beam_search(decoding))

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> DecodingSession:
        """The decoder at the first word of reports on studies with ``features`` and, if given, ``labels``."""
        raise NotImplementedError

    def beam_search(self, decoding: DecodingOptions) -> type[Search] | None:
        """The beam search that this backbone's codes have; None: the R2Gen family's."""
        return None

    def mean_study(self, features: VisualFeatures) -> VisualFeatures:
        """The mean training image in place of every study of ``features``, with the same views."""
        assert self.mean_patches is not None
        rows, count = features.patches.shape[:2]
        mean = self.mean_patches.to(features.patches)
        if len(mean) < count:  # more views than any training study had: they look like the first
            mean = mean.repeat(-(-count // len(mean)), 1)
        patches, there = mean[:count].expand(rows, -1, -1), features.patch_mask
        if there is None:
            return VisualFeatures(patches, None, patches.mean(1, dtype=features.pooled.dtype))
        patches = patches * there.unsqueeze(-1)  # what is absent is 0 there too
        pooled = patches.sum(1, dtype=features.pooled.dtype) / there.sum(1, keepdim=True)
        return VisualFeatures(patches, there, pooled)

    def extract(
        self, images: Tensor | None, view_mask: Tensor | None = None, features: VisualFeatures | None = None
    ) -> VisualFeatures:
        """The visual features of ``images``, unless they are given."""
        if features is not None:
            return features
        return VisualFeatures(*self.visual_extractor(images, view_mask))

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """All that ``next_words`` needs of the studies, B rows in each tensor; here it is the patches themselves.

        The two are the programs that scripts/export.py writes. Every view of ``features`` is present.
        """
        return (features.patches,)

    @property
    def encoded_dim(self) -> int:
        """Width of the first tensor of ``encode``, (B, S, width) or (B, levels, S, width)."""
        return self.image_dim if type(self).encode is Backbone.encode else self.report_dim

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        """Log-probabilities (B, T, V+1) of the next token at every position of ``tokens`` (B, T), in evaluation."""
        (patches,) = encoded
        return self(None, tokens, features=VisualFeatures(patches, None, patches.mean(dim=1))).log_probs

    def log_probs(self, hidden: Tensor) -> Tensor:
        """The output layer alone: (B, T, D) last hidden states -> (B, T, V+1) log-probabilities."""
        return self.encoder_decoder.log_probs(hidden)

    def cross_attention(self) -> list[nn.Module]:
        """The modules that attend to the visual tokens, first decoder layer first; none: nothing can be shown.

        Each has ``weights``, which gives the attention weights (B, heads, T, S) behind a call of the same arguments.
        """
        return []

    def adopt(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The entries to load for those of a published file, or of ours: the same, unless some mean nothing here."""
        return state

    def check_missing(self, names: list[str]) -> None:
        """ValueError for loaded weights that lack ``names``, unless this backbone can do without them."""
        if names:
            raise ValueError(f"{len(names)} entries are missing, the first is {names[0]}")
