"""R2Gen: a memory-driven transformer for radiology report generation (Chen et al., EMNLP 2020, arXiv 2010.16056).

Shapes: B studies, S visual tokens of all views, T decoder inputs, K hypotheses per study, d = d_model, V words,
s memory slots, m = s * d the width of the memory after a token.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Backbone, Output, VisualFeatures
from modules.decoding.cache import DecodingCache
from modules.decoding.options import DecodingOptions
from modules.layers.relational_memory import RelationalMemory
from modules.layers.transformer import Decoder, Encoder, PositionalEncoding, TokenEmbedding, decoder_mask
from modules.layers.transformer_norms import normalise
from modules.layers.transformer_patches import PatchEmbedding


class LayerNorm(nn.Module):
    """gamma * normalise(x) + beta: the family's norm under this model's names."""

    def __init__(self, d_model: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.gamma, self.beta)


class ConditionalLayerNorm(LayerNorm):
    """Layer norm whose scale and shift are changed by the memory at the same position."""

    def __init__(self, d_model: int, memory_dim: int):
        super().__init__(d_model)
        self.mlp_gamma = nn.Sequential(nn.Linear(memory_dim, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.mlp_beta = nn.Sequential(nn.Linear(memory_dim, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        for linear in (self.mlp_gamma[0], self.mlp_gamma[2], self.mlp_beta[0], self.mlp_beta[2]):
            nn.init.constant_(linear.bias, 0.1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """``x`` (B, T, d), ``memory`` (B, T, m)."""
        scale, shift = self.gamma + self.mlp_gamma(memory), self.beta + self.mlp_beta(memory)
        return torch.addcmul(shift, scale, normalise(x, torch.ones_like(self.gamma), torch.zeros_like(self.beta)))


class Transformer(nn.Module):
    """Encoder, memory-conditioned decoder, embeddings and relational memory."""

    def __init__(
        self,
        num_ids: int,
        *,
        d_model: int,
        d_ff: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        rm_num_slots: int,
        rm_num_heads: int,
    ):
        super().__init__()
        conditional = partial(ConditionalLayerNorm, memory_dim=rm_num_slots * d_model)
        self.encoder = Encoder(d_model, num_heads, d_ff, num_layers, dropout, LayerNorm)
        self.decoder = Decoder(d_model, num_heads, d_ff, num_layers, dropout, conditional, LayerNorm)
        self.tgt_embed = nn.Sequential(TokenEmbedding(num_ids, d_model), PositionalEncoding(d_model, dropout))
        self.rm = RelationalMemory(d_model, rm_num_slots, rm_num_heads)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class EncoderDecoder(nn.Module):
    """Patch features and tokens to hidden states."""

    def __init__(
        self, image_dim: int, num_ids: int, *, d_model: int, drop_prob_lm: float, use_bn: int, **transformer: float
    ):
        super().__init__()
        self.att_embed = PatchEmbedding(image_dim, d_model, drop_prob_lm, use_bn)
        self.model = Transformer(num_ids, d_model=d_model, **transformer)
        self.logit = nn.Linear(d_model, num_ids)

    def encode(self, features: VisualFeatures) -> Tensor:
        """Encoder output (B, S, d); visual tokens have no positions."""
        return self.model.encoder(self.att_embed(features.patches, features.patch_mask), features.attention_mask)

    def embed(self, tokens: Tensor, position: int | None = None) -> Tensor:
        """Decoder input (B, T, d)."""
        return self.model.tgt_embed[1](self.model.tgt_embed[0](tokens), position)

    def memory(self, tokens: Tensor) -> Tensor:
        """The memory after each token, (B, T, m); in training its input has a dropout mask of its own, as published."""
        return self.model.rm(self.embed(tokens))

    def decode(self, tokens: Tensor, encoded: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states (B, T, d) under teacher forcing; ``mask`` (B, 1, 1, S) or None is that of the patches."""
        decoder = self.model.decoder
        return decoder(
            self.embed(tokens),
            decoder.source_keys_values(encoded),
            decoder_mask(tokens),
            mask,
            condition=(self.memory(tokens),),
        )

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V+1) in float32."""
        return F.log_softmax(self.logit(hidden), dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))


class R2Gen(Backbone):
    """The published model; ``num_ids`` = V+1 rows of embedding and logits, ``visual_extractor`` has ``width`` C."""

    any_length = False  # the memory goes through the words one by one, and a program holds every step of a loop
    flags = (*Backbone.flags, "rm_num_slots", "rm_num_heads", "rm_d_model")

    def __init__(
        self,
        *,
        visual_extractor: nn.Module,
        num_ids: int,
        d_model: int = 512,
        d_ff: int = 512,
        num_heads: int = 8,
        num_layers: int = 3,
        dropout: float = 0.1,
        drop_prob_lm: float = 0.5,
        use_bn: int = 0,
        rm_num_slots: int = 3,
        rm_num_heads: int = 8,
        rm_d_model: int = 512,
    ):
        super().__init__()
        if rm_d_model != d_model:
            raise ValueError(f"rm_d_model {rm_d_model}: must equal d_model {d_model}")
        self.visual_extractor = visual_extractor
        self.image_dim = visual_extractor.width
        self.report_dim = d_model
        self.encoder_decoder = EncoderDecoder(
            self.image_dim,
            num_ids,
            d_model=d_model,
            d_ff=d_ff,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            drop_prob_lm=drop_prob_lm,
            use_bn=use_bn,
            rm_num_slots=rm_num_slots,
            rm_num_heads=rm_num_heads,
        )

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        features = self.extract(images, view_mask, features)
        network = self.encoder_decoder
        hidden = network.decode(tokens, network.encode(features), features.attention_mask)
        return Output(network.log_probs(hidden[:supervised_rows]), features.pooled, hidden)

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """The encoder's output (B, S, d)."""
        return (self.encoder_decoder.encode(features),)

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        network = self.encoder_decoder
        return network.log_probs(network.decode(tokens, *encoded, None))

    def cross_attention(self) -> list[nn.Module]:
        return [layer.src_attn for layer in self.encoder_decoder.model.decoder.layers]

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> "Session":
        return Session(self.encoder_decoder, features, decoding)


class Session:
    """A batch of studies being decoded: encoder output, keys and values of the past, each hypothesis's memory."""

    def __init__(self, network: EncoderDecoder, features: VisualFeatures, decoding: DecodingOptions):
        self.network = network
        self.sources = network.model.decoder.source_keys_values(network.encode(features))
        self.source_mask = features.attention_mask
        self.cache = DecodingCache(len(self.sources), decoding.max_seq_length, decoding.num_hypotheses)
        self.weights = network.model.rm.weights().transposed()
        self.memory: Tensor | None = None  # (B, K, m) after the newest tokens

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K).

        A study's hypotheses stand side by side as query positions, so that they share its keys without a copy.
        """
        mask = self.cache.advance(tokens, parents)
        x = self.network.embed(tokens, self.cache.position)
        past = self.memory
        if parents is not None:
            past = past.gather(1, parents.unsqueeze(-1).expand(-1, -1, past.size(-1)))
        memory = self.network.model.rm.step(x.flatten(0, 1), None if past is None else past.flatten(0, 1), self.weights)
        self.memory = memory.unflatten(0, tokens.shape)
        hidden = self.network.model.decoder(x, self.sources, mask, self.source_mask, self.cache.layers, (self.memory,))
        return self.network.log_probs(hidden)

    def keep(self, rows: Tensor) -> None:
        """Go on with the studies ``rows`` (int64 indices) only."""
        self.sources = [(keys[rows], values[rows]) for keys, values in self.sources]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        self.memory = self.memory[rows]
        self.cache.keep(rows)
