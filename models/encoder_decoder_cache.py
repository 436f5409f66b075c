"""Keys and values of past tokens for transformers' decoders, in memory that is allocated once.

Shapes: R rows, one for each hypothesis, h heads of width w, slots for the tokens of a row in their order.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache, DynamicLayer


class SlotLayer(DynamicLayer):
    """One layer's keys and values; transformers sees those of the filled slots, or of all once they are ``fixed``."""

    def __init__(self, num_slots: int):
        super().__init__()
        self.num_slots, self.filled = num_slots, 0
        self.buffers: list[Tensor] = []  # keys and values, (R, h, num_slots, w) each
        self.newest: Tensor | None = None  # (1,) the slot of the newest token, where it is fixed

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values (R, h, n, w) of new tokens; returns those of all, (R, h, slots, w)."""
        new = (key_states, value_states)
        if self.newest is not None:
            for buffer, part in zip(self.buffers, new, strict=True):
                buffer.index_copy_(2, self.newest, part.to(buffer.dtype))
            return self.buffers[0], self.buffers[1]
        if not self.buffers:
            self.buffers = [part.new_empty(*part.shape[:2], self.num_slots, part.size(3)) for part in new]
            self.is_initialized = True
        start, self.filled = self.filled, self.filled + key_states.size(2)
        for buffer, part in zip(self.buffers, new, strict=True):
            buffer[:, :, start : self.filled] = part
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many slots are filled."""
        return self.filled

    def select(self, rows: Tensor) -> None:
        """Put rows ``rows`` (R,) of the cache, which may have another number, into its place."""
        if self.newest is not None:
            for buffer in self.buffers:
                buffer.copy_(buffer.index_select(0, rows))
            return
        for number, buffer in enumerate(self.buffers):
            kept = buffer[:, :, : self.filled].index_select(0, rows)
            if len(rows) != len(buffer):
                self.buffers[number] = buffer.new_empty(len(rows), *buffer.shape[1:])
            self.buffers[number][:, :, : self.filled] = kept

    def fix(self, newest: Tensor) -> None:
        """From now on fill the slot ``newest`` (1,), which its owner changes, and show all slots."""
        self.newest = newest
        for buffer in self.buffers:
            buffer[:, :, self.filled :] = 0  # whatever was there may be no number


class HypothesisCache:
    """The caches of a decoder of ``num_layers``: tokens in slots and, with cross-attention, the visual tokens'."""

    def __init__(self, num_layers: int, num_slots: int, prefix: bool):
        self.layers = [SlotLayer(num_slots) for _ in range(num_layers)]
        own = Cache(layers=list(self.layers))
        self.looks = None if prefix else DynamicCache()
        self.given: Any = own if self.looks is None else EncoderDecoderCache(own, self.looks)  # what transformers takes

    def reorder(self, rows: Tensor) -> None:
        """Put rows ``rows`` (R,) into place, each from its own study, whose visual tokens they share."""
        for layer in self.layers:
            layer.select(rows)

    def keep(self, rows: Tensor) -> None:
        """Keep, or repeat, rows ``rows`` (R,)."""
        self.reorder(rows)
        if self.looks is not None:
            self.looks.batch_select_indices(rows)

    def fix(self, newest: Tensor) -> None:
        """As in SlotLayer, for every layer; ``newest`` (1,)."""
        for layer in self.layers:
            layer.fix(newest)
