"""Samples, and the batches that they are collated into. B samples, N views, T positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from modules.data.transforms import Transform


def _map_tensors(record, function: Callable[[Tensor], Tensor]):
    """Copy of a dataclass with ``function`` applied to its tensors and to those of the dataclasses in it."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = function(value)
        elif isinstance(value, (Pair, Context)):
            changed[field.name] = _map_tensors(value, function)
    return replace(record, **changed)


@dataclass
class Context:
    """Texts that are known beside the images: ids (B, T) and the kind of each, 0 where there is none."""

    tokens: Tensor
    kinds: Tensor


@dataclass
class Pair:
    """Images and reports that go through a backbone together."""

    # (B, N, 3, H, W) uint8 as loaded, float32 normalised after Batch.to; or stored features (B, N, S, C) float32.
    # Absent views are zero. With images of the study before, these are the second half of the views.
    images: Tensor
    view_mask: Tensor | None  # (B, N) bool, True = view present; None: every view is
    tokens: Tensor  # (B, T) int64: begin, words, end, then zeros; cut to max_seq_length, so a long report has no end
    token_mask: Tensor  # (B, T) bool, True = kept position, begin and end included
    labels: Tensor | None = None  # (B, 14) float32
    context: Context | None = None


@dataclass
class Batch:
    """B samples; ``negative`` holds the hard-negative image and report of every row."""

    positive: Pair
    negative: Pair | None  # None: the data set has no negatives
    has_negative: Tensor | None  # (B,) bool; rows without a negative repeat their positive and are left out of losses
    sample_index: Tensor  # (B,) int64, row of the sample in its data set, the same in every epoch
    report_key: Tensor  # (B,) int64, equal for the same cleaned text and for the same study
    ids: list[str]  # "<record id>", or "<record id>#<view>" where every image is a sample
    reports: list[str]  # as in the annotation
    replaced: int = 0  # samples of this batch that replace unreadable ones
    transform: Transform | None = None  # the images', for their normalisation
    negative_key: Tensor | None = None  # (B,) int64, the hard negatives' report_key

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch on ``device``, where images are normalised if they are uint8 still.

        The view masks stay on the CPU: each step asks whether every view is present, and must not wait for a GPU.
        """
        batch = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        for own, pair in ((self.positive, batch.positive), (self.negative, batch.negative)):
            if pair is None:
                continue
            if pair.images.dtype == torch.uint8:
                pair.images = self.transform.normalise(pair.images, pair.view_mask)
            pair.view_mask = own.view_mask
        return batch

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; the loader calls it."""
        return _map_tensors(self, Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All its tensors, in the same order for batches with the same parts."""
        found: list[Tensor] = []
        _map_tensors(self, found.append)  # type: ignore[arg-type]
        return found

    def with_tensors(self, values: Sequence[Tensor]) -> "Batch":
        """The batch with other tensors, of any shapes, in the order of ``tensors``."""
        left = iter(values)
        return _map_tensors(self, lambda _: next(left))

    def lengthened(self, multiple: int) -> "Batch":
        """The batch with reports (B, T) of one length on both sides, a multiple, unless ``multiple`` is 1."""
        pairs = {name: pair for name in ("positive", "negative") if (pair := getattr(self, name)) is not None}
        width = max(pair.tokens.shape[1] for pair in pairs.values())
        return (
            self
            if multiple == 1
            else replace(
                self,
                **{
                    name: replace(
                        pair,
                        **{
                            part: F.pad(value, (0, width + -width % multiple - value.shape[1]))
                            for part in ("tokens", "token_mask")
                            if (value := getattr(pair, part)) is not None
                        },
                    )
                    for name, pair in pairs.items()
                },
            )
        )

    def without_masks(self) -> "Batch | None":
        """The batch without masks of its views; None where a view is missing."""
        pairs = {name: pair for name in ("positive", "negative") if (pair := getattr(self, name)) is not None}
        if not all(pair.view_mask is None or bool(pair.view_mask.all()) for pair in pairs.values()):
            return None
        return replace(self, **{name: replace(pair, view_mask=None) for name, pair in pairs.items()})


@dataclass
class SamplePair:
    """One row of a Pair: images (N, 3, H, W) uint8, view_mask (N,), tokens (T,), labels (14,) or None; the ids of its
    texts of context and their kinds, or None.
    """

    images: Tensor
    view_mask: Tensor
    tokens: Tensor
    labels: Tensor | None
    context: tuple[list[int], list[int]] | None = None


@dataclass
class Sample:
    """One row of a Batch."""

    positive: SamplePair
    negative: SamplePair | None
    has_negative: bool
    sample_index: int
    report_key: int
    id: str
    report: str
    transform: Transform
    replaced: bool = False
    negative_key: int = 0  # of the sample itself, where it has no negative


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; each side's tokens are padded with 0 to its own longest report."""
    has_negatives = samples[0].negative is not None
    return Batch(
        positive=_stack([sample.positive for sample in samples]),
        negative=_stack([sample.negative for sample in samples]) if has_negatives else None,
        has_negative=torch.tensor([sample.has_negative for sample in samples]) if has_negatives else None,
        sample_index=torch.tensor([sample.sample_index for sample in samples]),
        report_key=torch.tensor([sample.report_key for sample in samples]),
        ids=[sample.id for sample in samples],
        reports=[sample.report for sample in samples],
        replaced=sum(sample.replaced for sample in samples),
        transform=samples[0].transform,
        negative_key=torch.tensor([sample.negative_key for sample in samples]) if has_negatives else None,
    )


def _stack(pairs: Sequence[SamplePair]) -> Pair:
    lengths = torch.tensor([len(pair.tokens) for pair in pairs])
    tokens = pad_sequence([pair.tokens for pair in pairs], batch_first=True)  # (B, T)
    return Pair(
        images=torch.stack([pair.images for pair in pairs]),
        view_mask=torch.stack([pair.view_mask for pair in pairs]),
        tokens=tokens,
        # By length, not by id > 0: begin and end are 0 as padding is, and count.
        token_mask=torch.arange(tokens.shape[1]) < lengths[:, None],
        labels=None if pairs[0].labels is None else torch.stack([pair.labels for pair in pairs]),
        context=stack_contexts([pair.context for pair in pairs]),
    )


def stack_contexts(found: Sequence[tuple[Sequence[int], Sequence[int]] | None]) -> Context | None:
    """The texts of B studies, each ids and the kind of each, as one Context; None where the first is."""
    if found[0] is None:
        return None
    width = max(1, *(len(ids) for ids, _ in found))  # one at least, so that every batch trains what reads it
    tokens, kinds = (torch.zeros(len(found), width, dtype=torch.long) for _ in range(2))
    for row, (ids, own) in enumerate(found):
        tokens[row, : len(ids)], kinds[row, : len(own)] = torch.tensor(ids), torch.tensor(own)
    return Context(tokens, kinds)
