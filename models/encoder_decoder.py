"""Any visual extractor with any decoder of transformers: a projection joins them.

The shape of CvT2DistilGPT2 (Nicolson, Dowling and Koopman, arXiv 2201.09405), whose decoder looks at the visual tokens
through cross-attention, and of R2GenGPT (Wang et al., arXiv 2309.09812), which reads them as a prefix of the report.

Shapes: B studies, S visual tokens, T decoder inputs, K hypotheses per study, D = width of the decoder.

Everywhere else token 0 is begin, end and padding at once. A decoder with a vocabulary of its own has an id for each and
a word at 0: here, and only here, 0 becomes begin at the first position and the end id elsewhere, and the end id becomes
0.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Backbone, BackboneSettings, Output, VisualFeatures
from models.encoder_decoder_language import LanguageDecoder
from modules.decoding.options import DecodingOptions
from modules.layers.transformer import TorchLayerNorm
from modules.runtime.settings import setting

# The published run scripts. What they set and is not here: R2GenGPT's prompt around the image, and that it generates
# longer reports than it trains on.
SYSTEMS = {
    "cvt2distilgpt2": {
        "*": {
            "visual_extractor": "hf:microsoft/cvt-21-384-22k",
            "image_size": 384,
            "decoder": "distilgpt2",
            "batch_size": 16,
            "optim": "AdamW",
            "lr_ve": 5e-5,
            "lr_ed": 5e-4,
            "adam_betas": (0.9, 0.999),
            "amsgrad": False,
            "weight_decay": 0.01,
            "lr_scheduler": "constant",
            "clip_norm": 0.0,
            "precision": "float16",
            "monitor_metric": "CIDEr",
            "early_stop": 10,
            "beam_size": 4,
        },
        "iu_xray": {"max_seq_length": 128},
        "mimic_cxr": {"max_seq_length": 128},
    },
    "r2gengpt": {
        "*": {
            "visual_extractor": "hf:microsoft/swin-base-patch4-window7-224",
            "image_size": 224,
            "freeze_visual_extractor": True,
            "decoder": "meta-llama/Llama-2-7b-chat-hf",
            "freeze_decoder": True,
            "optim": "AdamW",
            "lr_ve": 1e-4,
            "lr_ed": 1e-4,
            "adam_betas": (0.9, 0.999),
            "amsgrad": False,
            "weight_decay": 0.01,
            "lr_scheduler": "CosineAnnealingLR",
            "clip_norm": 1.0,
            "batch_size": 8,
            "precision": "bfloat16",
            "eval_batch_size": 12,
            "beam_size": 3,
            "repetition_penalty": 2.0,
            "length_penalty": 2.0,
        },
        "iu_xray": {"max_seq_length": 60, "min_length": 40, "epochs": 15},
        "mimic_cxr": {"max_seq_length": 100, "min_length": 80, "epochs": 5},
    },
}


@dataclass(frozen=True)
class Settings(BackboneSettings):
    """Which decoder; InputError for values out of bounds."""

    decoder: str = setting(
        "",
        "encoder-decoder",
        "pretrained decoder of transformers: a folder, or a hub id such as distilgpt2, which is downloaded once. Types "
        "with cross-attention: gpt2, bert, bart, t5; read as a prefix: llama, mistral, qwen2, qwen3",
        file=True,
        initial=True,
        remote=True,
        vocabulary=True,
    )
    decoder_config: str = setting(
        "",
        "encoder-decoder",
        "the decoder's architecture: JSON, or a config.json file; a run takes it from --decoder and keeps it in its "
        "checkpoints. Without both, a GPT-2 of --d_model, --d_ff, --num_heads, --num_layers and --dropout",
        shapes=True,
    )
    freeze_decoder: bool = setting(
        False,
        "encoder-decoder",
        "train the projection (and the visual extractor, unless frozen), but nothing of the decoder except what "
        "pretrained weights lack: new cross-attention, and the embeddings of a vocabulary of words",
        train_only=True,
    )
    lora_rank: int = setting(
        0,
        "encoder-decoder",
        "rank of low-rank adapters (LoRA) on the decoder, which is frozen as by --freeze_decoder; 0: none",
        low=0,
        high=4096,
        shapes=True,
    )
    lora_targets: str = setting(
        "",
        "encoder-decoder",
        "the decoder's layers that get adapters: ends of their names between commas (q_proj,v_proj), or all-linear; "
        "default: its queries and values",
        shapes=True,
    )
    lora_alpha: int = setting(16, "encoder-decoder", "adapters are multiplied by this / --lora_rank", low=1)
    lora_dropout: float = setting(
        0.0, "encoder-decoder", "dropout of what the adapters read", low=0.0, high=0.999, train_only=True
    )

    @property
    def idle_options(self) -> dict[str, tuple[str, ...]]:
        idle: dict[str, tuple[str, ...]] = {}
        if self.decoder or self.decoder_config:
            idle["the decoder has its own sizes"] = ("d_model", "d_ff", "num_heads", "num_layers", "dropout")
        if not self.lora_rank:
            idle["without --lora_rank there are no adapters"] = ("lora_targets", "lora_alpha", "lora_dropout")
        return idle


class EncoderDecoder(Backbone):
    """A visual extractor, a projection and a language model; ``num_ids`` tokens, of which 0 is begin and end.

    ``keeps_vocabulary``: token ids are the language model's own, with ``begin_id`` and ``end_id``; otherwise its
    embeddings are resized to a vocabulary of words. ``folder`` has its weights, None draws them at random.
    ValueError for ids, a configuration or weights that do not fit.
    """

    tokenizer_kind = "bpe"
    tokenizer_files = "decoder"
    resources = ("decoder",)
    exchanged: Tensor  # (2,) the ids that change places

    def __init__(
        self,
        *,
        visual_extractor: Any,
        num_ids: int,
        settings: Settings,
        begin_id: int = 0,
        end_id: int = 0,
        keeps_vocabulary: bool = False,
        folder: Path | None = None,
    ):
        super().__init__()
        text = settings.decoder_config or small_gpt2(settings, num_ids)
        self.visual_extractor = visual_extractor
        self.decoder = LanguageDecoder(text, num_ids=None if keeps_vocabulary else num_ids, folder=folder)
        rows = self.decoder.config.vocab_size
        if not max(begin_id, end_id, num_ids - 1) < rows:
            raise ValueError(f"decoder: its {rows} token embeddings are fewer than the {num_ids} tokens")
        self.num_ids, self.begin_id, self.end_id = num_ids, begin_id, end_id
        self.register_buffer("exchanged", torch.tensor([0, end_id]), persistent=False)
        self.image_dim, self.report_dim = visual_extractor.width, self.decoder.width
        self.vocabulary_entry = f"decoder.{self.decoder.embedding_name()}"
        self.projection: nn.Module = nn.Linear(self.image_dim, self.report_dim)
        if self.decoder.language.prefix:
            self.projection = nn.Sequential(self.projection, TorchLayerNorm(self.report_dim))
        if settings.lora_rank:
            self.decoder.adapt(
                settings.lora_targets, rank=settings.lora_rank, alpha=settings.lora_alpha, dropout=settings.lora_dropout
            )
        elif settings.freeze_decoder:
            self.decoder.freeze()

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        features = self.extract(images, view_mask, features)
        hidden = self.decoder(self.own_ids(tokens), self.projection(features.patches), features.patch_mask)
        return Output(self.log_probs(hidden[:supervised_rows]), features.pooled, hidden)

    def embed_words(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), the language model's embeddings of words and positions."""
        return self.decoder.embed(self.own_ids(tokens, first=False))

    def own_ids(self, tokens: Tensor, first: bool = True) -> Tensor:
        """The language model's ids (B, T) of ``tokens`` (B, T), which start with begin where ``first`` is true."""
        ids = torch.where(tokens == 0, self.end_id, torch.where(tokens == self.end_id, 0, tokens))
        if first:
            ids[:, 0] = self.begin_id
        return ids

    def log_probs(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V+1) in float32 at least, the end at 0."""
        logits = self.decoder.logits(hidden)[..., : self.num_ids]
        if self.end_id:
            logits = logits.index_copy(-1, self.exchanged, logits[..., self.exchanged.flip(0)])
        return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(hidden.dtype, torch.float32))

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> "Session":
        """A decoder of reports on studies with ``features`` (B, S, C), at its first step."""
        return Session(self, features, decoding)

    def cross_attention(self) -> list[nn.Module]:
        return list(self.decoder.looks)

    def blocks(self) -> list[nn.Module]:
        return self.decoder.layers()

    def recompute_activations(self) -> None:
        self.decoder.recompute_activations()

    def ended_beams(self, decoding: DecodingOptions) -> str:
        """As in transformers; diverse groups use the R2Gen family's."""
        return "removed" if decoding.group_size == 1 else "lowered"


def small_gpt2(settings: Settings, num_ids: int) -> str:
    """The configuration of a GPT-2 of the sizes that all backbones have."""
    return json.dumps(
        {
            "model_type": "gpt2",
            "vocab_size": num_ids,
            "n_embd": settings.d_model,
            "n_inner": settings.d_ff,
            "n_head": settings.num_heads,
            "n_layer": settings.num_layers,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout),
        }
    )


class Session:
    """A batch of studies being decoded; rows of the cache are hypotheses, a study's next to each other."""

    def __init__(self, model: EncoderDecoder, features: VisualFeatures, decoding: DecodingOptions):
        from models.encoder_decoder_cache import HypothesisCache

        self.model, self.there = model, features.patch_mask
        self.visual = model.projection(features.patches)
        self.prefix = self.visual.size(1) if model.decoder.language.prefix else 0  # slots before the report's
        self.num_slots = self.prefix + decoding.max_seq_length
        self.cache = HypothesisCache(model.decoder.num_layers, self.num_slots, model.decoder.language.prefix)
        self.num_hypotheses = decoding.num_hypotheses
        self.position, self.width = 0, 1
        self.newest: Tensor | None = None  # (1,) the slot of the newest token, where it is fixed

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Log-probabilities (B, K, V+1) after ``tokens`` (B, K), which continue hypotheses ``parents`` (B, K)."""
        batch, width = tokens.shape
        if parents is not None and self.num_hypotheses > 1:
            studies = torch.arange(batch, device=tokens.device).unsqueeze(1)
            rows = (studies * self.width + parents).flatten()
            if width == self.width:
                self.cache.reorder(rows)
            else:
                self._select(rows)
        self.width = width
        ids = self.model.own_ids(tokens, first=self.position == 0).view(-1, 1)
        self.position += 1
        if self.newest is not None:
            hidden = self._fixed_step(ids, self.newest)
        else:
            hidden = self.model.decoder(ids, self.visual, self.there, self.cache.given, past=self.position - 1)
        return self.model.log_probs(hidden).view(batch, width, -1)

    def _fixed_step(self, ids: Tensor, newest: Tensor) -> Tensor:
        newest += 1
        seen = self.readable & (self.numbers <= newest)
        looks = None if self.there is None or self.prefix else self.there[:, None, None, :]
        position = self.begin + (newest - self.prefix)
        return self.model.decoder.one_token(ids, self.visual, looks, self.cache.given, seen, position)

    def _select(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.visual = self.visual[rows]
        self.there = None if self.there is None else self.there[rows]

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        hypotheses = torch.arange(self.width, device=rows.device)
        self._select((rows.unsqueeze(1) * self.width + hypotheses).flatten())

    def fix(self) -> bool:
        """As in DecodingSession."""
        if not self.model.decoder.can_be_fixed(self.num_slots):
            return False
        device, batch = self.visual.device, len(self.visual)
        self._select(torch.arange(batch * self.num_hypotheses, device=device) // self.num_hypotheses)
        self.width, rows = self.num_hypotheses, len(self.visual)
        self.newest = torch.full((1,), self.prefix, device=device)
        self.cache.fix(self.newest)
        self.numbers = torch.arange(self.num_slots, device=device)
        self.readable = torch.ones(rows, 1, 1, self.num_slots, dtype=torch.bool, device=device)
        self.begin = torch.full((1, 1), self.prefix, device=device)  # the position of begin
        if self.prefix and self.there is not None:  # absent views are not read and take no positions
            self.readable[:, 0, 0, : self.prefix] = self.there
            self.begin = self.there.sum(1, keepdim=True)
        return True
