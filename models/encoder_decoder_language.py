"""The language models that decode for models/encoder_decoder.py: transformers' own, in two kinds.

Those with cross-attention look at the visual tokens in every layer; the others read them as a prefix of the text.
Shapes: B studies, S visual tokens, T decoder inputs, D = width of the language model.
"""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.layers.hub_encoders import LOCAL, architecture
from modules.layers.low_rank import ADAPTER, add_adapters, named_layers
from modules.layers.size_limits import require_moderate
from modules.layers.transformer import sinusoids
from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular_folder


class Language(NamedTuple):
    """A model type: its class in transformers, and where body and output layer lie in it."""

    name: str
    body: str
    head: str = "lm_head"
    prefix: bool = False  # without cross-attention
    cross: str = ""  # in a layer, the module whose output is what cross-attention read
    encoder: str = ""  # its own encoder of texts, which is left out
    positions: str = ""  # the table of position embeddings in the body, where it has one
    options: dict[str, Any] = {}
    fresh: tuple[str, ...] = ()  # parts that pretrained weights may lack
    adapted: tuple[str, ...] = ("q_proj", "v_proj")  # its layers of queries and values
    masked: bool = False  # takes a mask of any token's past as it is


_CROSS = {"add_cross_attention": True}
LANGUAGES = {
    "gpt2": Language(
        "GPT2LMHeadModel",
        "transformer",
        cross="crossattention",
        positions="wpe",
        options=_CROSS,
        fresh=("crossattention", "ln_cross_attn"),
        adapted=("c_attn",),
        masked=True,
    ),
    "bert": Language(
        "BertLMHeadModel",
        "bert",
        "cls",
        cross="crossattention.output.dense",
        positions="embeddings.position_embeddings",
        options=_CROSS | {"is_decoder": True},
        fresh=("crossattention",),
        adapted=("query", "value"),
    ),
    "bart": Language(
        "BartForConditionalGeneration",
        "model.decoder",
        cross="encoder_attn",
        positions="embed_positions",
        encoder="model.encoder",
    ),
    "t5": Language(
        "T5ForConditionalGeneration", "decoder", cross="EncDecAttention", encoder="encoder", adapted=("q", "v")
    ),
    "llama": Language("LlamaForCausalLM", "model", prefix=True, masked=True),
    "mistral": Language("MistralForCausalLM", "model", prefix=True, masked=True),
    "qwen2": Language("Qwen2ForCausalLM", "model", prefix=True, masked=True),
    "qwen3": Language("Qwen3ForCausalLM", "model", prefix=True, masked=True),
}


def describe_language(found: Any, where: str) -> str:
    """JSON of the architecture in a config.json ``found``; ValueError, from ``where``, where it is of no known type."""
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in LANGUAGES:
        raise ValueError(f"{where}: model_type {kind!r}; the decoders are {', '.join(LANGUAGES)}")
    return json.dumps(architecture(found) | {"model_type": kind}, sort_keys=True)


def read_language(text: str) -> tuple[str, Any]:
    """Model type and configuration of what ``describe_language`` wrote; ValueError for anything else."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        entries = json.loads(text)
        require_moderate(entries)
        kind = entries.pop("model_type")
        config = CONFIG_MAPPING[kind].from_dict(architecture(entries) | LANGUAGES[kind].options)
    except Exception as error:  # transformers checks its values with exceptions of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"decoder_config: not the configuration of a decoder ({reason})") from error
    for name, value in (("layers", depth(config)), ("width", config.hidden_size)):
        if value < 1:
            raise ValueError(f"decoder_config: {name} {value}; must be at least 1")
    return kind, config


def depth(config: Any) -> int:
    """How many layers the decoder has."""
    sizes = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
    return next(found for name in sizes if (found := getattr(config, name, None)) is not None)


def positions(config: Any) -> int | None:
    """How many tokens the decoder has positions for; None where they are relative."""
    kind = config.model_type
    return config.max_position_embeddings if kind in LANGUAGES and kind != "t5" else None


class Looks(nn.Module):
    """Is called with the weights (B, heads, T, S) of one layer's cross-attention and what it read (B, T, D), where
    someone listens.
    """

    def weights(self, weights: Tensor, read: Tensor) -> Tensor:
        """``weights`` (B, heads, T, S) themselves: the method by which attention is recorded."""
        return weights

    def forward(self, weights: Tensor, read: Tensor) -> Tensor:
        """``read`` (B, T, D), unchanged."""
        return read


class LanguageDecoder(nn.Module):
    """A transformers language model that is given visual tokens (B, S, D) and reads ids (B, T).

    ``num_ids`` resizes its vocabulary, None keeps it. Its weights are those of ``folder``, else drawn at random; where
    the vocabulary is resized, the embeddings of tokens are. ValueError where they do not fit.
    """

    def __init__(self, text: str, *, num_ids: int | None, folder: Path | None):
        super().__init__()
        kind, config = read_language(text)
        self.language = LANGUAGES[kind]
        if num_ids is not None:
            config.vocab_size, config.pad_token_id = num_ids, None
        self.model: Any = _weighted(self.language, config, folder, resized=num_ids is not None)
        if self.language.encoder:
            owner, _, name = self.language.encoder.rpartition(".")
            setattr(self.model.get_submodule(owner), name, None)
        self.config, self.resized = config, num_ids is not None
        self.width: int = config.hidden_size
        layers = self.num_layers = depth(config)
        self.looks = nn.ModuleList(Looks() for _ in range(0 if self.language.prefix else layers))
        given = inspect.signature(self.body.forward).parameters
        self.cache_name = "cache" if "cache" in given else "past_key_values"

    @property
    def body(self) -> Any:
        """The network up to its last hidden states."""
        return self.model.get_submodule(self.language.body)

    def adapt(self, targets: str, *, rank: int, alpha: int, dropout: float) -> None:
        """Freeze, but for adapters (modules/layers/low_rank.py) of the layers ``targets``, names between commas.

        Empty: queries and values. ValueError where it has no such layers.
        """
        names = targets.split(",") if targets else self.language.adapted
        layers = named_layers(self.model, names, without=self.language.fresh)
        add_adapters(self.model, layers, rank=rank, alpha=alpha, dropout=dropout)
        self.freeze()

    def freeze(self) -> None:
        """Train only the parts that pretrained weights lack: new cross-attention, embeddings of another vocabulary, and
        adapters.
        """
        drawn = [self.body.get_input_embeddings().weight, *self.model.get_submodule(self.language.head).parameters()]
        drawn = drawn if self.resized else []
        for name, parameter in self.named_parameters():
            new = any(part in name for part in (*self.language.fresh, ADAPTER))
            parameter.requires_grad_(new or any(parameter is own for own in drawn))

    def layers(self) -> list[nn.Module]:
        """Its layers, in order."""
        lists = (module for module in self.body.modules() if isinstance(module, nn.ModuleList))
        largest: Any = max(lists, key=lambda module: sum(value.numel() for value in module.parameters()))
        return list(largest)

    def recompute_activations(self) -> None:
        """Have every layer compute again in the backward pass what it would keep."""
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def embedding_name(self) -> str:
        """State-dict entry, in this module, of the token embeddings."""
        wanted = self.body.get_input_embeddings().weight
        return next(name for name, value in self.named_parameters(remove_duplicate=False) if value is wanted)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, D) of ``ids`` (B, T) and of their positions, sinusoidal where the model has none."""
        words, table = self.body.get_input_embeddings()(ids), self.language.positions
        if not table:
            return words + sinusoids(ids.size(1), self.width).to(words)
        return words + self.body.get_submodule(table).weight[: ids.size(1)]

    def can_be_fixed(self, num_slots: int) -> bool:
        """Whether ``one_token`` may take the place of ``forward``: not where a hook listens to attention."""
        window = getattr(self.config, "sliding_window", None)
        listens = any(look._forward_hooks for look in self.looks)
        return self.language.masked and not listens and (window is None or num_slots <= window)

    def one_token(
        self, ids: Tensor, visual: Tensor, there: Tensor | None, cache: Any, seen: Tensor, position: Tensor
    ) -> Tensor:
        """Hidden states (R, 1, D) of ``ids`` (R, 1), which look at the slots ``seen`` (R, 1, 1, slots) of the cache.

        ``position`` (R or 1, 1) int64 are their positions, ``visual`` (R, S, D) the visual tokens and ``there``
        (R, 1, 1, S) which of them are there, None = all. No shape depends on the position.
        """
        options = {"use_cache": True, "return_dict": True, self.cache_name: cache}
        options |= {"attention_mask": seen, "position_ids": position}
        if self.language.prefix:
            return self.body(inputs_embeds=self.body.get_input_embeddings()(ids), **options).last_hidden_state
        options |= {"encoder_hidden_states": visual, "encoder_attention_mask": there}
        return self.body(input_ids=ids, **options).last_hidden_state

    def new_cache(self) -> Any:
        """An empty cache of keys and values for ``forward``."""
        from transformers import DynamicCache, EncoderDecoderCache

        return DynamicCache() if self.language.prefix else EncoderDecoderCache(DynamicCache(), DynamicCache())

    def forward(self, ids: Tensor, visual: Tensor, keep: Tensor | None, cache: Any = None, past: int = 0) -> Tensor:
        """Hidden states (B, T, D) of ``ids`` (B, T), which follow ``past`` tokens in the ``cache``.

        ``visual`` (B, S, D) are the visual tokens, ``keep`` (B, S) bool which of them are there, None = all.
        """
        # Without a cache transformers looks for packed texts in the positions, and another device would be waited for.
        cache = self.new_cache() if cache is None and not ids.is_cpu else cache
        options = {"use_cache": cache is not None, "return_dict": True, self.cache_name: cache}
        if not self.language.prefix:
            mask = None if keep is None else keep.long()
            return self._look(input_ids=ids, encoder_hidden_states=visual, encoder_attention_mask=mask, **options)
        inputs = self.body.get_input_embeddings()(ids)
        if not past:
            inputs = torch.cat([visual.to(inputs.dtype), inputs], dim=1)
        if keep is not None:
            texts = keep.new_ones(len(ids), past + ids.size(1))
            mask = torch.cat([keep, texts], dim=1).long()
            # As in transformers' generate, absent views take no positions.
            options |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.size(1) :]}
        hidden = self.body(inputs_embeds=inputs, **options).last_hidden_state
        return hidden if past else hidden[:, visual.size(1) :]

    def _look(self, **inputs: Any) -> Tensor:
        """Hidden states (B, T, D); what a layer looks at goes to ``looks`` where a hook listens, as that is slow."""
        if not any(look._forward_hooks for look in self.looks):
            return self.body(**inputs).last_hidden_state
        before = self.body.config._attn_implementation
        self.body.set_attn_implementation("eager")  # the others do not keep weights
        read: list[Any] = []
        hooks = [
            module.register_forward_hook(lambda module, given, output: read.append(output))
            for name, module in self.body.named_modules()
            if name.endswith(f".{self.language.cross}")
        ]
        try:
            output = self.body(**inputs, output_attentions=True)
        finally:
            self.body.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()
        for look, weights, found in zip(self.looks, output.cross_attentions, read, strict=True):
            look(weights, found[0] if isinstance(found, tuple) else found)
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, tokens)."""
        if getattr(self.config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * self.width**-0.5
        logits = self.model.get_submodule(self.language.head)(hidden)
        bias = getattr(self.model, "final_logits_bias", None)  # BART's
        return logits if bias is None else logits + bias


def _weighted(language: Language, config: Any, folder: Path | None, *, resized: bool) -> nn.Module:
    """The language model with the weights of ``folder``, or random ones."""
    import transformers

    model_class = getattr(transformers, language.name)
    transformers.logging.set_verbosity_error()
    if folder is None:
        try:
            return model_class(config)
        except InputError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            # transformers finds sizes that do not go together wherever it first computes with them.
            raise ValueError(f"decoder_config: describes no model ({' '.join(str(error).split())[:200]})") from error
    transformers.logging.disable_progress_bar()
    require_regular_folder(folder, "--decoder")
    try:
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            **LOCAL,
            weights_only=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=resized,
            output_loading_info=True,
        )
    except Exception as error:  # damaged files surface as whatever their readers raise
        raise ValueError(f"decoder {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    missing = sorted(name for name in report["missing_keys"] if not any(part in name for part in language.fresh))
    if missing:
        raise ValueError(f"decoder {folder}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model
