"""Strategies that synthesise a harder negative report (ITHN, arXiv 2305.07176, Sec. 3.4).

Every strategy is ``f(image, report, negative, hardness) -> harder negative``: image z, report u and negative report
u- are (B, D), hardness is the lambda of the paper in [0, 1], and the result is (B, D) in float32 (float64 for float64).
``negative`` is the point the step starts from: the prior hard negative u-, or the harder negative of the previous
epoch. The result is not renormalised, and gradients flow through it: the caller decides whether to cut them.

The hinge of the triplet loss (Eq. 4) max(|z-u|^2 - |z-u~|^2 + m, 0) is taken as active, so its gradient in u~ is
2(z - u~), and one ascent step of size lambda/2 leads from u~ towards z.
"""

import torch
from torch import Tensor, nn

EPS = 1e-6


def _at_least_float32(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def project(image: Tensor, report: Tensor, negative: Tensor, clamp_segment: bool = False) -> Tensor:
    """Eq. 6: the point p of the line through u~ and u that is nearest to z, per sample, (B, D).

    p = u~ + t (u - u~) with t = <z - u~, u - u~> / |u - u~|^2; where |u - u~|^2 < 1e-6 there is no line and p = u~.
    ``clamp_segment`` keeps t in [0, 1], so that p stays between u~ and u.
    """
    image, report, negative = _at_least_float32(image, report, negative)
    line = report - negative
    squared_length = (line * line).sum(-1, keepdim=True)  # (B, 1)
    along = ((image - negative) * line).sum(-1, keepdim=True)
    has_line = squared_length >= EPS
    # The safe denominator is inside: a `where` on p alone gives a finite value and a NaN gradient.
    t = torch.where(has_line, along / torch.where(has_line, squared_length, 1.0), 0.0)
    if clamp_segment:
        t = t.clamp(0, 1)
    return negative + t * line


def ithn(image: Tensor, report: Tensor, negative: Tensor, hardness: float, clamp_segment: bool = False) -> Tensor:
    """Eq. 7: (1 - lambda) u~ + lambda p, the projected gradient step of Eq. 5; p is that of ``project``."""
    image, report, negative = _at_least_float32(image, report, negative)
    p = project(image, report, negative, clamp_segment)
    return (1 - hardness) * negative + hardness * p


def unconstrained(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """The step of Eq. 5 without the projection, (1 - lambda) u~ + lambda z: the ablation of Sec. 3.4."""
    image, negative = _at_least_float32(image, negative)
    return (1 - hardness) * negative + hardness * image


def mochi(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """Eq. 2: (1 - lambda) u- + lambda u, the mixing of MoCHi; u- belongs to one of the k nearest neighbours."""
    report, negative = _at_least_float32(report, negative)
    return (1 - hardness) * negative + hardness * report


def prior(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """u- itself: the ablation without synthesis."""
    return _at_least_float32(negative)[0]


def released(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """The released code's projection, which mixes the batch: p_i = u-_i + sum_j <z_i - u-_i, b_j> b_j / |b_j|.

    b_j = u_j - u-_j, only one of the two factors has unit length; the step is that of Eq. 7.
    """
    image, report, negative = _at_least_float32(image, report, negative)
    lines = report - negative
    unit_lines = torch.nn.functional.normalize(lines, dim=-1, eps=1e-12)
    p = negative + ((image - negative) @ lines.T) @ unit_lines
    return (1 - hardness) * negative + hardness * p


STRATEGIES = {"ithn": ithn, "unconstrained": unconstrained, "mochi": mochi, "prior": prior, "released": released}


class PreviousEpoch(nn.Module):
    """Keeps the harder negative of every training sample from one epoch to the next, (N, D) float32.

    The buffers are part of the state dict, so that a checkpoint has them. N = 270,000 with D = 512 is 550 MB.
    """

    def __init__(self, n_samples: int, dim: int):
        super().__init__()
        self.register_buffer("harder", torch.zeros(n_samples, dim))
        self.register_buffer("known", torch.zeros(n_samples, dtype=torch.bool))

    # The compiled backward pass would read the buffers anew, after ``keep`` has written to them (torch 2.15).
    @torch.compiler.disable
    def start(self, index: Tensor, negative: Tensor) -> Tensor:
        """Where the synthesis of samples ``index`` (B,) begins: the kept vector, else ``negative`` (B, D)."""
        return torch.where(self.known[index].unsqueeze(1), self.harder[index].to(negative.dtype), negative)

    @torch.compiler.disable
    @torch.no_grad()
    def keep(self, index: Tensor, harder: Tensor, rows: Tensor | None = None) -> None:
        """Store ``harder`` (B, D) of samples ``index``, but for non-finite vectors and for samples not in ``rows``."""
        good = harder.isfinite().all(1)
        if rows is not None:
            good = good & rows
        self.harder[index] = torch.where(good.unsqueeze(1), harder.float(), self.harder[index])
        self.known[index] = good | self.known[index]
