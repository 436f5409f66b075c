"""Masked-language-model training of a text encoder with transformers (BERT: Devlin et al., NAACL 2019)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from modules.mining.transformer_encoder import LOCAL, load_pretrained, longest_input
from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.05
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0


@dataclass(frozen=True)
class Score:
    """Means over the masked tokens of the held-out texts after ``epoch`` epochs: loss in nats, share predicted."""

    epoch: int
    loss: float
    accuracy: float
    words: int


@dataclass(frozen=True)
class MaskedLanguageModel:
    """Tokeniser and model (float32, on ``device``); ``new_head``: the folder has no head, so it starts from scratch."""

    folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    model: "PreTrainedModel"
    max_length: int
    new_head: bool

    @property
    def encoder(self) -> torch.nn.Module:
        """The model without its head."""
        return self.model.base_model

    def tokenize(self, texts: Sequence[str]) -> list[dict]:
        """Tokens of each text, cut to the longest input; texts without a known word are left out."""
        special = set(self.tokenizer.all_special_ids)
        rows = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        return [{"input_ids": row} for row in rows if not special.issuperset(row)]

    def save(self, folder: Path) -> None:
        """Write the encoder without its head (safetensors) and the tokeniser. OSError where it cannot be written."""
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

        try:
            self.encoder.save_pretrained(folder)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(str(error)) from error
        # A fresh one: the one that has been used would be saved with its truncation.
        AutoTokenizer.from_pretrained(self.folder, **LOCAL).save_pretrained(folder)


def load_masked_lm(folder: Path, *, max_length: int, device: str, seed: int) -> MaskedLanguageModel:
    """Read an encoder with its masked-LM head; ``seed`` initialises a head that the folder lacks.

    No code from the folder is run. Raises InputError if the folder holds no encoder that can be trained this way.
    """
    from transformers import AutoModelForMaskedLM

    _require_masked_lm(folder)
    torch.manual_seed(seed)
    tokenizer, model, missing = load_pretrained(folder, AutoModelForMaskedLM)
    for token in ("mask", "pad"):
        if getattr(tokenizer, f"{token}_token_id") is None:
            raise InputError(f"text encoder {folder}: its tokeniser has no {token} token")
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise InputError(f"text encoder {folder}: its tokeniser has {len(tokenizer)} tokens, its weights {size}")
    of_encoder = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if of_encoder:
        raise InputError(f"text encoder {folder}: its weights lack {len(of_encoder)} tensors, such as {of_encoder[0]}")
    return MaskedLanguageModel(
        folder, tokenizer, model.to(device), longest_input(model.config, max_length), bool(missing)
    )


def _require_masked_lm(folder: Path) -> None:
    """InputError if the folder's model does not predict masked words: T5, GPT-2, CLIP, ..."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    require_regular_folder(folder, "text encoder")
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # damaged files raise almost anything
        raise InputError(f"text encoder {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder:  # the mapping includes BART
        raise InputError(
            f"text encoder {folder}: a {config.model_type} model does not predict masked words; give an "
            "encoder such as BERT, RoBERTa or MiniLM"
        )


def hold_out(texts: Sequence[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Split ``texts`` at random into those to train on and a held-out 5 % (one at least).

    InputError for fewer than two.
    """
    if len(texts) < 2:
        raise InputError(f"{len(texts)} different training reports with known words: two or more are needed")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(HELD_OUT_SHARE * len(texts)))
    return [texts[row] for row in sorted(order[count:])], [texts[row] for row in sorted(order[:count])]


def pretrain(
    found: MaskedLanguageModel,
    texts: Sequence[dict],
    held_out: Sequence[dict],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    mask_share: float,
    seed: int,
    progress: Callable[[Iterable, str], Iterable] = lambda items, name: items,
) -> Iterator[Score]:
    """Train all parameters on ``texts``; yields the score of ``held_out`` before the first and after every epoch.

    ``progress`` wraps the batches of an epoch, given its name. The same seed gives the same weights on a CPU.
    """
    from transformers import DataCollatorForLanguageModeling, get_linear_schedule_with_warmup

    def batches(of: Sequence[dict], shuffle: bool) -> torch.utils.data.DataLoader:
        masking = DataCollatorForLanguageModeling(found.tokenizer, mlm_probability=mask_share, seed=seed)
        order = torch.Generator().manual_seed(seed)
        return torch.utils.data.DataLoader(of, batch_size, shuffle=shuffle, collate_fn=masking, generator=order)

    model, training = found.model, batches(texts, shuffle=True)
    steps = epochs * len(training)
    decaying = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]  # biases and normalisations
    groups = [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_SHARE * steps), steps)
    torch.manual_seed(seed)  # dropout
    for epoch in range(epochs + 1):
        model.train()
        for batch in progress(training, f"epoch {epoch}") if epoch else ():
            if (batch["labels"] < 0).all():  # of short texts, none may be masked
                continue
            model(**batch.to(model.device)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        # The same masks in every epoch, so that scores can be compared.
        yield evaluate(model, batches(held_out, shuffle=False), epoch)


@torch.inference_mode()
def evaluate(model: torch.nn.Module, batches: Iterable, epoch: int) -> Score:
    """Score of ``batches``; InputError if the loss is not finite."""
    loss = right = words = 0
    model.eval()
    for batch in batches:
        batch = batch.to(model.device)
        logits, labels = model(**batch).logits.flatten(0, 1), batch["labels"].flatten()  # (B * T, V), (B * T,)
        loss += cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        words += (labels >= 0).sum().item()
    if not math.isfinite(loss):
        raise InputError(
            "the masked-word loss is not a finite number; lower --lr (or the encoder's weights are damaged)"
        )
    return Score(epoch, loss / max(words, 1), right / max(words, 1), words)
