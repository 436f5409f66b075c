"""Continues the pretraining of a text encoder by masked words, as RadBERT was made from RoBERTa on radiology reports.

BERT: Devlin et al., NAACL 2019; RadBERT: Yan et al., Radiology: AI 4(4), 2022. Shapes: B texts, T tokens of the
longest, H features, V tokens of the vocabulary, n chosen words of a batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from modules.data.sample_order import EpochBatchSampler, keyed_generator
from modules.mining.text_encoders import LOCAL, load_pretrained, longest_input, weights_sha256
from modules.runtime.distributed import seed_by
from modules.runtime.errors import InputError
from scripts.research.masked_words import WordMasking

HELD_OUT_SHARE = 0.05
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01  # BERT's, on matrices alone
MAX_NORM = 1.0
# What a key of seed and epoch is for; 0 is the sampler's order.
HELD_OUT, MASKS, WEIGHTS = 101, 102, 103


@dataclass(frozen=True)
class Score:
    """Means over the masked words of the held-out texts after ``epoch`` epochs: loss in nats, share predicted."""

    epoch: int
    loss: float
    accuracy: float
    words: int


class MaskedLanguageModel:
    """A transformers encoder with its masked-LM head; where the folder has no head, ``new_head``, one is drawn.

    The decoder of the head is the table of word embeddings. No code from the folder is run. InputError where it holds
    no encoder that can be trained so.
    """

    def __init__(self, folder: Path, *, max_length: int, mask_share: float, device: str, seed: int):
        from transformers import AutoModelForMaskedLM

        _require_masked_lm(folder)
        seed_by(seed, 0, WEIGHTS)  # of a new head
        self.folder, self.device = folder, device
        self.tokenizer, model, missing = load_pretrained(folder, AutoModelForMaskedLM)
        for token in ("mask", "pad"):
            if getattr(self.tokenizer, f"{token}_token_id") is None:
                raise InputError(f"text encoder {folder}: its tokeniser has no {token} token")
        if len(self.tokenizer) > model.get_input_embeddings().num_embeddings:
            raise InputError(
                f"text encoder {folder}: its tokeniser has {len(self.tokenizer)} tokens, its weights "
                f"{model.get_input_embeddings().num_embeddings}"
            )
        of_encoder = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
        if of_encoder:
            raise InputError(
                f"text encoder {folder}: its weights lack {len(of_encoder)} tensors, such as {of_encoder[0]}"
            )
        self.new_head = bool(missing)
        self.model = model.to(device)
        self.max_length = longest_input(model.config, max_length)
        self.masking = WordMasking(self.tokenizer, mask_share)

    @property
    def encoder(self) -> torch.nn.Module:
        """The model without its head."""
        return self.model.base_model

    def sha256(self) -> str:
        """Of the encoder's weights, as a hard-negative index names them."""
        return weights_sha256(self.encoder)

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids (T,) of each text, cut to the longest input; texts without a known word are left out."""
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        found = (torch.tensor(row) for row in rows)
        return [ids for ids in found if self.masking.words(ids).any()]

    def predict(self, texts: Sequence[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of the words that ``generator`` hides in the texts, and those words' ids (n,)."""
        ids = pad_sequence(list(texts), batch_first=True, padding_value=self.tokenizer.pad_token_id)  # (B, T)
        lengths = torch.tensor([len(text) for text in texts])
        attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        read, chosen = self.masking(ids, generator)
        hidden_words = ids[chosen].to(self.device)
        chosen = chosen.to(self.device)

        # The head's product with the vocabulary is most of the cost: it is computed where a word is asked for only.
        def keep_chosen(module, inputs, output):
            output.last_hidden_state = output.last_hidden_state[chosen][None]  # (1, n, H)
            return output

        hook = self.encoder.register_forward_hook(keep_chosen)
        try:
            logits = self.model(input_ids=read.to(self.device), attention_mask=attention.to(self.device)).logits
        finally:
            hook.remove()
        if logits.shape[:2] != (1, len(hidden_words)):
            raise InputError(
                f"text encoder {self.folder}: the head of a {self.model.config.model_type} model cannot "
                "be asked for single words"
            )
        return logits[0], hidden_words

    def save(self, folder: Path) -> None:
        """Write the encoder without its head (safetensors) and the tokeniser, unchanged."""
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

        try:
            self.encoder.save_pretrained(folder)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error
        # One that has read texts would keep how they were cut.
        AutoTokenizer.from_pretrained(self.folder, **LOCAL).save_pretrained(folder)


def _require_masked_lm(folder: Path) -> None:
    """InputError where the folder's model is none that predicts masked words: T5, GPT-2, CLIP, ..."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # damaged files surface as whatever their readers raise
        raise InputError(f"text encoder {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:  # BART is in it
        raise InputError(
            f"text encoder {folder}: a {config.model_type} model does not predict masked words; give an "
            "encoder such as BERT, RoBERTa or MiniLM"
        )


def hold_out(texts: Sequence[Tensor], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The texts to train on, and the 5 % (one at least) that the seed draws to be looked at only."""
    if len(texts) < 2:
        raise InputError(f"{len(texts)} different training reports with known words: two or more are needed")
    order = torch.randperm(len(texts), generator=keyed_generator(seed, 0, HELD_OUT)).tolist()
    count = max(1, round(HELD_OUT_SHARE * len(texts)))
    return [texts[row] for row in sorted(order[count:])], [texts[row] for row in sorted(order[:count])]


def evaluate(model: MaskedLanguageModel, texts: Sequence[Tensor], *, epoch: int, batch_size: int, seed: int) -> Score:
    """Score of ``texts``; the words that are masked depend on the seed alone, so that epochs can be compared."""
    generator = keyed_generator(seed, 0, MASKS)
    loss = right = words = 0.0
    model.model.eval()
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            logits, wanted = model.predict(texts[start : start + batch_size], generator)
            loss += cross_entropy(logits, wanted, reduction="sum").item()
            right += (logits.argmax(1) == wanted).sum().item()
            words += len(wanted)
    if not math.isfinite(loss):
        raise InputError(
            "the masked-word loss is not a finite number; lower --lr (or the encoder's weights are damaged)"
        )
    return Score(epoch, loss / words, right / words, int(words))


def learning_rate_at(step: int, steps: int) -> float:
    """Factor of the learning rate at ``step`` of ``steps``, from 0: up for the first 10 %, then down towards 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def build_optimizer(module: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW over all parameters; biases and normalisations do not decay."""
    parameters = list(module.parameters())
    return torch.optim.AdamW(
        [
            {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
    )


def pretrain(
    model: MaskedLanguageModel,
    texts: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    bar: Callable[[Iterable, str], Iterable] = lambda items, name: items,
) -> Iterator[Score]:
    """Train all parameters on ``texts``; yields the score of ``held_out`` before the first and after every epoch.

    bar: wraps the batches of an epoch, given its name. Same seed, same weights on a CPU.
    """
    yield evaluate(model, held_out, epoch=0, batch_size=batch_size, seed=seed)
    sampler = EpochBatchSampler(len(texts), batch_size, shuffle=True, seed=seed, lengths=[len(text) for text in texts])
    steps = epochs * len(sampler)
    optimizer = build_optimizer(model.model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, steps))
    for epoch in range(1, epochs + 1):
        sampler.set_epoch(epoch)
        generator = keyed_generator(seed, epoch, MASKS)
        seed_by(seed, epoch, WEIGHTS)  # dropout
        model.model.train()
        for batch in bar(sampler, f"epoch {epoch}"):
            logits, wanted = model.predict([texts[row] for _, row in batch], generator)
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(logits, wanted).backward()
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
        yield evaluate(model, held_out, epoch=epoch, batch_size=batch_size, seed=seed)
