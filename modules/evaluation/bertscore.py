"""BERTScore (Zhang et al., 2020, arXiv:1904.09675) with an encoder from a local folder.

No idf weights and no rescaling with a baseline: figures of the published tool with either of them are not comparable.

Shapes: B pairs of a batch, L word pieces of a hypothesis, M of a reference, H hidden units.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular_folder

NAMES = ("BERTScore_precision", "BERTScore_recall", "BERTScore_f1")
# The published tool's default layers, whose scores agree best with human judgement, by architecture and depth.
BEST_LAYERS = {
    ("bert", 12): 9,
    ("bert", 24): 18,
    ("roberta", 6): 5,
    ("roberta", 12): 10,
    ("roberta", 24): 17,
    ("distilbert", 6): 5,
}


class BertScore:
    """Scorer in evaluation mode, on the CPU until ``to`` moves it.

    ``path`` is a folder with a transformers encoder and its tokeniser; ``layer`` is the hidden layer compared, 0
    for the one in BEST_LAYERS. InputError where the folder cannot be read, or BEST_LAYERS has no such architecture.
    """

    def __init__(self, path: str, layer: int = 0, *, batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (Path(path) / "config.json").is_file():
            raise InputError(
                f"--bertscore_path {path}: a folder with an encoder's config.json, weights and tokeniser is needed"
            )
        require_regular_folder(path, "--bertscore_path")
        try:
            # Left out, transformers would ask about trust_remote_code in the terminal.
            options = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(path, **options)
            self._model, report = AutoModel.from_pretrained(
                path, **options, weights_only=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # damaged files surface as whatever their readers raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"--bertscore_path {path}: cannot be loaded: {reason}") from error
        missing = [name for name in report["missing_keys"] if "pooler." not in name]
        if missing:
            raise InputError(f"--bertscore_path {path}: its weights lack {len(missing)} tensors, such as {missing[0]}")
        self._model.eval()
        config = self._model.config
        depth = config.num_hidden_layers
        self.layer = layer or BEST_LAYERS.get((config.model_type, depth), 0)
        if not 1 <= self.layer <= depth:
            raise InputError(
                f"--bertscore_layer {layer}: {path} is a {config.model_type} of {depth} layers; name one "
                f"of 1 to {depth}"
            )
        # RoBERTa counts positions from 2; byte-level tokenisers see the first word as one within a sentence.
        self._max_length = min(self._tokenizer.model_max_length, config.max_position_embeddings - 2)
        self._prefix = " " if "roberta" in config.model_type else ""
        self._batch_size = batch_size

    def to(self, device: torch.device | str) -> "BertScore":
        """Move the encoder to ``device``; returns itself."""
        self._model.to(device)
        return self

    @torch.inference_mode()
    def score(self, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, np.ndarray]:
        """Precision, recall and F1 of N pairs by NAMES, (N, 1) float64 each; 0 where a text is empty."""
        order = sorted(range(len(references)), key=lambda row: -len(references[row]) - len(hypotheses[row]))
        scores = np.zeros((len(references), 3))
        with tqdm(total=len(order), desc="BERTScore", unit="report", leave=False, disable=None) as bar:
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                found = greedy_match(
                    *self._embed([hypotheses[row] for row in rows]), *self._embed([references[row] for row in rows])
                )
                scores[rows] = found.double().cpu().numpy()
                bar.update(len(rows))
        return {name: scores[:, [column]] for column, name in enumerate(NAMES)}

    def _embed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors (B, L, H); masks (B, L) of all word pieces, and of those that are not special tokens."""
        texts = [self._prefix + text.strip() if text.strip() else "" for text in texts]
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_special_tokens_mask=True,
            return_tensors="pt",
        ).to(self._model.device)
        special = batch.pop("special_tokens_mask").bool()
        hidden = self._model(**batch, output_hidden_states=True).hidden_states[self.layer]
        seen = batch["attention_mask"].bool()
        return torch.nn.functional.normalize(hidden, dim=-1), seen, seen & ~special


def greedy_match(
    hypothesis: Tensor,
    seen: Tensor,
    counted: Tensor,
    reference: Tensor,
    reference_seen: Tensor,
    reference_counted: Tensor,
) -> Tensor:
    """Precision, recall and F1 (B, 3) of unit vectors (B, L, H) and (B, M, H): every piece is matched with its nearest.

    The masks are (B, L) and (B, M). Special tokens can be matched (``seen``) but are not averaged over (``counted``),
    as in the published tool.
    """
    cosine = hypothesis @ reference.transpose(1, 2)  # (B, L, M)
    cosine = cosine.masked_fill(~(seen.unsqueeze(2) & reference_seen.unsqueeze(1)), -1.0)
    precision = _mean(cosine.amax(2), counted)
    recall = _mean(cosine.amax(1), reference_counted)
    both = torch.stack([precision, recall, 2 * precision * recall / (precision + recall)], dim=1)
    empty = ~counted.any(1) | ~reference_counted.any(1)
    return both.masked_fill(empty.unsqueeze(1), 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
