"""Steps of fixed shape, as a CUDA graph replays them: the same reports as steps that grow.

A recording stands for the graph. It keeps the operations of one step with their arguments as they were, tensors by
place and everything else by value, and only repeats them: what Python counted or allocated anew would show.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.host_cases import PATCHES, GivenFeatures, build_backbone
from models import MODELS
from models.base import VisualFeatures
from modules.decoding.capture import MOST_FIXED, FixedStep
from modules.decoding.options import DecodingOptions
from modules.decoding.search import BeamSearch, Search

GROWING = Search.run
SEARCHES = {
    "beams": {"beam_size": 3, "sample_n": 3},
    "diverse beams": {"beam_size": 4, "group_size": 2, "sample_n": 4},
    "guided beams": {"beam_size": 2, "guidance": 0.5},
    "beams with rules": {
        "beam_size": 3,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_length": 4,
        "length_penalty": 0.7,
        "block_trigrams": 2,
    },
    "greedy": {"sample_method": "greedy"},
    "sampled": {"sample_method": "sample", "sample_n": 2, "top_p": 0.9},
}


class Recording(TorchDispatchMode):
    """The operations of a function, to be repeated."""

    def __init__(self):
        super().__init__()
        self.calls, self.repeated = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found

    def repeat(self):
        self.repeated += 1
        made = {}

        def now(value):
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for function, args, kwargs, found in self.calls:
            again = function(*tree_map(now, args), **tree_map(now, kwargs))
            for before, after in zip(tree_flatten(found)[0], tree_flatten(again)[0], strict=True):
                made[id(before)] = after


@pytest.fixture
def recordings(monkeypatch):
    """Has searches capture their steps by recordings, which are listed."""
    made = []

    def record(step):
        state = [(place, place.clone()) for place in torch_places(step)]
        made.append(Recording())
        with made[-1]:
            step()
        for place, before in state:  # capturing runs nothing
            if not torch.equal(place, before):
                place.copy_(before)
        return made[-1].repeat

    run = Search.run
    capture = functools.partial(FixedStep.of, capture=record)
    monkeypatch.setattr(Search, "run", lambda self, session: run(self, session, capture))
    return made


def torch_places(step):
    """Every tensor that a step of search and session can change."""
    found, seen, stack = [], set(), [step.__self__]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, torch.nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
        elif hasattr(value, "__dict__"):
            stack += vars(value).values()
    return found


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_repeated_steps_find_what_growing_steps_do(name, recordings, monkeypatch):
    torch.manual_seed(0)
    small = {"num_layers": 1, **({"gpt2_layers": 2} if name == "visualgpt" else {})}
    backbone = build_backbone(name, GivenFeatures(), **small).eval()
    for parameter in backbone.parameters():
        parameter.mul_(3)  # reports that differ, and end
    patches = torch.randn(4, 2 * PATCHES, 2048)
    there = torch.ones(4, 2 * PATCHES, dtype=torch.bool)
    there[1, PATCHES:] = False
    features = VisualFeatures(patches, there, patches.mean(1))
    backbone.mean_patches, backbone.unk_id = patches.mean(0), 7
    for options in SEARCHES.values():
        decoding = DecodingOptions(max_seq_length=14, **options)
        seeds = {"seeds": [3, 1, 4, 1]} if "sample_method" in options else {}
        before = len(recordings)
        found = backbone.search(None, features=features, decoding=decoding, **seeds)
        assert len(recordings) == before + 1 and all(one.repeated for one in recordings)
        with monkeypatch.context() as plainly:
            plainly.setattr(Search, "run", GROWING)
            wanted = backbone.search(None, features=features, decoding=decoding, **seeds)
        assert torch.equal(found.tokens, wanted.tokens)
        torch.testing.assert_close(found.log_probs, wanted.log_probs, atol=1e-4, rtol=1e-4)
        assert len(wanted.tokens[:, 0].unique(dim=0)) > 1


def test_what_draws_from_torchs_generator_is_not_captured(recordings):
    backbone = build_backbone("r2gencmn", GivenFeatures(), num_layers=1).eval()
    features = VisualFeatures(torch.randn(2, PATCHES, 2048), None, torch.randn(2, 2048))
    decoding = DecodingOptions(max_seq_length=6, sample_method="sample")
    backbone.search(None, features=features, decoding=decoding)
    assert not recordings
    for length, fits in ((60, True), (MOST_FIXED, False)):
        long = BeamSearch(1, torch.device("cpu"), DecodingOptions(max_seq_length=length))
        session = backbone.session(features, None, long.options)
        session.step(long.newest, None)
        assert (FixedStep.of(long, session) is not None) == fits
