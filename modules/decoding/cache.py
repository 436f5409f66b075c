"""Keys and values of the tokens decoded so far, for several hypotheses per study, without reordering them.

A slot holds the keys and values of one token of one hypothesis. All hypotheses of a study share its slots, and a
mask says which slots are a hypothesis's own past: when beams change places, only that mask is reordered. Slots that
no live beam sees are dropped every COMPACTION_INTERVAL steps, so that a step costs much the same at any position. A GPU
has to be waited for to know how many, and a few more keys cost it nothing: there, only once there are many.

Shapes: B studies, K hypotheses per study, h heads of width w, slots in the order in which they were filled.
"""

import torch
from torch import Tensor

COMPACTION_INTERVAL = 16  # steps between two compactions
SLOTS_ON_A_GPU = 256  # filled ones, below which nothing is dropped there


class KeyValueCache:
    """One decoder layer's keys and values, appended in place to a buffer that is allocated once."""

    buffer: Tensor  # (2, B, h, num_slots, w), from the first ``append`` on

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.filled = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, h, n, w); returns views of all so far, (B, h, slots, w) each."""
        batch, heads, new, width = keys.shape
        if not self.filled:
            self.buffer = keys.new_empty(2, batch, heads, self.num_slots, width)
        start, self.filled = self.filled, self.filled + new
        self.buffer[0, :, :, start : self.filled] = keys
        self.buffer[1, :, :, start : self.filled] = values
        return self.buffer[0, :, :, : self.filled], self.buffer[1, :, :, : self.filled]

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.buffer = self.buffer[:, rows]

    def keep_slots(self, slots: Tensor) -> None:
        """Keep only ``slots`` (B, n), in that order."""
        self.filled = slots.size(1)
        index = slots[None, :, None, :, None].expand(2, -1, self.buffer.size(2), -1, self.buffer.size(4))
        self.buffer[:, :, :, : self.filled] = self.buffer.gather(3, index)


class DecodingCache:
    """The caches of all layers, the mask of every hypothesis's past, and the position of the newest token."""

    visible: Tensor  # (B, K, filled slots) bool, from the first ``advance`` on

    def __init__(self, num_layers: int, num_steps: int, num_hypotheses: int):
        # The first token, begin, is common to all hypotheses and takes one slot.
        num_slots = 1 + (num_steps - 1) * num_hypotheses
        self.layers = [KeyValueCache(num_slots) for _ in range(num_layers)]
        self.position = -1

    def advance(self, tokens: Tensor, parents: Tensor | None) -> Tensor | None:
        """Make room for ``tokens`` (B, K); ``parents`` (B, K) are the hypotheses of the last step that they continue.

        Returns the mask (B, 1, K, slots) for self-attention, or None where nothing needs masking.
        """
        batch, width = tokens.shape
        self.position += 1
        if parents is not None:
            index = parents.unsqueeze(-1).expand(-1, -1, self.visible.size(-1))
            self.visible = self.visible.gather(1, index)
            many = not tokens.is_cuda or self.visible.size(-1) > SLOTS_ON_A_GPU
            if many and self.position % COMPACTION_INTERVAL == 0:
                self.compact()
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.visible = torch.cat([self.visible, own], dim=-1) if self.position else own
        return self.visible.unsqueeze(1) if width > 1 else None

    def compact(self) -> None:
        """Drop slots that no hypothesis sees; studies that use fewer than the most keep some unseen ones."""
        used = self.visible.any(dim=1)  # (B, slots)
        most = int(used.sum(dim=1).max())
        slots = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        self.visible = self.visible.gather(2, slots.unsqueeze(1).expand(-1, self.visible.size(1), -1))
        for layer in self.layers:
            layer.keep_slots(slots)

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.visible = self.visible[rows]
        for layer in self.layers:
            layer.keep(rows)
