"""Searches on a made-up language model, against plain versions of their rules written with lists."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from modules.decoding.options import DecodingOptions
from modules.decoding.rules import penalise_trigrams
from modules.decoding.search import decode

torch.set_num_threads(1)
CPU = torch.device("cpu")
NUM_IDS = 6


class Language:
    """Log-probabilities that depend on the study and on the whole history; ``end`` raises the logit of id 0."""

    def __init__(self, seed: int, studies: int, end: float = 0.0):
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(NUM_IDS, 8, generator=generator)
        self.output = torch.randn(studies, 8, NUM_IDS, generator=generator)
        self.end = end * torch.eye(NUM_IDS)[0]

    def log_probs(self, study: int, history: list[int]) -> Tensor:
        """After begin and ``history``."""
        state = torch.zeros(8)
        for token in [0, *history]:
            state = torch.tanh(0.7 * state + self.embedding[token])
        return (state @ self.output[study] * 1.5 + self.end).log_softmax(-1)


class Session:
    """The language behind the interface that backbones offer; counts what is asked of it."""

    def __init__(self, language: Language, studies: int):
        self.language = language
        self.studies = list(range(studies))
        self.histories: list[list[list[int]]] = []
        self.steps = self.rows = 0

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        self.steps += 1
        self.rows += tokens.numel()
        if not self.histories:
            self.histories = [[[]] for _ in self.studies]
        else:
            parents = torch.arange(tokens.size(1)).expand_as(tokens) if parents is None else parents
            self.histories = [
                [past[parent] + [token] for parent, token in zip(*row, strict=True)]
                for past, *row in zip(self.histories, parents.tolist(), tokens.tolist(), strict=True)
            ]
        return torch.stack(
            [
                torch.stack([self.language.log_probs(study, history) for history in histories])
                for study, histories in zip(self.studies, self.histories, strict=True)
            ]
        )

    def keep(self, rows: Tensor) -> None:
        self.studies = [self.studies[row] for row in rows.tolist()]
        self.histories = [self.histories[row] for row in rows.tolist()]


def plain_beam_search(language: Language, study: int, beams: int, length: int) -> list[tuple[float, list[int]]]:
    """The published rules: all steps, ended beams noted and lowered by 1000, all noted at the last step."""
    live = [(torch.tensor(0.0), [])]
    noted = []
    for step in range(length):
        candidates = []
        for score, history in live:
            log_probs = language.log_probs(study, history)
            candidates += [(score + log_probs[token], [*history, token]) for token in range(NUM_IDS)]
        live = sorted(candidates, key=lambda candidate: -candidate[0])[:beams]
        for number, (score, history) in enumerate(live):
            if history[-1] == 0 or step == length - 1:
                noted.append((score.item(), history))
            if history[-1] == 0:
                live[number] = (score - 1000, history)
    return sorted(noted, key=lambda candidate: -candidate[0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beam_search_equals_the_plain_rules(seed, beams):
    studies, length = 5, 8
    language = Language(seed, studies, end=0.5 * seed - 1)
    options = DecodingOptions(beam_size=beams, max_seq_length=length, sample_n=beams)
    found = decode(Session(language, studies), studies, CPU, options)
    for study in range(studies):
        for rank, (score, history) in enumerate(plain_beam_search(language, study, beams, length)[:beams]):
            assert found.scores[study, rank].item() == pytest.approx(score, abs=1e-3 if score < -900 else 1e-5)
            assert found.tokens[study, rank].tolist() == history + [0] * (length - len(history))


def test_beam_search_stops_early_with_the_same_answer():
    language, length = Language(3, 5, end=3.0), 30
    session = Session(language, 5)
    found = decode(session, 5, CPU, DecodingOptions(max_seq_length=length))
    assert session.steps < length / 2
    assert session.rows < session.steps * 5 * 3  # finished studies left the batch
    for study in range(5):
        history = plain_beam_search(language, study, 3, length)[0][1]
        assert found.tokens[study, 0, : len(history)].tolist() == history


def test_answers_do_not_depend_on_the_batch():
    language = Language(5, 4, end=1.0)
    options = DecodingOptions(max_seq_length=12)
    together = decode(Session(language, 4), 4, CPU, options).tokens
    for study in range(4):
        alone = Session(language, 4)
        alone.studies = [study]
        assert torch.equal(decode(alone, 1, CPU, options).tokens[0], together[study])


def test_token_log_probs_sum_to_the_score():
    found = decode(Session(Language(1, 3, end=1.0), 3), 3, CPU, DecodingOptions(max_seq_length=9, sample_n=2))
    ended = found.scores > -900
    torch.testing.assert_close(found.log_probs.sum(-1)[ended], found.scores[ended])


def plain_greedy(language: Language, study: int, length: int, block_trigrams: bool) -> list[int]:
    history = []
    while len(history) < length and 0 not in history:
        scores = language.log_probs(study, history).tolist()
        if block_trigrams and len(history) >= 3:
            for start in range(len(history) - 2):
                if history[start : start + 2] == history[-2:]:
                    scores[history[start + 2]] -= 2 * 0.693
        history.append(scores.index(max(scores)))
    return history + [0] * (length - len(history))


@pytest.mark.parametrize("block_trigrams", [False, True])
def test_greedy_equals_the_plain_rules(block_trigrams):
    language, length = Language(2, 8, end=-4.0), 25
    options = DecodingOptions(sample_method="greedy", max_seq_length=length, block_trigrams=block_trigrams)
    found = decode(Session(language, 8), 8, CPU, options)
    expected = [plain_greedy(language, study, length, block_trigrams) for study in range(8)]
    assert found.tokens[:, 0].tolist() == expected


def test_trigrams_are_penalised_once_per_occurrence():
    tokens = torch.tensor([[[1, 2, 3, 1, 2, 3, 1, 2, 5, 1, 2]]])  # after (1, 2) came 3 twice and 5 once
    penalty = penalise_trigrams(torch.zeros(1, 1, 6), tokens, torch.tensor([11]))
    torch.testing.assert_close(penalty, torch.tensor([[[0, 0, 0, -4 * 0.693, 0, -2 * 0.693]]]))


def test_sampling_follows_the_distribution_and_the_temperature():
    language = Language(4, 1)
    for temperature in (1.0, 2.0):
        torch.manual_seed(0)
        options = DecodingOptions(sample_method="sample", sample_n=4000, max_seq_length=3, temperature=temperature)
        found = decode(Session(language, 1), 1, CPU, options)
        counts = Counter(found.tokens[:, :, 0].flatten().tolist())
        expected = (language.log_probs(0, []) / temperature).softmax(-1)
        for token in range(NUM_IDS):
            assert counts[token] / 4000 == pytest.approx(expected[token].item(), abs=0.03)


def test_samples_come_best_first_and_end_once():
    torch.manual_seed(0)
    options = DecodingOptions(sample_method="sample", sample_n=6, max_seq_length=10, block_trigrams=False)
    language = Language(7, 3, end=1.0)
    found = decode(Session(language, 3), 3, CPU, options)
    assert (found.scores.diff(dim=1) <= 0).all()
    assert len({tuple(row) for row in found.tokens[0].tolist()}) > 1
    for study, sample in itertools.product(range(3), range(6)):
        tokens = found.tokens[study, sample].tolist()
        end = tokens.index(0) if 0 in tokens else len(tokens)
        assert not any(tokens[end:])
        steps = range(min(end + 1, len(tokens)))
        score = sum(language.log_probs(study, tokens[:step])[tokens[step]].item() for step in steps)
        assert found.scores[study, sample].item() == pytest.approx(score, abs=1e-4)


def plain_diverse_search(language: Language, study: int, groups: int, length: int, penalty: float) -> list[list[int]]:
    """Groups of one beam each: every group greedily, its words made dearer by earlier groups' choices of the step."""
    histories = [[] for _ in range(groups)]
    for _ in range(length):
        used = Counter()
        for history in histories:
            if 0 in history:
                continue
            scores = [score - penalty * used[token] for token, score in enumerate(language.log_probs(study, history))]
            history.append(scores.index(max(scores)))
            used[history[-1]] += 1
    return [history + [0] * (length - len(history)) for history in histories]


@pytest.mark.parametrize("penalty", [0.0, 0.5, 100.0])
def test_diverse_groups_equal_the_plain_rules(penalty):
    language, length = Language(9, 6, end=-1.0), 7
    options = DecodingOptions(beam_size=3, group_size=3, sample_n=3, max_seq_length=length, diversity_lambda=penalty)
    found = decode(Session(language, 6), 6, CPU, options)
    assert (found.scores.diff(dim=1) <= 0).all()
    for study in range(6):
        expected = plain_diverse_search(language, study, 3, length, penalty)
        assert sorted(found.tokens[study].tolist()) == sorted(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample_method": "top"},
        {"beam_size": 0},
        {"temperature": 0},
        {"beam_size": 4, "group_size": 3},
        {"sample_n": 4},
        {"sample_method": "greedy", "sample_n": 2},
        {"sample_method": "greedy", "group_size": 2},
        {"diversity_lambda": -1},
        {"guidance": -0.5},
    ],
)
def test_impossible_options_are_named(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        DecodingOptions(**wrong)
