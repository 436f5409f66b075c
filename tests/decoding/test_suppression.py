"""A suppressed token is chosen by no search, however likely it is, and the others keep their probabilities."""

import pytest
import torch

from modules.decoding.options import DecodingOptions
from modules.decoding.search import WithoutToken, decode

UNK, WORD = 4, 2


class Likes:
    """Finds token UNK by far the likeliest, then WORD, then the end."""

    def step(self, tokens, parents):
        logits = torch.tensor([1.0, -1.0, 2.0, 0.0, 9.0])
        return logits.log_softmax(0).expand(*tokens.shape, 5)

    def keep(self, rows):
        pass


@pytest.mark.parametrize(
    ("options", "ended"),
    [
        ({}, "lowered"),
        ({"beam_size": 4, "sample_n": 4}, "lowered"),
        ({"beam_size": 4, "group_size": 2, "sample_n": 4}, "lowered"),
        ({"beam_size": 4, "sample_n": 4}, "kept"),
        ({"beam_size": 2, "sample_n": 2}, "removed"),
        ({"sample_method": "greedy"}, "lowered"),
        ({"sample_method": "sample", "sample_n": 50, "temperature": 2.0}, "lowered"),
    ],
)
def test_no_search_chooses_it(options, ended):
    decoding = DecodingOptions(max_seq_length=6, **options)
    free, suppressed = (
        decode(session, 2, torch.device("cpu"), decoding, ended=ended)
        for session in (Likes(), WithoutToken(Likes(), UNK))
    )
    assert (free.tokens == UNK).any() and not (suppressed.tokens == UNK).any()
    assert suppressed.scores[:, 0].isfinite().all()


def test_the_others_keep_their_probabilities():
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    free, suppressed = Likes().step(tokens, None), WithoutToken(Likes(), UNK).step(tokens, None)
    assert torch.equal(free[..., :UNK], suppressed[..., :UNK]) and (suppressed[..., UNK] == -torch.inf).all()
