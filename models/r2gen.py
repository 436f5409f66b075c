"""R2Gen: a memory-driven transformer for radiology report generation (Chen et al., EMNLP 2020, arXiv 2010.16056).

Shapes: B studies, T decoder inputs, K hypotheses per study, d = d_model, s memory slots, m = s * d the width of the
memory after a token.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.base import VisualFeatures
from models.transformer_base import EncoderDecoder, Session, Transformer, TransformerBackbone, TransformerSettings
from modules.decoding.options import DecodingOptions
from modules.layers.relational_memory import RelationalMemory
from modules.layers.transformer import PatchEmbedding, normalise
from modules.runtime.errors import InputError
from modules.runtime.settings import setting

# The published run scripts; everything else keeps its default.
PRESETS = {
    "*": {
        "batch_size": 16,
        "lr_ve": 5e-5,
        "lr_ed": 1e-4,
        "lr_scheduler": "StepLR",
        "step_size": 50,
        "gamma": 0.1,
        "epochs": 100,
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-8,
        "amsgrad": True,
        "weight_decay": 5e-5,
        "clip_value": 0.1,
        "seed": 9223,
        "views": "paired",
    },
    "mimic_cxr": {"epochs": 30, "step_size": 1, "gamma": 0.8, "seed": 456789},
}


@dataclass(frozen=True)
class Settings(TransformerSettings):
    """R2Gen's settings; InputError where they do not go together."""

    rm_num_slots: int = setting(3, "R2Gen", "slots of the relational memory", low=1, shapes=True)
    rm_num_heads: int = setting(8, "R2Gen", "attention heads of the relational memory", low=1, shapes=True)
    rm_d_model: int = setting(
        512, "R2Gen", "width of the relational memory; must equal --d_model, and follows it", low=1, shapes=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rm_d_model != self.d_model:
            raise InputError(f"--rm_d_model {self.rm_d_model}: must equal --d_model {self.d_model}")


class LayerNorm(nn.Module):
    """gamma * normalise(x) + beta, with R2Gen's names for the parameters."""

    def __init__(self, d_model: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(d_model))
        self.beta = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return normalise(x, self.gamma, self.beta)


class ConditionalLayerNorm(LayerNorm):
    """Layer norm whose scale and shift depend on the memory at the same position."""

    def __init__(self, d_model: int, memory_dim: int):
        super().__init__(d_model)
        self.mlp_gamma = nn.Sequential(nn.Linear(memory_dim, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        self.mlp_beta = nn.Sequential(nn.Linear(memory_dim, d_model), nn.ReLU(), nn.Linear(d_model, d_model))
        for part in (*self.mlp_gamma, *self.mlp_beta):
            if isinstance(part, nn.Linear):
                nn.init.constant_(part.bias, 0.1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """``x`` (B, T, d) and ``memory`` (B, T, m) -> (B, T, d)."""
        scale, shift = self.gamma + self.mlp_gamma(memory), self.beta + self.mlp_beta(memory)
        return torch.addcmul(shift, scale, normalise(x, torch.ones_like(self.gamma), torch.zeros_like(self.beta)))


class RelationalNetwork(EncoderDecoder):
    """The encoder-decoder whose decoder norms depend on a memory of the words so far."""

    def __init__(self, image_dim: int, num_ids: int, settings: Settings):
        super().__init__()
        d_model, slots = settings.d_model, settings.rm_num_slots
        self.att_embed = PatchEmbedding(image_dim, d_model, settings.drop_prob_lm, settings.use_bn)
        self.model = Transformer(
            num_ids,
            settings,
            norm=LayerNorm,
            decoder_norm=partial(ConditionalLayerNorm, memory_dim=slots * d_model),
            visual_positions=False,
            rm=RelationalMemory(d_model, slots, settings.rm_num_heads),
        )
        self.logit = nn.Linear(d_model, num_ids)

    def condition(self, tokens: Tensor) -> tuple[Tensor]:
        """The memory after each token, (B, T, m); in training its input has a dropout mask of its own, as published."""
        return (self.model.rm(self.embed(tokens, None)[0]),)


class R2Gen(TransformerBackbone):
    """The published model; ``num_ids`` = V+1 rows of embedding and logits, ``visual_extractor`` has ``width``."""

    published_entries = "encoder_decoder.model.rm."
    any_length = False  # the memory loops over the words, and an exported program is unrolled

    def __init__(self, *, visual_extractor: Any, num_ids: int, settings: Settings):
        super().__init__(visual_extractor, settings)
        self.encoder_decoder = RelationalNetwork(self.image_dim, num_ids, settings)

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> Session:
        """A decoder of reports on studies with ``features`` (B, S, C), at its first step."""
        return RelationalSession(self.encoder_decoder, features, None, decoding)


class RelationalSession(Session):
    """A batch of studies being decoded, with the relational memory of every hypothesis."""

    def __init__(self, network: EncoderDecoder, features: VisualFeatures, memory: None, decoding: DecodingOptions):
        super().__init__(network, features, memory, decoding)
        self.weights = network.model.rm.weights().transposed()
        self.slots: Any = None  # (B, K, m) after the newest tokens, a Tensor from the first step on
        self.fixed = False  # whether they keep their place

    def condition(self, x: Tensor, parents: Tensor | None) -> tuple[Tensor]:
        """The memory (B, K, m) after the newest words ``x`` (B, K, d), each continuing the memory of its parent."""
        past = self.slots
        if past is not None and parents is not None:
            past = past.gather(1, parents.unsqueeze(-1).expand(-1, -1, past.size(-1)))
        past = None if past is None else past.flatten(0, 1)
        slots = self.network.model.rm.step(x.flatten(0, 1), past, self.weights).unflatten(0, x.shape[:2])
        if self.fixed:
            self.slots.copy_(slots)
        else:
            self.slots = slots
        return (slots,)

    def fix(self) -> bool:
        """As in DecodingSession."""
        self.fixed, self.slots = True, self.slots.expand(-1, self.cache.num_hypotheses, -1).contiguous()
        return super().fix()

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        super().keep(rows)
        self.slots = None if self.slots is None else self.slots[rows]
