"""CheXbert (Smit et al., 2020, arXiv:2004.09167): BERT with one head per observation, from the public checkpoint.

Shapes: B reports of a batch, T word pieces, H hidden units.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError
from modules.runtime.hub import without_requests
from modules.runtime.input_files import load_tensors, require_regular_folder
from modules.runtime.settings import is_local_only

# The order of the heads, and the classes of a head: blank, positive, negative, uncertain.
CONDITIONS = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
VALUES = (np.nan, 1.0, 0.0, -1.0)
_SIZES = [2 if name == "No Finding" else len(VALUES) for name in CONDITIONS]  # that head has blank and positive only
# Unused parts of the checkpoint: the heads read the first token itself, and position ids are recomputed.
_UNUSED = ("bert.pooler.", "bert.embeddings.position_ids")


class Chexbert(nn.Module):
    """The labeler in evaluation mode, on the CPU until it is moved.

    ``path`` is chexbert.pth; ``encoder`` a folder with config.json and vocab.txt of its BERT, or the id of a model on
    the Hugging Face hub, whose two files are downloaded. InputError if either cannot be read or does not fit.
    """

    def __init__(self, path: str, encoder: str = "bert-base-uncased", *, batch_size: int = 32) -> None:
        super().__init__()
        from transformers import BertModel

        weights = _read_weights(path)
        config, self._tokenizer = _read_encoder(encoder)
        self._batch_size, self._max_length = batch_size, config.max_position_embeddings
        try:
            self.bert = BertModel(config, add_pooling_layer=False)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:  # inconsistent sizes
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--chexbert_encoder {encoder}: its config.json is not a BERT's: {reason}") from error
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in _SIZES)
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--chexbert_path {path}: not CheXbert's weights on --chexbert_encoder {encoder}: {reason}"
            ) from error
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Logits of each condition, (B, 4) or (B, 2), of word pieces (B, T) with their mask (B, T)."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, H)
        first = self.dropout(hidden[:, 0])
        return [head(first) for head in self.linear_heads]

    @torch.inference_mode()
    def label(self, reports: Sequence[str]) -> np.ndarray:
        """Return labels (N, 14) float64 in the order of CLASSES: 1, 0, -1, NaN for not mentioned."""
        texts = [" ".join(report.split()) for report in reports]
        labels = np.empty((len(texts), len(CLASSES)))
        columns = [CLASSES.index(name) for name in CONDITIONS]
        device = self.linear_heads[0].weight.device
        # Longest first: batches need little padding, and the largest one shows at once whether memory suffices.
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        with tqdm(total=len(texts), desc="CheXbert", unit="report", leave=False, disable=None) as bar:
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                batch = self._tokenizer(
                    [texts[row] for row in rows],
                    padding=True,
                    truncation=True,
                    max_length=self._max_length,
                    return_tensors="pt",
                ).to(device)
                logits = self(batch["input_ids"], batch["attention_mask"])
                found = torch.stack([head.argmax(dim=1) for head in logits], dim=1)  # (B, 14)
                labels[np.ix_(rows, columns)] = np.array(VALUES)[found.cpu().numpy()]
                bar.update(len(rows))
        return labels


def _read_weights(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise InputError(f"--chexbert_path {path}: no such file; CheXbert's chexbert.pth is needed")
    content = load_tensors(path, "--chexbert_path")
    weights = content.get("model_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping):
        raise InputError(f"--chexbert_path {path}: has no model_state_dict, which CheXbert's checkpoint has")
    if not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout is torch.strided
        for key, value in weights.items()
    ):
        raise InputError(f"--chexbert_path {path}: its model_state_dict does not map names to dense tensors")
    # Saved by DataParallel, which prefixes the names.
    named = {key.removeprefix("module."): value for key, value in weights.items()}
    return {key: value for key, value in named.items() if not key.startswith(_UNUSED)}


def _read_encoder(encoder: str) -> tuple[Any, Any]:
    from transformers import BertConfig, BertTokenizer

    if Path(encoder).is_dir():
        require_regular_folder(encoder, "--chexbert_encoder")
    try:
        with without_requests() if is_local_only(encoder) else contextlib.nullcontext():
            config, tokenizer = (
                kind.from_pretrained(encoder, local_files_only=is_local_only(encoder))
                for kind in (BertConfig, BertTokenizer)
            )
    except Exception as error:  # connection, cache, damaged or missing files: the library raises many kinds
        raise InputError(
            f"--chexbert_encoder {encoder}: its configuration and vocabulary cannot be read ({type(error).__name__}); "
            "give a folder with BERT-base's config.json and vocab.txt, or a hub id where there is a network"
        ) from error
    if len(tokenizer) != config.vocab_size:  # without vocab.txt the library builds a vocabulary of its special tokens
        raise InputError(
            f"--chexbert_encoder {encoder}: its vocab.txt is missing or belongs to another model: {len(tokenizer)} "
            f"words where config.json says {config.vocab_size}"
        )
    return config, tokenizer
