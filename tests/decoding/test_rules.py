"""Rules about words already written: by hand, against transformers' own, and in every search."""

import itertools

import pytest
import torch
import transformers

from modules.decoding.options import EVERY_SEARCH, DecodingOptions
from modules.decoding.rules import Rules, ban_ngrams, penalise_repetition
from modules.decoding.sampling import nucleus, study_seed
from modules.decoding.search import decode
from tests.decoding.test_search import NUM_IDS, Language, Session

CPU = torch.device("cpu")
LENGTH = 12
SEARCHES = {
    "greedy": ({"sample_method": "greedy"}, "lowered"),
    "sampled": ({"sample_method": "sample", "sample_n": 3}, "lowered"),
    "beams": ({"beam_size": 3, "sample_n": 3}, "lowered"),
    "diverse beams": ({"beam_size": 4, "group_size": 2, "sample_n": 4}, "lowered"),
    "beams, ended ones removed": ({"beam_size": 3, "sample_n": 3}, "removed"),
    "beams, ended ones kept": ({"beam_size": 3, "sample_n": 3}, "kept"),
}


def search(name, language=None, studies=4, **options):
    settings, ended = SEARCHES[name]
    decoding = DecodingOptions(max_seq_length=LENGTH, **settings, **options)
    language = language or Language(3, studies, end=-2.0)
    return decode(Session(language, studies), studies, CPU, decoding, ended=ended, seeds=range(studies))


def reports(found):
    """Every hypothesis that can be an answer, up to its end; and whether it has one."""
    for row, score in zip(found.tokens.flatten(0, 1).tolist(), found.scores.flatten().tolist(), strict=True):
        if score > -900:
            end = row.index(0) if 0 in row else len(row)
            yield row[:end], end < len(row)


def ngrams(words, size):
    return list(itertools.pairwise(words)) if size == 2 else list(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("name", SEARCHES)
def test_no_ngram_twice_in_any_search(name):
    free = [ngrams(words, 2) for words, _ in reports(search(name, block_trigrams=0))]
    assert any(len(set(found)) < len(found) for found in free)
    found = [words for words, _ in reports(search(name, block_trigrams=0, no_repeat_ngram_size=2))]
    assert all(len(set(ngrams(words, 2))) == len(ngrams(words, 2)) for words in found)
    assert max(map(len, found)) > 6


@pytest.mark.parametrize("name", SEARCHES)
def test_no_report_is_shorter_than_asked(name):
    language = Language(3, 4, end=4.0)
    assert min(len(words) for words, _ in reports(search(name, language))) < 3
    found = list(reports(search(name, language, min_length=6)))
    assert all(len(words) >= 6 for words, _ in found)
    assert any(len(words) < LENGTH and ended for words, ended in found)


@pytest.mark.parametrize("name", ["beams", "diverse beams", "beams, ended ones removed", "beams, ended ones kept"])
def test_trigrams_are_penalised_in_beams_only_where_asked(name):
    class Turning(Language):
        """Says 1, 2, 3, 1, 2, 3, ... with two chances in three, and 4 or 5 otherwise."""

        def log_probs(self, study, history):
            logits = torch.tensor([-9.0, 0.0, 0.0, 0.0, 0.1, 0.0])
            logits[len(history) % 3 + 1] = 2.0
            return logits.log_softmax(-1)

    language = Turning(0, 2)
    published, off = (search(name, language, 2, block_trigrams=block).tokens for block in (1, 0))
    assert torch.equal(published, off)
    assert ngrams(off[0, 0].tolist(), 3).count((1, 2, 3)) == 4
    asked = search(name, language, 2, block_trigrams=EVERY_SEARCH).tokens
    assert ngrams(asked[0, 0].tolist(), 3).count((1, 2, 3)) < 4


def test_each_rule_is_transformers():
    torch.manual_seed(0)
    tokens = torch.randint(1, 5, (3, 2, 9))
    log_probs = torch.randn(3, 2, 5).log_softmax(-1)
    flat, words = log_probs.flatten(0, 1), tokens.flatten(0, 1)
    for step in (1, 2, 3, 9):
        now = torch.tensor([step])
        for size in (1, 2, 3, 4):
            wanted = transformers.NoRepeatNGramLogitsProcessor(size)(words[:, :step], flat)
            torch.testing.assert_close(ban_ngrams(log_probs, tokens, now, size).flatten(0, 1), wanted)
        for penalty in (0.5, 2.0):
            wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(words[:, :step], flat)
            assert torch.equal(penalise_repetition(log_probs, tokens, now, penalty).flatten(0, 1), wanted)
    probs = torch.randn(50, 30).mul(3).softmax(-1)
    for share in (0.1, 0.5, 0.9, 0.999):
        wanted = transformers.TopPLogitsWarper(share)(None, probs.log())
        assert torch.equal(nucleus(probs, share) > 0, wanted > -torch.inf)


def test_a_report_ends_where_every_token_is_ruled_out():
    """Three words, none twice, and at least five of them: the fourth token is the end."""
    for name in SEARCHES:

        class Few(Language):
            def log_probs(self, study, history):
                return torch.tensor([-1.0, 0.5, 0.3, 0.1, -torch.inf, -torch.inf]).log_softmax(-1)

        found = search(name, Few(0, 2), 2, no_repeat_ngram_size=1, min_length=5)
        assert sorted(found.tokens[0, 0].tolist()) == [0] * 9 + [1, 2, 3]
        assert found.scores[:, 0].isfinite().all()


def test_rules_do_not_count_what_follows_the_step():
    """Histories may be longer than what has been written, as in steps of one shape."""
    options = DecodingOptions(
        block_trigrams=EVERY_SEARCH, no_repeat_ngram_size=4, repetition_penalty=1.5, min_length=3, max_seq_length=20
    )
    tokens = torch.randint(1, 4, (2, 3, 12), generator=torch.Generator().manual_seed(1))
    log_probs = torch.randn(2, 3, 5).log_softmax(-1)
    for step in range(12):
        now, whole = torch.tensor([step]), tokens.clone()
        whole[:, :, step:] = 0
        expected = Rules(options)(log_probs, tokens[:, :, :step], now)
        torch.testing.assert_close(Rules(options)(log_probs, whole, now), expected)


# ---- length penalty


class Ways(Language):
    """Report 1 ends at once with probability 0.5; report 2, 3, 4 has a sixth of that probability in all."""

    def log_probs(self, study, history):
        probabilities = torch.full((NUM_IDS,), 1e-6)
        if not history:
            probabilities[1], probabilities[2] = 0.6, 0.4
        elif history == [1]:
            probabilities[0] = 0.9
        elif history in ([2], [2, 3]):
            probabilities[3 if history == [2] else 4] = 0.75
        else:
            probabilities[0] = 0.8
        return probabilities.log()


@pytest.mark.parametrize("name", ["beams", "beams, ended ones removed", "beams, ended ones kept", "diverse beams"])
@pytest.mark.parametrize(("penalty", "best"), [(0.0, [1]), (0.3, [1]), (2.0, [2, 3, 4]), (-1.0, [1])])
def test_long_reports_win_with_a_length_penalty(name, penalty, best):
    """ln(0.6 * 0.9) = -0.616 over two tokens, ln(0.4 * 0.75^2 * 0.8) = -1.715 over four: even at penalty 1.477."""
    found = (
        search(name, Ways(0, 1), 1, length_penalty=penalty, block_trigrams=0, diversity_lambda=0.0)
        if name == "diverse beams"
        else search(name, Ways(0, 1), 1, length_penalty=penalty)
    )
    assert found.tokens[0, 0].tolist() == best + [0] * (LENGTH - len(best))
    sum_of_logs = {1: -0.6162, 3: -1.7148}[len(best)]
    assert found.scores[0, 0].item() == pytest.approx(sum_of_logs / (len(best) + 1) ** penalty, abs=1e-3)


# ---- sampling by study


def test_a_study_has_its_text_in_any_batch():
    language, studies = Language(5, 6, end=0.5), 6
    options = DecodingOptions(sample_method="sample", sample_n=2, max_seq_length=10, temperature=1.3, top_p=0.9)
    seeds = [study_seed(7, f"study {number}") for number in range(studies)]
    together = decode(Session(language, studies), studies, CPU, options, seeds=seeds)
    assert len({tuple(row) for row in together.tokens[:, 0].tolist()}) > 3
    for rows in ([0], [4, 1], [5, 3, 2]):
        session = Session(language, studies)
        session.studies = rows
        found = decode(session, len(rows), CPU, options, seeds=[seeds[row] for row in rows])
        assert torch.equal(found.tokens, together.tokens[rows])
    others = decode(Session(language, studies), studies, CPU, options, seeds=[seed + 1 for seed in seeds])
    assert not torch.equal(others.tokens, together.tokens)


def test_seeded_draws_follow_the_distribution():
    """The share of every first word among 3,000 studies; outside of the nucleus there is none."""
    language = Language(4, 1)

    class Many(Session):
        def step(self, tokens, parents):
            return language.log_probs(0, []).expand(*tokens.shape, -1)

        def keep(self, rows):
            pass

    wanted = language.log_probs(0, []).exp()
    for share in (1.0, 0.7):
        options = DecodingOptions(sample_method="sample", max_seq_length=3, top_p=share, block_trigrams=0)
        found = decode(Many(language, 3000), 3000, CPU, options, seeds=range(3000)).tokens[:, 0, 0]
        expected = nucleus(wanted, share) / nucleus(wanted, share).sum()
        torch.testing.assert_close(found.bincount(minlength=NUM_IDS) / 3000, expected, atol=0.03, rtol=0)
        assert share == 1 or (expected == 0).any()


@pytest.mark.parametrize("wrong", [{"min_length": 60}, {"top_p": 0.5}, {"top_p": 0.0, "sample_method": "sample"}])
def test_impossible_rules_are_named(wrong):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))} "):
        DecodingOptions(**wrong)


# ---- edges


@pytest.mark.parametrize("name", SEARCHES)
def test_a_report_of_one_token_and_one_study(name):
    settings, ended = SEARCHES[name]
    decoding = DecodingOptions(**settings)
    object.__setattr__(decoding, "max_seq_length", 1)  # shorter than any run may ask for
    language = Language(1, 1)
    found = decode(Session(language, 1), 1, CPU, decoding, ended=ended, seeds=[0])
    assert found.tokens.shape == (1, decoding.sample_n, 1)
    if "sampled" not in name:
        assert found.tokens[0, 0, 0] == language.log_probs(0, []).argmax()


@pytest.mark.parametrize("ended", ["lowered", "removed", "kept"])
def test_more_beams_than_words(ended):
    language, length = Language(2, 3, end=0.0), 3
    options = DecodingOptions(beam_size=40, max_seq_length=length, sample_n=5)
    found = decode(Session(language, 3), 3, CPU, options, ended=ended)
    for study in range(3):
        every = {}
        for words in itertools.product(range(NUM_IDS), repeat=length):
            end = words.index(0) if 0 in words else length
            if not any(words[end:]):
                steps = range(min(end + 1, length))
                every[words] = sum(language.log_probs(study, list(words[:step]))[words[step]].item() for step in steps)
        best = sorted(every, key=every.get, reverse=True)[:5]
        if ended == "kept":  # a beam that has ended keeps its place among 40
            assert tuple(found.tokens[study, 0].tolist()) == best[0]
        else:
            assert [tuple(row) for row in found.tokens[study].tolist()] == best
    wide = DecodingOptions(beam_size=40, group_size=2, max_seq_length=length)
    assert decode(Session(language, 3), 3, CPU, wide).tokens.shape == (3, 1, length)


@pytest.mark.parametrize("name", SEARCHES)
def test_reports_that_end_at_once(name):
    class Mute(Language):
        def log_probs(self, study, history):
            return torch.tensor([0.999, *[0.0002] * 5]).log()

    session = Session(Mute(0, 3), 3)
    settings, ended = SEARCHES[name]
    decoding = DecodingOptions(**{**settings, "sample_n": 1})
    found = decode(session, 3, CPU, decoding, ended=ended, seeds=[1, 2, 3])
    assert not found.tokens.any() and session.steps <= (3 if ended == "removed" else 1)
