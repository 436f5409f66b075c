"""VisualGPT: GPT-2 adapted to captioning by a self-resurrecting activation unit (Chen et al., CVPR 2022, arXiv
2102.10407).

Shapes: B studies, N visual tokens, T decoder inputs, K hypotheses per study, D = d_model, V words.

Everywhere else token 0 is begin, end and padding at once. GPT-2 has an id for each, and a word at 0: here, and only
here, 0 becomes begin at the first position and the end id elsewhere, and the end id becomes 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Backbone, BackboneSettings, Output, VisualFeatures
from models.visualgpt_decoder import LanguageModel
from models.visualgpt_encoder import LevelEncoder
from modules.decoding.cache import DecodingCache
from modules.decoding.options import DecodingOptions
from modules.runtime.errors import InputError
from modules.runtime.settings import setting

# The published training script; everything else keeps its default.
PRESETS = {
    "*": {
        "gpt2_path": "gpt2",
        "d_model": 768,
        "num_heads": 12,
        "gpt2_layers": 12,
        "num_layers": 3,
        "d_ff": 2048,
        "tau": 0.2,
        "batch_size": 25,
        "grad_accumulation": 2,
        "drop_last": True,
        "optim": "AdamW",
        "lr_ve": 1e-4,
        "lr_ed": 1e-4,
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-8,
        "amsgrad": False,
        "weight_decay": 0.01,
        "lr_scheduler": "constant",
        "clip_norm": 1.0,
        "epochs": 100,
        "beam_size": 5,
        "seed": 42,
    },
    "coco": {"collapse_repeats": True},
}


@dataclass(frozen=True)
class Settings(BackboneSettings):
    """VisualGPT's settings; InputError where they do not go together."""

    gpt2_path: str = setting(
        "",
        "VisualGPT",
        "pretrained GPT-2: a local folder, or a hub id such as gpt2, which is downloaded once; an empty name trains "
        "from random weights",
        file=True,
        initial=True,
        remote=True,
        vocabulary=True,
    )
    gpt2_layers: int = setting(
        12,
        "VisualGPT",
        "layers of the decoder; --num_layers are the encoder's, --d_model and --num_heads go for both, --d_ff for the "
        "encoder",
        low=1,
        shapes=True,
    )
    gpt2_positions: int = setting(
        1024, "VisualGPT", "longest text that the decoder has positions for", low=1, shapes=True
    )
    tau: float = setting(0.2, "VisualGPT", "threshold of the self-resurrecting activation unit", low=0.0, high=1.0)
    visualgpt_compat: str = setting(
        "off",
        "VisualGPT",
        "published: reproduce the published code's accidents (docs/VISUALGPT.md)",
        choices=("off", "published"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.num_heads:
            raise InputError(f"--d_model {self.d_model}: must be a multiple of --num_heads {self.num_heads}")


class VisualGPT(Backbone):
    """The published model for visual tokens of any kind; ``num_ids`` rows of embedding and logits.

    ``begin_id``, ``end_id`` and ``pad_token`` are the language model's own ids (all 0: a vocabulary without them).
    ``gpt2`` are weights of a GPT-2 by its names below ``transformer.``; None draws all at random. ``context`` is the
    size of a constant in the published files. ``visualgpt_compat`` "published" reproduces two accidents of the
    published code: its visual mask (LevelEncoder), and every ``pad_token`` taken for padding, a word or not. ValueError
    for ids or weights that do not fit.
    """

    vocabulary_entry = "decoder.transformer.wte.weight"
    published_entries = "decoder.transformer."
    tokenizer_kind = "bpe"
    resources = ("gpt2",)
    exchanged: Tensor  # (2,) the ids that change places

    def __init__(
        self,
        *,
        visual_extractor: Any,
        num_ids: int,
        settings: Settings,
        begin_id: int = 0,
        end_id: int = 0,
        pad_token: int = 0,
        gpt2: Mapping[str, Tensor] | None = None,
        context: int = 60,
    ):
        super().__init__()
        if not all(0 <= index < num_ids for index in (begin_id, end_id, pad_token)):
            raise ValueError(f"special ids {begin_id}, {end_id}, {pad_token}: must be below num_ids {num_ids}")
        self.visual_extractor = visual_extractor
        self.image_dim, self.report_dim = visual_extractor.width, settings.d_model
        self.begin_id, self.end_id, self.pad_token = begin_id, end_id, pad_token
        self.register_buffer("exchanged", torch.tensor([0, end_id]), persistent=False)
        published = settings.visualgpt_compat == "published"
        self.masks_pad_token = published and pad_token not in (begin_id, end_id)
        sizes: dict[str, Any] = {
            "d_model": settings.d_model,
            "num_heads": settings.num_heads,
            "dropout": settings.dropout,
        }
        self.encoder = LevelEncoder(
            self.image_dim, d_ff=settings.d_ff, num_layers=settings.num_layers, published=published, **sizes
        )
        self.decoder = LanguageModel(
            num_ids,
            num_positions=settings.gpt2_positions,
            num_layers=settings.gpt2_layers,
            num_levels=settings.num_layers,
            context=context,
            tau=settings.tau,
            **sizes,
        )
        self._initialise(gpt2)

    def _initialise(self, gpt2: Mapping[str, Tensor] | None) -> None:
        """Load GPT-2's weights, the rest of the decoder stays as drawn; without them every matrix is Xavier-uniform."""
        if gpt2 is None:
            for parameter in self.decoder.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
            return
        own = self.decoder.transformer.state_dict()
        for name, value in gpt2.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"gpt2_path: entry {name} of shape {tuple(value.shape)} has no place in this model")
        self.decoder.transformer.load_state_dict(dict(gpt2), strict=False)

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        features = self.extract(images, view_mask, features)
        hidden = self.decode(tokens, *self.encoder(features.patches, features.patch_mask))
        return Output(self.log_probs(hidden[:supervised_rows]), features.pooled, hidden)

    def decode(self, tokens: Tensor, levels: Tensor, keep: Tensor | None) -> Tensor:
        """Hidden states (B, T, D) of ``tokens`` (B, T) under teacher forcing; ``levels``, ``keep``: the encoder's."""
        ids = self.own_ids(tokens)
        real = self.real(tokens, ids)
        causal = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).tril()
        network = self.decoder.transformer
        return network(
            ids,
            None,
            network.sources(levels),
            real[:, None, None, :] & causal,
            keep,
            real.unsqueeze(-1).to(levels.dtype),
        )

    def encode(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """The levels (B, layers, N, D) and, in the published variant alone, their mask (B, 1, 1, N)."""
        levels, keep = self.encoder(features.patches, features.patch_mask)
        return (levels,) if keep is None else (levels, keep)

    def next_words(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) at every position of ``tokens`` (B, T), given ``encode``'s tensors."""
        return self.log_probs(self.decode(tokens, encoded[0], encoded[1] if len(encoded) > 1 else None))

    def own_ids(self, tokens: Tensor, first: bool = True) -> Tensor:
        """The language model's ids (B, T) of ``tokens`` (B, T), which start with begin where ``first`` is true."""
        ids = torch.where(tokens == 0, self.end_id, torch.where(tokens == self.end_id, 0, tokens))
        if first:
            ids[:, 0] = self.begin_id
        return ids

    def real(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """(B, T) bool, False at padding: every 0 after the end, which is the first 0 that follows begin."""
        zeros = tokens == 0
        zeros[:, 0] = False
        real = zeros.cumsum(dim=1) <= 1
        return real & (ids != self.pad_token) if self.masks_pad_token else real

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V) in float32, the end at 0."""
        logits = self.decoder.lm_head(hidden)
        if self.end_id:
            logits = logits.index_copy_(-1, self.exchanged, logits[..., self.exchanged.flip(0)])
        return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def embed_words(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), the language model's embeddings of words and positions."""
        network = self.decoder.transformer
        return network.wte(self.own_ids(tokens, first=False)) + network.wpe.weight[: tokens.size(1)]

    def cross_attention(self) -> list[nn.Module]:
        return [block.enc_dec_attn for block in self.decoder.transformer.h]

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> "Session":
        """A decoder of reports on studies with ``features`` (B, N, C), at its first step."""
        return Session(self, features, decoding)

    def ended_beams(self, decoding: DecodingOptions) -> str:
        """As in captioning codes; diverse groups use the R2Gen family's."""
        return "kept" if decoding.group_size == 1 else "lowered"

    def adopt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``state``, entries of any shape by name, with this model's constants in place of the file's buffers."""
        constants = {
            name: value
            for name, value in self.state_dict().items()
            if name.startswith("decoder.") and name in dict(self.named_buffers())
        }
        return dict(state) | constants


class Session:
    """A batch of studies being decoded: keys and values of the encoder's levels and of past words."""

    def __init__(self, model: VisualGPT, features: VisualFeatures, decoding: DecodingOptions):
        self.model = model
        levels, self.source_mask = model.encoder(features.patches, features.patch_mask)
        self.sources = model.decoder.transformer.sources(levels)
        self.cache = DecodingCache(len(self.sources), decoding.max_seq_length, decoding.num_hypotheses)

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K).

        A study's hypotheses are query positions of one row, so that they share its keys without a copy.
        """
        mask = self.cache.advance(tokens, parents)
        ids = self.model.own_ids(tokens, first=self.cache.begins)
        hidden = self.model.decoder.transformer(
            ids, self.cache.position, self.sources, mask, self.source_mask, caches=self.cache.layers
        )
        return self.model.log_probs(hidden)

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.sources = [(keys[rows], values[rows]) for keys, values in self.sources]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        self.cache.keep(rows)

    def fix(self) -> bool:
        """As in DecodingSession."""
        self.cache.fix()
        return True
