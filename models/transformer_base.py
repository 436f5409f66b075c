"""The transformer that R2Gen, R2GenCMN and XProNet share: patches -> encoder -> decoder -> words.

What sets them apart is what visual tokens and words read besides (R2GenCMN's memory, XProNet's prototypes) and what
the decoder's norms depend on (R2Gen's relational memory). Module names are those of the published checkpoints.

Shapes: B studies, S visual tokens of all views, C visual width, T decoder inputs, K hypotheses per study, d = d_model,
V words.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Backbone, BackboneSettings, Output, VisualFeatures
from modules.decoding.cache import DecodingCache
from modules.decoding.options import DecodingOptions
from modules.decoding.search import DecodingSession
from modules.layers.transformer import (
    Decoder,
    Encoder,
    LayerNorm,
    PatchEmbedding,
    PositionalEncoding,
    TokenEmbedding,
    decoder_mask,
)
from modules.runtime.settings import setting


@dataclass(frozen=True)
class TransformerSettings(BackboneSettings):
    """The settings of the R2Gen family's transformer."""

    drop_prob_lm: float = setting(
        0.5, "backbone", "dropout after the patch embedding", low=0.0, high=0.999, train_only=True
    )
    use_bn: int = setting(
        0,
        "backbone",
        "batch normalisation of the patch embedding: 0 none, 1 before, 2 around",
        choices=(0, 1, 2),
        shapes=True,
    )


class Transformer(nn.Module):
    """Encoder, decoder, word embeddings and a backbone's further ``parts`` by name; matrices start Xavier-uniform."""

    def __init__(
        self,
        num_ids: int,
        settings: TransformerSettings,
        *,
        norm: Any = LayerNorm,
        decoder_norm: Any = LayerNorm,
        visual_positions: bool = True,
        **parts: nn.Module,
    ):
        super().__init__()
        d_model, dropout = settings.d_model, settings.dropout
        sizes = (d_model, settings.num_heads, settings.d_ff, settings.num_layers, dropout)
        self.encoder = Encoder(*sizes, norm)
        self.decoder = Decoder(*sizes, decoder_norm, norm)
        self.src_embed = nn.Sequential(*[PositionalEncoding(d_model, dropout)] * visual_positions)  # empty: none
        self.tgt_embed = nn.Sequential(TokenEmbedding(num_ids, d_model), PositionalEncoding(d_model, dropout))
        for name, part in parts.items():
            self.add_module(name, part)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def place(self, x: Tensor, features: VisualFeatures) -> Tensor:
        """``x`` (B, S, d) of the visual tokens ``features`` with their positions, where the backbone has such.

        Context follows the last view that is there: how many absent ones a batch holds must not move it.
        """
        position = None
        if features.own is not None and features.patch_mask is not None:
            position = (features.patch_mask.cumsum(dim=1) - 1).clamp(min=0)
        for positions in self.src_embed:
            x = positions(x, position)
        return x


class EncoderDecoder(nn.Module):
    """Patch features and tokens to hidden states.

    Subclasses set ``att_embed``, ``model`` and ``logit``, in the order of the published files. ``memory`` is whatever
    a pass reads besides: None here.
    """

    att_embed: PatchEmbedding  # (B, S, C) -> (B, S, d)
    model: Any  # Transformer, with a backbone's further parts by name
    logit: nn.Linear

    def memory(self, labels: Tensor | None) -> Any:
        """What visual tokens and words read in a pass over studies with ``labels`` (B, 14) or None."""
        return None

    def read(self, x: Tensor, memory: Any, *, words: bool) -> tuple[Tensor, Tensor | None]:
        """``x`` (B, T, d), of ``words`` or of visual tokens, after it has read ``memory``; and what it read."""
        return x, None

    def condition(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Further inputs of the decoder's norms at every position of ``tokens`` (B, T)."""
        return ()

    def encode(self, features: VisualFeatures, memory: Any) -> tuple[Tensor, Tensor | None]:
        """Encoder output and what was read, (B, S, d) each: memory is read before positions are added."""
        x, response = self.read(self.att_embed(features.patches, features.patch_mask), memory, words=False)
        return self.model.encoder(self.model.place(x, features), features.attention_mask), response

    def embed(self, tokens: Tensor, memory: Any, position: int | Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Decoder input and what was read, (B, T, d) each, for ``tokens`` (B, T); positions are added before reading.

        With ``position`` the T tokens are hypotheses that are all at this position.
        """
        embedding, positions = self.model.tgt_embed
        return self.read(positions(embedding(tokens), position), memory, words=True)

    def decode(self, tokens: Tensor, encoded: Tensor, memory: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states and what the words read, (B, T, d) each, under teacher forcing.

        ``encoded`` (B, S, d); ``mask`` (B, 1, 1, S) or None is that of the visual tokens.
        """
        x, response = self.embed(tokens, memory)
        decoder = self.model.decoder
        sources = decoder.source_keys_values(encoded)
        return decoder(x, sources, decoder_mask(tokens), mask, condition=self.condition(tokens)), response

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V+1) in float32."""
        return F.log_softmax(self.logit(hidden), dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Published checkpoints store the shared module ``cmn`` under both names; either one is accepted.
        names = (prefix + "cmn.", prefix + "model.cmn.")
        for own, other in (names, names[::-1]):
            for key in [key for key in state_dict if key.startswith(own)]:
                state_dict.setdefault(other + key.removeprefix(own), state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


class TransformerBackbone(Backbone):
    """A backbone around an EncoderDecoder."""

    vocabulary_entry = "encoder_decoder.logit.weight"
    encoder_decoder: EncoderDecoder

    def __init__(self, visual_extractor: Any, settings: TransformerSettings):
        super().__init__()
        self.visual_extractor = visual_extractor
        self.image_dim, self.report_dim = visual_extractor.width, settings.d_model

    def labels_to_read(self, features: VisualFeatures, labels: Tensor | None) -> Tensor | None:
        """The labels (B, 14) that decide what studies read, or None; ``labels`` are the given ones."""
        return None

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        features = self.extract(images, view_mask, features)
        network = self.encoder_decoder
        memory = network.memory(self.labels_to_read(features, labels))
        encoded, _ = network.encode(features, memory)
        hidden, _ = network.decode(tokens, encoded, memory, features.attention_mask)
        return Output(network.log_probs(hidden[:supervised_rows]), features.pooled, hidden)

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """The encoder's output (B, S, d) and, where labels decide what is read, those predicted (B, 14)."""
        labels = self.labels_to_read(features, None)
        encoded, _ = self.encoder_decoder.encode(features, self.encoder_decoder.memory(labels))
        return (encoded,) if labels is None else (encoded, labels)

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        """Log-probabilities (B, T, V+1) at every position of ``tokens`` (B, T), given ``encode``'s tensors."""
        network, states, labels = self.encoder_decoder, encoded[0], encoded[1] if len(encoded) > 1 else None
        return network.log_probs(network.decode(tokens, states, network.memory(labels), None)[0])

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V+1) in float32."""
        return self.encoder_decoder.log_probs(hidden)

    def embed_words(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, d), before anything is read."""
        embedding, positions = self.encoder_decoder.model.tgt_embed
        return positions(embedding(tokens), None)

    def cross_attention(self) -> list[nn.Module]:
        return [layer.src_attn for layer in self.encoder_decoder.model.decoder.layers]

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> DecodingSession:
        """A decoder of reports on studies with ``features`` and, where given, ``labels`` (B, 14), at its first step."""
        memory = self.encoder_decoder.memory(self.labels_to_read(features, labels))
        return Session(self.encoder_decoder, features, memory, decoding)


class Session:
    """A batch of studies being decoded: what they read, keys and values of the encoder's output and of past words."""

    def __init__(self, network: EncoderDecoder, features: VisualFeatures, memory: Any, decoding: DecodingOptions):
        self.network, self.memory = network, memory
        encoded, _ = network.encode(features, memory)
        self.sources = network.model.decoder.source_keys_values(encoded)
        self.source_mask = features.attention_mask
        self.cache = DecodingCache(len(self.sources), decoding.max_seq_length, decoding.num_hypotheses)

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K).

        A study's hypotheses are query positions of one row, so that they share its keys without a copy.
        """
        mask = self.cache.advance(tokens, parents)
        x, _ = self.network.embed(tokens, self.memory, self.cache.position)
        decoder, condition = self.network.model.decoder, self.condition(x, parents)
        return self.network.log_probs(decoder(x, self.sources, mask, self.source_mask, self.cache.layers, condition))

    def condition(self, x: Tensor, parents: Tensor | None) -> tuple[Tensor, ...]:
        """Further inputs of the decoder's norms for the newest words ``x`` (B, K, d)."""
        return ()

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.sources = [(keys[rows], values[rows]) for keys, values in self.sources]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        self.cache.keep(rows)

    def fix(self) -> bool:
        """As in DecodingSession."""
        self.cache.fix()
        return True
