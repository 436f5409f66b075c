"""What BERT's pretraining hides of a text (Devlin et al., NAACL 2019, Sec. 3.1 and App. A.1).

Shapes: B texts, T tokens of the longest.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED, REPLACED = 0.8, 0.1  # of the chosen words; the rest stay as they are


class WordMasking:
    """Chooses words to be predicted: of each text ``share`` of its words, rounded, and one at least.

    Of those, 80 % become the mask token and 10 % a random word; 10 % stay, so that the encoder cannot tell which words
    it will be asked for. Special tokens, unknown words among them, are neither chosen nor put in.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", share: float):
        self.share, self.mask_id = share, tokenizer.mask_token_id
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        ids = torch.arange(len(tokenizer))
        self._words = ids[~torch.isin(ids, self._special)]

    def words(self, ids: Tensor) -> Tensor:
        """Where ``ids`` has words, bool of its shape; padding is a special token."""
        return ~torch.isin(ids, self._special)

    def __call__(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the encoder reads instead of ``ids`` (B, T), and which positions were chosen, bool (B, T)."""
        words = self.words(ids)
        count = words.sum(1)
        wanted = (self.share * count).round().long().clamp(min=1).minimum(count)  # (B,)
        draw = torch.rand(ids.shape, generator=generator).masked_fill(~words, 2.0)
        rank = draw.argsort(dim=1, stable=True).argsort(1)
        chosen = rank < wanted[:, None]
        fate = torch.rand(ids.shape, generator=generator)
        others = self._words[torch.randint(len(self._words), ids.shape, generator=generator)]
        read = torch.where(chosen & (fate < MASKED), self.mask_id, ids)
        return torch.where(chosen & (fate >= MASKED) & (fate < MASKED + REPLACED), others, read), chosen
