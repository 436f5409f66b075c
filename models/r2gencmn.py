"""R2GenCMN: cross-modal memory networks for radiology report generation (Chen et al., ACL 2021, arXiv 2204.13258).

Shapes: B studies, T tokens or visual tokens, d = d_model, h heads of width w, M rows of the memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.transformer_base import EncoderDecoder, Transformer, TransformerBackbone, TransformerSettings
from modules.layers.cross_modal_memory import MemoryResponse
from modules.layers.transformer import PatchEmbedding
from modules.runtime.errors import InputError
from modules.runtime.settings import setting

# The published run scripts; everything else keeps its default.
PRESETS = {
    "*": {
        "batch_size": 16,
        "lr_ve": 1e-4,
        "lr_ed": 5e-4,
        "lr_scheduler": "StepLR",
        "step_size": 10,
        "gamma": 0.8,
        "epochs": 100,
        "seed": 7580,
        "topk": 32,
        "views": "paired",
    },
    "mimic_cxr": {"epochs": 30, "step_size": 3, "seed": 9153},
}


@dataclass(frozen=True)
class Settings(TransformerSettings):
    """R2GenCMN's settings; InputError where they do not go together."""

    topk: int = setting(32, "backbone", "memory rows (XProNet: prototypes) that a query reads", low=1)
    cmm_size: int = setting(2048, "R2GenCMN", "rows of the cross-modal memory", low=1, shapes=True)
    cmm_dim: int = setting(512, "R2GenCMN", "width of the cross-modal memory; must equal --d_model", low=1, shapes=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cmm_dim != self.d_model:
            raise InputError(f"--cmm_dim {self.cmm_dim}: must equal --d_model {self.d_model}")
        if self.topk > self.cmm_size:
            raise InputError(f"--topk {self.topk}: at most --cmm_size {self.cmm_size}")


class MemoryNetwork(EncoderDecoder):
    """The encoder-decoder whose visual tokens and words query one memory."""

    def __init__(self, image_dim: int, num_ids: int, settings: Settings):
        super().__init__()
        d_model = settings.d_model
        self.memory_matrix = nn.Parameter(torch.randn(settings.cmm_size, settings.cmm_dim) / settings.cmm_dim)
        self.att_embed = PatchEmbedding(image_dim, d_model, settings.drop_prob_lm, settings.use_bn)
        self.cmn = MemoryResponse(d_model, settings.num_heads, settings.topk)
        self.model = Transformer(num_ids, settings, cmn=self.cmn)
        self.logit = nn.Linear(d_model, num_ids)

    def memory(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (M, h, w) of the memory, for all queries of a pass."""
        return self.cmn.keys_values(self.memory_matrix)

    def read(self, x: Tensor, memory: Any, *, words: bool) -> tuple[Tensor, Tensor]:
        """``x`` (B, T, d) plus the memory's response to it, and the response."""
        response = self.cmn(x, *memory)
        return x + response, response


class R2GenCMN(TransformerBackbone):
    """The published model; ``num_ids`` = V+1 rows of embedding and logits, ``visual_extractor`` has ``width``."""

    published_entries = "encoder_decoder.memory_matrix"

    def __init__(self, *, visual_extractor: Any, num_ids: int, settings: Settings):
        super().__init__(visual_extractor, settings)
        self.encoder_decoder = MemoryNetwork(self.image_dim, num_ids, settings)
