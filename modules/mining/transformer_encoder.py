"""Reports as the pooled hidden states of a transformers encoder, such as RadBERT. N texts, T tokens, H features."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PretrainedConfig, logging

from modules.mining.embedding_cache import EmbeddingCache
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular_folder
from modules.runtime.run_log import Bar

# Nothing is fetched and no code of a folder is run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


class TransformerEncoder:
    """Last hidden states of a transformers encoder, pooled over its tokens and divided by their norm.

    folder: configuration, tokeniser and weights as transformers saves them. pooling: "mean" over the tokens that are
    no padding, or "first" ([CLS], <s>). The model's own pooler is never used: masked-LM checkpoints such as RadBERT
    have no weights for it, so it would be drawn at random at each load. No code from the folder is run, and weights
    come from safetensors or through torch's weights_only reader. InputError where the folder holds no such encoder.
    """

    def __init__(self, folder: Path, *, pooling: str, max_length: int = 512, device: str = "cpu", batch_size: int = 32):
        self._tokenizer, model, missing = load_pretrained(folder, AutoModel)
        if missing:
            raise InputError(f"text encoder {folder}: its weights lack {len(missing)} tensors, such as {missing[0]}")
        self._model = (model.get_encoder() if model.config.is_encoder_decoder else model).eval().to(device)
        self._tokenizer.padding_side = "right"  # so that the first token is at position 0
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.max_length = longest_input(model.config, max_length)
        self._pooling, self._device, self._batch_size = pooling, device, batch_size

    def describe(self) -> dict:
        """Settings, for the metadata of the index and the key of the cache; weights and tokenizer by their SHA-256."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else repr((self._tokenizer, self._tokenizer.get_vocab()))
        return {
            "pooling": self._pooling,
            "max_length": self.max_length,
            "weights_sha256": weights_sha256(self._model),
            "tokenizer_sha256": hashlib.sha256(rules.encode()).hexdigest(),
        }

    def encode(self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False) -> np.ndarray:
        """(N, H) float32 rows of norm 1. With ``cache_dir``, batches done by an earlier, interrupted run are kept.

        Several processes take the batches in turn; all return all rows, and the main one keeps the cache.
        """
        # Longest first: batches need little padding, and the one that needs most memory fails at once, not at last.
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        width = self._model.config.hidden_size
        vectors = np.empty((len(texts), width), dtype=np.float32)
        cache_dir = cache_dir if distributed.is_main_process() else None
        with EmbeddingCache(cache_dir, key=[self.describe(), texts], shape=vectors.shape) as cache:
            done = len(cache.rows)
            if done < len(texts):
                done -= done % self._batch_size  # whole batches, so that a resumed run computes the same numbers
            done = distributed.broadcast_object(done)
            vectors[order[:done]] = distributed.broadcast_rows(cache.rows[:done], (done, width))
            cache.keep(done)
            with Bar(description="embed", start=done, total=len(texts), shown=progress) as bar:
                for start in range(done, len(texts), self._batch_size * distributed.world_size()):
                    rows = order[start : start + self._batch_size * distributed.world_size()]
                    vectors[rows] = self._embed_shared([texts[row] for row in rows])
                    cache.append(vectors[rows])
                    bar.advance(len(rows))
        return vectors

    def _embed_shared(self, texts: list[str]) -> np.ndarray:
        """(n, H) embeddings of up to a batch per process, in all processes."""
        size, first = self._batch_size, distributed.rank() * self._batch_size
        own = torch.zeros(size, self._model.config.hidden_size)
        if part := texts[first : first + size]:
            own[: len(part)] = self._embed(part).cpu()
        return distributed.gather(own)[: len(texts)].numpy()

    def _embed(self, texts: list[str]) -> Tensor:
        """(n, H) embeddings, on the device."""
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self._device)
        mask = batch["attention_mask"]  # (n, T)
        try:
            with torch.inference_mode():
                hidden = self._model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state  # (n, T, H)
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of memory on {self._device}: lower --batch_size {self._batch_size}") from error
        if self._pooling == "first":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # (n, H)
        if not torch.isfinite(pooled).all():
            raise InputError("text encoder: its embeddings are not finite numbers; the weights are damaged")
        return torch.nn.functional.normalize(pooled, dim=1)


def load_pretrained(folder: Path, model_class: type) -> tuple:
    """Tokeniser, model (float32) and the sorted names of the tensors that the folder lacks, poolers excepted.

    model_class: one of transformers' Auto classes. InputError where the folder cannot be read.
    """
    logging.set_verbosity_error()  # it would report the pooler, which is missing and not wanted
    logging.disable_progress_bar()
    require_regular_folder(folder, "text encoder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        model, report = model_class.from_pretrained(
            folder, **LOCAL, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files surface as whatever their readers raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"text encoder {folder}: cannot be loaded: {reason}") from error
    return tokenizer, model, sorted(name for name in report["missing_keys"] if "pooler." not in name)


def longest_input(config: PretrainedConfig, max_length: int) -> int:
    """``max_length``, or as many tokens as the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa counts positions from 2, so two of the table's rows are out of reach.
    return min(max_length, positions - 2) if positions else max_length


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's tensors and their names, without its pooler."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "pooler." not in name:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()
