"""What every backbone promises to the objective, the trainer and the tester, and the settings that all of them have.

Shapes: B samples, N views, S visual tokens (of all views, view 0 first), C visual width, T decoder inputs, D decoder
width, V words (ids 1..V, hence V+1 logits), L generated tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from modules.decoding.guidance import Guided
from modules.decoding.options import DecodingOptions
from modules.decoding.search import Decoded, DecodingSession, WithoutToken, decode
from modules.layers.context_memory import ContextMemory
from modules.runtime.settings import check_value, setting


@dataclass(frozen=True)
class BackboneSettings:
    """The sizes that backbones share; InputError for a value out of bounds.

    A backbone's file derives ``Settings`` from this class. Each field is a flag; ``shapes=True`` marks one that decides
    the shapes of the weights, ``train_only=True`` one without effect in main_test.py, ``file=True`` one that names a
    file, which stays behind when weights are exported.
    """

    d_model: int = setting(512, "backbone", "width of the transformer", low=1, shapes=True)
    d_ff: int = setting(512, "backbone", "hidden width of the feed-forward layers", low=1, shapes=True)
    num_heads: int = setting(8, "backbone", "attention heads", low=1, shapes=True)
    num_layers: int = setting(3, "backbone", "layers of encoder and decoder, each", low=1, shapes=True)
    dropout: float = setting(0.1, "backbone", "dropout of the transformer", low=0.0, high=0.999, train_only=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            check_value(item.name, getattr(self, item.name), item.metadata)

    @property
    def idle_options(self) -> dict[str, tuple[str, ...]]:
        """Settings without effect beside the others, by the reason why."""
        return {}

    @property
    def reads_reference_labels(self) -> bool:
        """Whether reports are generated from labels of the reference reports, which leak them."""
        return False


@dataclass
class VisualFeatures:
    """What the visual extractor saw in a batch of studies; may be cached and passed in place of images."""

    patches: Tensor  # (B, S, C)
    patch_mask: Tensor | None  # (B, S) bool, True = patch of a present view; None = every view is present
    pooled: Tensor  # (B, C) mean over the patches of the present views, in float32 at least
    own: int | None = None  # how many of the S tokens are the study's own patches, where others are context

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
    """A report generator, built with ``visual_extractor``, ``num_ids`` (V+1) and ``settings``.

    Subclasses set ``image_dim`` and ``report_dim`` and define ``forward`` and ``session``. ``mean_patches`` (S, C) are
    the patches of the mean training image, which guided decoding needs.
    """

    image_dim: int  # C, the width of Output.image_features
    report_dim: int  # D, the width of Output.report_features
    vocabulary_entry: str = ""  # state-dict entry with a row for every token id: its length is the vocabulary's
    published_entries: str = ""  # how the entries begin that, of all backbones, only this one's published files have
    pad_id: int = 0  # the token that fills up the shorter of two joined batches
    any_length: bool = True  # whether an exported step can take reports of any length
    needs_labels: bool = False  # whether training needs the 14 labels of every study
    tokenizer_kind: str = "word"  # what --tokenizer auto means: words, or byte pairs ("bpe") where --gpt2_path has them
    tokenizer_files: str = "gpt2_path"  # the setting that names the folder of those files
    # Further constructor arguments, made of files or of the vocabulary: keys of RESOURCES in modules/run/build.py.
    resources: tuple[str, ...] = ()
    visual_extractor: nn.Module
    mean_patches: Tensor | None = None
    unk_id: int | None = None  # token id of <unk>, None where the vocabulary has none
    study_context: ContextMemory | None  # what reads --context

    def __init__(self) -> None:
        super().__init__()
        self.study_context = None

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
        inputs, from begin to the last word: the caller shifts them against the targets. ``view_mask`` (B, N) bool,
        None = all views present; a mask on the CPU costs no device synchronisation. ``labels`` (B, 14) are given where
        ``needs_labels``. Only the first ``supervised_rows`` rows (None = all) have log-probabilities and enter the
        auxiliary losses: the others are hard negatives, of which only the features are used.
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
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Token ids (B, max_seq_length) of each study's likeliest report, 0 after the end.

        ``seeds``, of B studies, decide what is drawn at random for each, None: torch's generator; a caller gives them
        only with sample_method "sample".
        """
        found = self.search(
            images, view_mask=view_mask, labels=labels, features=features, decoding=decoding, seeds=seeds
        )
        return found.tokens[:, 0]

    @torch.no_grad()
    def search(
        self,
        images: Tensor | None,
        *,
        view_mask: Tensor | None = None,
        labels: Tensor | None = None,
        features: VisualFeatures | None = None,
        decoding: DecodingOptions,
        seeds: Sequence[int] | None = None,
    ) -> Decoded:
        """The ``sample_n`` best reports (B, n, L) of each study with their scores; ``generate`` takes the likeliest."""
        features = self.extract(images, view_mask, features)
        session = self.session(features, labels, decoding)
        if decoding.suppress_unk and self.unk_id is not None:
            session = WithoutToken(session, self.unk_id)
        if decoding.guidance:  # of what may be written: whether a word is plausible depends on the likeliest
            session = Guided(session, self.session(self.mean_study(features), labels, decoding), decoding.guidance)
        rows, device = len(features.patches), features.patches.device
        return decode(session, rows, device, decoding, ended=self.ended_beams(decoding), seeds=seeds)

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> DecodingSession:
        """A decoder of reports on studies with ``features`` and, where given, ``labels`` (B, 14), at its first step."""
        raise NotImplementedError

    def ended_beams(self, decoding: DecodingOptions) -> str:
        """What becomes of beams that end in this backbone's published code: a word of modules.decoding.search.ENDED."""
        return "lowered"

    def mean_study(self, features: VisualFeatures) -> VisualFeatures:
        """``features`` (B, S, C) with the mean training image in place of every study's, and the same views."""
        assert self.mean_patches is not None
        rows, count = features.patches.shape[:2]
        mean = self.mean_patches.to(features.patches)
        if len(mean) < count:  # more views than any training study had: repeat the known ones
            mean = mean.repeat(-(-count // len(mean)), 1)
        patches, there = mean[:count].expand(rows, -1, -1), features.patch_mask
        if there is None:
            return VisualFeatures(patches, None, patches.mean(1, dtype=features.pooled.dtype))
        patches = patches * there.unsqueeze(-1)  # absent views stay 0
        pooled = patches.sum(1, dtype=features.pooled.dtype) / there.sum(1, keepdim=True)
        return VisualFeatures(patches, there, pooled)

    def extract(
        self,
        images: Tensor | None,
        view_mask: Tensor | None = None,
        features: VisualFeatures | None = None,
        *,
        context: Any = None,
    ) -> VisualFeatures:
        """The visual features of ``images`` (B, N, 3, H, W), unless ``features`` are given; with ``study_context`` the
        ``context`` joins them, a modules.data.batches.Context of texts or None.
        """
        if features is not None:
            return features
        found = VisualFeatures(*self.visual_extractor(images, view_mask))
        if self.study_context is None:
            return found
        return VisualFeatures(*self.study_context(found.patches, found.patch_mask, self.embed_words, context))

    def embed_words(self, tokens: Tensor) -> Tensor:
        """The decoder's input embeddings (B, T, D) of ``tokens`` (B, T), positions included."""
        raise NotImplementedError

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """What ``next_words`` needs of the studies, B rows in each tensor; here the patches (B, S, C) themselves.

        ``encode`` and ``next_words`` are the programs that scripts/export.py writes. Every view must be present.
        """
        return (features.patches,)

    @property
    def encoded_dim(self) -> int:
        """Width of the first tensor of ``encode``: (B, S, width) or (B, levels, S, width)."""
        return self.image_dim if type(self).encode is Backbone.encode else self.report_dim

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        """Log-probabilities (B, T, V+1) of the next token at every position of ``tokens`` (B, T), outside training."""
        (patches,) = encoded
        return self(None, tokens, features=VisualFeatures(patches, None, patches.mean(dim=1))).log_probs

    def log_probs(self, hidden: Tensor) -> Tensor:
        """The output layer alone: (B, T, D) last hidden states -> (B, T, V+1) log-probabilities."""
        raise NotImplementedError

    def cross_attention(self) -> list[nn.Module]:
        """The modules that attend to the visual tokens, first decoder layer first; empty where none can be shown.

        Each has a method ``weights`` with the arguments of ``forward``, which returns its weights (B, heads, T, S); its
        output, or the first of several, is what it read (B, T, D).
        """
        return []

    def blocks(self) -> list[nn.Module]:
        """The layers that hold most of the weights and compute one after another: they are shared out one by one."""
        return []

    def recompute_activations(self) -> None:
        """Have layers compute again in the backward pass what they would keep. ValueError where none can."""
        raise ValueError("it has no layers that can compute again what they did not keep")

    def adopt(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The entries to load (of any shape, by name), given those of a file; a backbone may replace some."""
        return state

    def check_missing(self, names: list[str]) -> None:
        """ValueError where the loaded weights lack the entries ``names``, unless the backbone works without them."""
        if names:
            raise ValueError(f"it does not fit this model: {len(names)} entries are missing, the first is {names[0]}")
