"""MoCHi as published (Kalantidis et al., NeurIPS 2020, arXiv 2010.01028): mixtures of the hardest negatives of a queue.

B samples, Q queued samples, E the joint embedding, k hardest negatives of an anchor.
"""

import math

import torch
from torch import Tensor, nn

from modules.ithn.losses import FurtherColumns, clip_scores, equal_rows, normalise

# Steps of Weyl sequences, which stand in for random numbers: the same in all processes and after a resumption, without
# a wait for the device. Fractional parts of square roots of primes have no common rhythm.
_STEPS = tuple(prime**0.5 % 1 for prime in (2, 3, 5, 7, 11, 13))


class NegativeQueue(nn.Module):
    """The latest Q samples' features and, for each anchor, mixtures of the k hardest of them.

    The buffers are part of the state dict, so that checkpoints contain them.
    """

    images: Tensor  # (Q, E)
    reports: Tensor  # (Q, E)
    keys: Tensor  # (Q,) int64, equal for the same text and for the same study
    labels: Tensor  # (Q, L), only where samples of the same labels count differently
    known: Tensor  # (Q,) bool
    steps: Tensor  # () int64, how often ``further`` was asked

    def __init__(self, size: int, hardest: int, dim: int, labels: int = 0):
        super().__init__()
        self.hardest = hardest
        self.register_buffer("images", torch.zeros(size, dim))
        self.register_buffer("reports", torch.zeros(size, dim))
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        if labels:
            self.register_buffer("labels", torch.zeros(size, labels))
        self.register_buffer("known", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def further(
        self,
        image: Tensor,
        report: Tensor,
        keys: Tensor,
        scale: Tensor,
        labels: Tensor | None = None,
        same_label_weight: float = 1.0,
    ) -> FurtherColumns:
        """Q + k + k/8 negatives for each of B anchors: the queue, mixtures of two hard ones, of one with the anchor.

        ``image`` and ``report`` (B, E) of unit length, ``keys`` (B,); samples with the anchor's key are no negatives of
        it. Those with its ``labels`` (B, L) count ``same_label_weight`` times; mixtures, which have no labels, count
        once, but are not made of what counts 0 times. Mixtures are constants of unit length.
        """
        allowed = self.known & (self.keys != keys.unsqueeze(1))  # (B, Q)
        log_weights: Tensor | float = 0.0
        if labels is not None:
            alike = equal_rows(labels, self.labels)  # (B, Q)
            if same_label_weight:
                log_weights = alike.to(image.dtype) * math.log(same_label_weight)
            else:
                allowed = allowed & ~alike
        pair, own = self._draw(len(image), self.hardest), self._draw(len(image), max(1, self.hardest // 8), first=3)
        enough = allowed.sum(1, keepdim=True)  # the hardest come first, so that those beyond are no negatives
        valid = [(pair[0] < enough) & (pair[1] < enough), own[0] < enough]
        columns = []
        # ``keep`` overwrites the buffers before the backward pass reads them.
        for anchor, queue in ((image, self.reports.clone()), (report, self.images.clone())):
            mixtures = self._mixtures(anchor.detach(), queue, allowed, pair, own)  # (B, k + k/8, E)
            mixed = scale * torch.einsum("be,bme->bm", anchor, mixtures)
            columns.append(torch.cat([clip_scores(anchor, queue, scale) + log_weights, mixed], dim=1))
        return FurtherColumns(columns[0], columns[1], torch.cat([allowed, *valid], dim=1))

    @torch.no_grad()
    def _mixtures(self, anchor: Tensor, queue: Tensor, allowed: Tensor, pair: tuple, own: tuple) -> Tensor:
        similarity = (anchor @ queue.T).masked_fill(~allowed, -torch.inf)
        order = similarity.topk(min(self.hardest, len(queue)), dim=1).indices  # (B, k)
        first, second, other = (queue[order.gather(1, row)] for row in (pair[0], pair[1], own[0]))
        share, own_share = (part[2].to(anchor.dtype).unsqueeze(-1) for part in (pair, own))
        own_share = own_share / 2  # the anchor's is below one half
        of_two = share * first + (1 - share) * second
        with_anchor = own_share * anchor.unsqueeze(1) + (1 - own_share) * other
        return normalise(torch.cat([of_two, with_anchor], dim=1))

    def _draw(self, rows: int, count: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, count) each: two ranks among the hardest, int64, and a share in [0, 1), float64."""
        places = torch.arange(rows * count, device=self.keys.device) + self.steps * rows * count + 1
        parts = [(places.double() * step % 1).view(rows, count) for step in _STEPS[first : first + 3]]
        ranks = [(part * min(self.hardest, len(self.keys))).long() for part in parts[:2]]
        return ranks[0], ranks[1], parts[2]

    @torch.no_grad()
    def keep(self, image: Tensor, report: Tensor, keys: Tensor, labels: Tensor | None = None) -> None:
        """Replace the oldest samples by these: features (B, E), keys (B,) and labels (B, L).

        A sample whose features are not finite, in a step that is going to be left out, is no negative of later ones.
        """
        rows = min(len(image), len(self.keys))
        finite = (image.isfinite().all(1) & report.isfinite().all(1))[:rows]
        # Zeros in its place: what is masked still has a gradient of 0 times its features.
        image, report = (torch.where(finite.unsqueeze(1), new[:rows], 0.0) for new in (image, report))
        held = {"images": image, "reports": report, "keys": keys, "known": finite}
        for name, new in (held if labels is None else held | {"labels": labels}).items():
            queue = getattr(self, name)
            queue.copy_(torch.cat([new[:rows].to(queue.dtype), queue[:-rows]]))
        self.steps.add_(1)
