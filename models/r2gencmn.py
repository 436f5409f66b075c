"""R2GenCMN: cross-modal memory networks for radiology report generation (Chen et al., ACL 2021, arXiv 2204.13258).

Shapes: B studies, S visual tokens of all views, T decoder inputs, K hypotheses per study, d = d_model, V words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Backbone, Output, VisualFeatures
from modules.decoding.cache import DecodingCache
from modules.decoding.options import DecodingOptions
from modules.layers.cross_modal_memory import MemoryResponse
from modules.layers.transformer import Decoder, Encoder, PositionalEncoding, TokenEmbedding, decoder_mask
from modules.layers.transformer_patches import PatchEmbedding


class Transformer(nn.Module):
    """Encoder, decoder and embeddings; ``cmn`` is the caller's module, registered a second time as published."""

    def __init__(
        self,
        num_ids: int,
        *,
        d_model: int,
        d_ff: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        cmn: MemoryResponse,
    ):
        super().__init__()
        self.encoder = Encoder(d_model, num_heads, d_ff, num_layers, dropout)
        self.decoder = Decoder(d_model, num_heads, d_ff, num_layers, dropout)
        self.src_embed = nn.Sequential(PositionalEncoding(d_model, dropout))
        self.tgt_embed = nn.Sequential(TokenEmbedding(num_ids, d_model), PositionalEncoding(d_model, dropout))
        self.cmn = cmn
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


class EncoderDecoder(nn.Module):
    """Patch features and tokens to hidden states, with the memory queried by both."""

    def __init__(
        self,
        image_dim: int,
        num_ids: int,
        *,
        d_model: int,
        d_ff: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
        drop_prob_lm: float,
        use_bn: int,
        topk: int,
        cmm_size: int,
        cmm_dim: int,
    ):
        super().__init__()
        self.memory_matrix = nn.Parameter(torch.randn(cmm_size, cmm_dim) / cmm_dim)
        self.att_embed = PatchEmbedding(image_dim, d_model, drop_prob_lm, use_bn)
        self.cmn = MemoryResponse(d_model, num_heads, topk)
        self.model = Transformer(
            num_ids,
            d_model=d_model,
            d_ff=d_ff,
            num_heads=num_heads,
            num_layers=num_layers,
            dropout=dropout,
            cmn=self.cmn,
        )
        self.logit = nn.Linear(d_model, num_ids)

    def memory(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory, for all queries of a pass."""
        return self.cmn.keys_values(self.memory_matrix)

    def encode(self, features: VisualFeatures, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Encoder output (B, S, d): the memory is queried before positions are added."""
        x = self.att_embed(features.patches, features.patch_mask)
        x = x + self.cmn(x, *memory)
        return self.model.encoder(self.model.src_embed[0](x), source_mask(features))

    def embed(self, tokens: Tensor, memory: tuple[Tensor, Tensor], position: int | None = None) -> Tensor:
        """Decoder input (B, T, d): the memory is queried after positions are added."""
        x = self.model.tgt_embed[1](self.model.tgt_embed[0](tokens), position)
        return x + self.cmn(x, *memory)

    def decode(self, tokens: Tensor, encoded: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Hidden states (B, T, d) under teacher forcing; ``mask`` (B, 1, 1, S) or None is that of the patches."""
        decoder = self.model.decoder
        x = self.embed(tokens, memory)
        return decoder(x, decoder.source_keys_values(encoded), decoder_mask(tokens), mask)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, V+1) in float32."""
        return F.log_softmax(self.logit(hidden), dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The shared memory module stands in published files under two names; one of them is enough.
        names = (prefix + "cmn.", prefix + "model.cmn.")
        for own, other in (names, names[::-1]):
            for key in [key for key in state_dict if key.startswith(own)]:
                state_dict.setdefault(other + key.removeprefix(own), state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


def source_mask(features: VisualFeatures) -> Tensor | None:
    """(B, 1, 1, S) mask that keeps attention off absent views, None where all are present."""
    return None if features.patch_mask is None else features.patch_mask[:, None, None, :]


class R2GenCMN(Backbone):
    """The published model; ``num_ids`` = V+1 rows of embedding and logits, ``visual_extractor`` has ``width`` C."""

    flags = (*Backbone.flags, "topk", "cmm_size", "cmm_dim")

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
        topk: int = 32,
        cmm_size: int = 2048,
        cmm_dim: int = 512,
    ):
        super().__init__()
        if cmm_dim != d_model:
            raise ValueError(f"cmm_dim {cmm_dim}: must equal d_model {d_model}")
        if topk > cmm_size:
            raise ValueError(f"topk {topk}: at most cmm_size {cmm_size}")
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
            topk=topk,
            cmm_size=cmm_size,
            cmm_dim=cmm_dim,
        )

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        features = self.extract(images, view_mask, features)
        network = self.encoder_decoder
        memory = network.memory()
        hidden = network.decode(tokens, network.encode(features, memory), memory, source_mask(features))
        return Output(network.log_probs(hidden[:supervised_rows]), features.pooled, hidden)

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """The encoder's output (B, S, d)."""
        return (self.encoder_decoder.encode(features, self.encoder_decoder.memory()),)

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        network = self.encoder_decoder
        return network.log_probs(network.decode(tokens, *encoded, network.memory(), None))

    def cross_attention(self) -> list[nn.Module]:
        return [layer.src_attn for layer in self.encoder_decoder.model.decoder.layers]

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> "Session":
        return Session(self.encoder_decoder, features, decoding)


class Session:
    """The decoder with everything that stays the same, or is kept, between two tokens of a batch of studies."""

    def __init__(self, network: EncoderDecoder, features: VisualFeatures, decoding: DecodingOptions):
        self.network = network
        self.memory = network.memory()
        self.sources = network.model.decoder.source_keys_values(network.encode(features, self.memory))
        self.source_mask = source_mask(features)
        self.cache = DecodingCache(len(self.sources), decoding.max_seq_length, decoding.num_hypotheses)

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K).

        A study's hypotheses stand side by side as query positions, so that they share its keys without a copy.
        """
        mask = self.cache.advance(tokens, parents)
        x = self.network.embed(tokens, self.memory, self.cache.position)
        hidden = self.network.model.decoder(x, self.sources, mask, self.source_mask, self.cache.layers)
        return self.network.log_probs(hidden)

    def keep(self, rows: Tensor) -> None:
        """Go on with the studies ``rows`` (int64 indices) only."""
        self.sources = [(keys[rows], values[rows]) for keys, values in self.sources]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        self.cache.keep(rows)
