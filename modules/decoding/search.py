"""Search for reports, token by token: the one entry to beam search, greedy choice and sampling."""

from collections.abc import Sequence

import torch

from modules.decoding.beams import BeamSearch
from modules.decoding.loop import Decoded
from modules.decoding.options import DecodingOptions
from modules.decoding.sampling import Sampling
from modules.decoding.session import DecodingSession


def decode(
    session: DecodingSession,
    batch_size: int,
    device: torch.device,
    options: DecodingOptions,
    *,
    ended: str = "lowered",
    seeds: Sequence[int] | None = None,
) -> Decoded:
    """Run the search that ``options`` name for ``batch_size`` studies.

    ``ended`` says what becomes of beams that end (modules.decoding.beams); ``seeds`` decide what is drawn for each
    study, None: torch's generator does.
    """
    if options.sample_method == "beam_search":
        return BeamSearch(batch_size, device, options, ended).run(session)
    return Sampling(batch_size, device, options, seeds).run(session)
