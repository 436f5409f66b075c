"""Words drawn at random: for each study by numbers of its own, whatever is drawn beside it.

Shapes: B studies, K samples per study, L = max_seq_length, V words.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.runtime.transfers import upload


def study_seed(seed: int, study: str) -> int:
    """A seed for what is drawn for the study of this name, whatever else is drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {study}".encode()).digest()[:8], "little") >> 1


def uniform_numbers(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """(B, *shape) numbers from [0, 1), a study's by its seed alone."""
    drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return upload(torch.stack(drawn), device)


def draw(log_probs: Tensor, options: DecodingOptions, uniform: Tensor | None) -> Tensor:
    """A token (B, K) for each hypothesis from ``log_probs`` (B, K, V+1), at the temperature and from the nucleus.

    It is the one at ``uniform`` (B, K, 1) of the distribution function; None draws from torch's own generator.
    """
    probs = (log_probs / options.temperature).softmax(dim=-1)
    if options.top_p < 1:
        probs = nucleus(probs, options.top_p)
    if uniform is None:
        return probs.flatten(0, 1).multinomial(1).view(probs.shape[:2])
    below = probs.double().cumsum(dim=-1)  # (B, K, V+1)
    return (below <= uniform * below[..., -1:]).sum(dim=-1)


def nucleus(probs: Tensor, share: float) -> Tensor:
    """``probs`` (..., V+1) with 0 outside the fewest likeliest words that together have ``share`` of them.

    Holtzman et al., arXiv 1904.09751; the likeliest word always stays.
    """
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    inside = ranked.double().cumsum(dim=-1) - ranked < share
    inside[..., 0] = True
    return torch.where(torch.zeros_like(inside).scatter(-1, order, inside), probs, 0.0)
