"""The memory of the previous epoch's harder negatives, from which the next synthesis can start (Sec. 3.4)."""

import torch
from torch import Tensor, nn


class PreviousEpoch(nn.Module):
    """Keeps the harder negative of every training sample from one epoch to the next, (N, D) float32.

    The buffers are part of the state dict, so that checkpoints contain them. N = 270,000 with D = 512 is 550 MB.
    """

    harder: Tensor  # (N, D)
    known: Tensor  # (N,) bool

    def __init__(self, n_samples: int, dim: int):
        super().__init__()
        self.register_buffer("harder", torch.zeros(n_samples, dim))
        self.register_buffer("known", torch.zeros(n_samples, dtype=torch.bool))

    # The compiled backward pass would read the buffers again, after ``keep`` has written to them (torch 2.15).
    @torch.compiler.disable
    def start(self, index: Tensor, negative: Tensor) -> Tensor:
        """Where the synthesis of samples ``index`` (B,) starts, (B, D): the stored vector, else ``negative`` (B, D)."""
        return torch.where(self.known[index].unsqueeze(1), self.harder[index].to(negative.dtype), negative)

    @torch.compiler.disable
    @torch.no_grad()
    def keep(self, index: Tensor, harder: Tensor, rows: Tensor | None = None) -> None:
        """Store ``harder`` (B, D) of samples ``index`` (B,), except non-finite vectors and samples not in ``rows``."""
        good = harder.isfinite().all(1)
        if rows is not None:
            good = good & rows
        self.harder[index] = torch.where(good.unsqueeze(1), harder.float(), self.harder[index])
        self.known[index] = good | self.known[index]
