"""Keys and values of the tokens decoded so far, for several hypotheses per study, without reordering them.

A slot holds the keys and values of one token of one hypothesis. All hypotheses of a study share its slots, and a
mask says which slots are a hypothesis's own past: when beams change places, only that mask is reordered. Slots that
no live beam sees are dropped every COMPACTION_INTERVAL steps, so that a step costs much the same at any position. A GPU
has to be waited for to know how many, and a few more keys cost it nothing: there, only once there are many.

A step that is captured as a CUDA graph must have the same shapes each time: from ``fix`` on it computes with all slots,
and its mask hides those that are not filled. Their number is known from the beginning.

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
        self.newest: Tensor | None = None  # (n,) the slots that ``append`` fills, where they are fixed

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, h, n, w); returns views of all so far, (B, h, slots, w) each."""
        batch, heads, new, width = keys.shape
        if self.newest is not None:
            self.buffer[0].index_copy_(2, self.newest, keys.to(self.buffer.dtype))
            self.buffer[1].index_copy_(2, self.newest, values.to(self.buffer.dtype))
            return self.buffer[0], self.buffer[1]
        if not self.filled:
            self.buffer = keys.new_empty(2, batch, heads, self.num_slots, width)
        start, self.filled = self.filled, self.filled + new
        self.buffer[0, :, :, start : self.filled] = keys
        self.buffer[1, :, :, start : self.filled] = values
        return self.buffer[0, :, :, : self.filled], self.buffer[1, :, :, : self.filled]

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        self.buffer = self.buffer[:, rows]

    def fix(self, newest: Tensor) -> None:
        """From now on fill the slots ``newest`` (n,), which its owner changes, and return all slots."""
        self.newest = newest
        self.buffer[:, :, :, self.filled :] = 0  # whatever was there may be no number, and 0 times it none either

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
        self.num_hypotheses = num_hypotheses
        self.position: int | Tensor = -1  # of the newest token; (1,) int64 where it is fixed
        self.newest: Tensor | None = None  # (K,) the slots of the newest tokens, where they are fixed

    @property
    def begins(self) -> bool:
        """Whether the newest token is the first."""
        return isinstance(self.position, int) and self.position == 0

    def advance(self, tokens: Tensor, parents: Tensor | None) -> Tensor | None:
        """Make room for ``tokens`` (B, K); ``parents`` (B, K) are the hypotheses of the last step that they continue.

        Returns the mask (B, 1, K, slots) for self-attention, or None where nothing needs masking.
        """
        batch, width = tokens.shape
        self.position += 1
        if self.newest is not None:
            return self._advance_fixed(self.newest, parents)
        if parents is not None:
            index = parents.unsqueeze(-1).expand(-1, -1, self.visible.size(-1))
            self.visible = self.visible.gather(1, index)
            many = not tokens.is_cuda or self.visible.size(-1) > SLOTS_ON_A_GPU
            if many and self.position % COMPACTION_INTERVAL == 0:
                self.compact()
        own = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        self.visible = torch.cat([self.visible, own], dim=-1) if self.position else own
        return self.visible.unsqueeze(1) if width > 1 else None

    def fix(self) -> None:
        """Called after the first token: from now on every step keeps the shapes and places of its tensors."""
        batch, width, device = len(self.visible), self.num_hypotheses, self.visible.device
        assert self.begins
        num_slots = self.layers[0].num_slots
        self.numbers = torch.arange(num_slots, device=device)
        self.visible = (self.numbers == 0).expand(batch, width, -1).contiguous()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.newest = torch.arange(1 - width, 1, device=device)
        for layer in self.layers:
            layer.fix(self.newest)

    def _advance_fixed(self, newest: Tensor, parents: Tensor | None) -> Tensor:
        newest += self.num_hypotheses
        if parents is not None:
            self.visible.copy_(self.visible.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.visible.size(-1))))
        self.visible |= self.numbers == newest.unsqueeze(1)
        return self.visible.unsqueeze(1)

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
