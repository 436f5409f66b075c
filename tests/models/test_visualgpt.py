"""VisualGPT beyond the golden vectors: ids, gates, padding, absent patches, initialisation, and the beam search."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks.measurement import operations
from models.base import VisualFeatures
from models.visualgpt import Settings, VisualGPT
from models.visualgpt_decoder import resurrecting_gates
from modules.decoding.cache import COMPACTION_INTERVAL
from modules.decoding.options import DecodingOptions
from modules.decoding.search import decode
from modules.inference.attention import recorded_attention
from modules.ithn.objective import Objective
from modules.ithn.weights import load_published_state
from modules.runtime.errors import InputError

torch.set_num_threads(1)
BEGIN, END, PADDING = 8, 9, 10


class FakeExtractor(nn.Module):
    """Stands where features are given."""

    width = 12


def tiny(**options) -> VisualGPT:
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": 2, "num_layers": 3, "gpt2_layers": 2, "gpt2_positions": 64}
    special = {"begin_id": BEGIN, "end_id": END, "pad_token": PADDING}
    more = {name: options.pop(name) for name in ("begin_id", "end_id", "pad_token", "gpt2") if name in options}
    torch.manual_seed(0)
    settings = Settings(**sizes | options)
    return VisualGPT(visual_extractor=FakeExtractor(), num_ids=11, settings=settings, **special | more).eval()


def given(batch: int = 3, patches: int = 8, mask: torch.Tensor | None = None) -> VisualFeatures:
    torch.manual_seed(1)
    visual = torch.randn(batch, patches, 12)
    return VisualFeatures(visual, mask, visual.mean(dim=1))


TOKENS = torch.tensor([[0, 4, 2, 9, 1], [0, 3, 3, 0, 0], [0, 7, 0, 0, 0]])


# ---- ids and padding


def test_begin_end_and_the_first_word_change_places():
    ids = tiny().own_ids(TOKENS)
    assert ids.tolist() == [[BEGIN, 4, 2, 0, 1], [BEGIN, 3, 3, END, END], [BEGIN, 7, END, END, END]]


def test_the_end_is_scored_at_0_and_the_first_word_at_its_id():
    model, hidden = tiny(), torch.randn(2, 3, 16)
    expected = (hidden @ model.decoder.transformer.wte.weight.t()).log_softmax(-1)
    actual = model.log_probs(hidden)
    torch.testing.assert_close(actual[..., 0], expected[..., END])
    torch.testing.assert_close(actual[..., END], expected[..., 0])
    torch.testing.assert_close(actual[..., 1:END], expected[..., 1:END])


def test_padding_is_seen_by_nothing_and_the_end_is_no_padding():
    model = tiny()
    long = model(None, TOKENS, features=given()).log_probs
    short = model(None, TOKENS[:, :3], features=given()).log_probs
    torch.testing.assert_close(long[1:, :3], short[1:])
    final = model.decoder.transformer.ln_f.bias
    hidden = model(None, TOKENS, features=given()).report_features
    assert torch.equal(hidden[2, 3], final) and not torch.equal(hidden[2, 2], final)


def test_a_word_that_is_the_padding_token_is_a_word_unless_published():
    tokens = torch.tensor([[0, 4, PADDING, 2]])
    for compat, hidden_away in (("off", False), ("published", True)):
        model = tiny(visualgpt_compat=compat)
        hidden = model(None, tokens, features=given(1)).report_features
        assert torch.equal(hidden[0, 2], model.decoder.transformer.ln_f.bias) is hidden_away


def test_a_vocabulary_without_special_tokens():
    model = tiny(begin_id=0, end_id=0, pad_token=0, visualgpt_compat="published")
    assert torch.equal(model.own_ids(TOKENS), TOKENS)
    assert model(None, TOKENS, features=given()).log_probs.isfinite().all()


# ---- gates


def test_gates_are_closed_at_their_threshold_and_pass_gradient_above_it():
    alpha = torch.tensor([0.0, 0.25, 0.3, 0.75, 0.8, 1.0], requires_grad=True)
    language, vision = resurrecting_gates(alpha, 0.25)
    torch.testing.assert_close(language, torch.tensor([0.0, 0.0, 0.3, 0.75, 0.8, 1.0]))
    torch.testing.assert_close(vision, torch.tensor([1.0, 0.75, 0.7, 0.0, 0.0, 0.0]))
    (3 * language + vision).sum().backward()
    assert alpha.grad.tolist() == [-1, -1, 2, 3, 3, 3]


# ---- visual tokens


def test_absent_patches_do_not_matter():
    model, mask = tiny(), torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    features = given(mask=mask)
    expected = model(None, TOKENS, features=features).log_probs
    features.patches[1, 4:] = 1e3
    torch.testing.assert_close(model(None, TOKENS, features=features).log_probs, expected)
    alone = VisualFeatures(features.patches[1:2, :4], None, features.pooled[1:2])
    torch.testing.assert_close(model(None, TOKENS[1:2], features=alone).log_probs, expected[1:2])
    decoding = DecodingOptions(max_seq_length=7)
    assert torch.equal(
        model.generate(None, features=alone, decoding=decoding),
        model.generate(None, features=features, decoding=decoding)[1:2],
    )


def test_a_study_without_any_patch_has_finite_log_probs():
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    assert tiny()(None, TOKENS, features=given(mask=mask)).log_probs.isfinite().all()


def test_the_published_mask_hides_patches_by_accident_and_not_the_absent_ones():
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    for compat in ("off", "published"):
        model = tiny(visualgpt_compat=compat)
        model.encoder.layer_norm.bias.data.fill_(0.25)  # binary fractions: the sums below are exact
        model.encoder.layer_norm.weight.data.zero_()
        _, keep = model.encoder(given().patches, mask)
        assert torch.equal(keep[:, 0, 0], mask if compat == "off" else torch.ones_like(mask))
        model.encoder.layer_norm.bias.data[8:] = -0.25  # channels that add up to 0, in every patch
        _, keep = model.encoder(given().patches, mask)
        assert torch.equal(keep[:, 0, 0], mask if compat == "off" else torch.zeros_like(mask))


# ---- decoding


def test_teacher_forcing_equals_decoding_step_by_step():
    model, tokens = tiny(), torch.tensor([[0, 4, 2, 9, 1], [0, 3, 3, 1, 5], [0, 7, 6, 2, 8]])
    with torch.no_grad():
        expected = model(None, tokens, features=given()).log_probs
        session = model.session(given(), None, DecodingOptions(sample_method="greedy"))
        steps = [session.step(tokens[:, step : step + 1], None) for step in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)


def test_cost_of_a_decoding_step_stays_flat():
    model = tiny(d_model=64)
    with torch.no_grad():
        session = model.session(given(), None, DecodingOptions(max_seq_length=60))
        tokens, parents, costs = torch.zeros(3, 1, dtype=torch.long), None, []
        for _ in range(60):
            costs.append(operations(lambda tokens=tokens, parents=parents: session.step(tokens, parents)))
            tokens, parents = torch.ones(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
    # Only attention to the prefix grows: 4 d FLOPs per slot, layer and hypothesis (see test_r2gencmn.py).
    assert costs[59] - costs[1] <= (60 + 2 * COMPACTION_INTERVAL) * 4 * 64 * 2 * 9
    assert costs[59] < 1.5 * costs[1]


class Table:
    """A language model of two words and an end whose next token depends on the last one: (3, 3) log-probabilities."""

    def __init__(self, table: torch.Tensor):
        self.table, self.steps = table, 0

    def step(self, tokens, parents):
        self.steps += 1
        return self.table[tokens]

    def keep(self, rows):
        pass


def test_the_standard_search_with_enough_beams_finds_the_best_of_all():
    table = torch.tensor([[0.2, 0.5, 0.3], [0.3, 0.1, 0.6], [0.25, 0.7, 0.05]]).log()
    length = 4
    every = {}
    for words in itertools.product(range(3), repeat=length):
        end = words.index(0) if 0 in words else length
        if not any(words[end:]):
            path = (0, *words[: end + 1])
            every[words] = sum(table[a, b].item() for a, b in itertools.pairwise(path))
    expected = sorted(every, key=every.get, reverse=True)[:3]
    options = DecodingOptions(max_seq_length=length, beam_size=len(every), sample_n=3)
    # More beams than continuations of the first token: those without a parent have no probability.
    found = decode(Table(table), 1, torch.device("cpu"), options, ended="kept")
    assert [tuple(row) for row in found.tokens[0].tolist()] == expected
    torch.testing.assert_close(found.scores[0], torch.tensor([every[words] for words in expected]))


def test_a_finished_beam_keeps_its_place_and_ends_the_search_once_it_is_the_best():
    table = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    session = Table(table)
    found = decode(session, 1, torch.device("cpu"), DecodingOptions(max_seq_length=9, beam_size=2), ended="kept")
    assert found.tokens[0, 0].tolist() == [0] * 9 and session.steps == 1
    assert found.scores.item() == pytest.approx(torch.tensor(0.6).log().item())


def test_groups_and_sampling_are_searched_as_in_the_r2gen_family():
    model = tiny()
    for options in (
        {"beam_size": 4, "group_size": 2},
        {"sample_method": "sample", "sample_n": 2},
        {"sample_method": "greedy"},
    ):
        assert model.generate(None, features=given(), decoding=DecodingOptions(max_seq_length=6, **options)).shape == (
            3,
            6,
        )


def test_attention_weights_are_those_of_the_pass():
    model = tiny()
    with recorded_attention(model.cross_attention()) as layers, torch.no_grad():
        model(None, TOKENS, features=given())
    assert [layer.shape for layer in layers] == [(3, 3 * 2, 5, 8)] * 2
    torch.testing.assert_close(layers[0].sum(-1), torch.ones(3, 6, 5))


# ---- weights


def test_initialisation_with_and_without_gpt2():
    random = tiny(d_model=64)
    for weight in (random.decoder.transformer.wte.weight, random.decoder.transformer.h[0].mlp.c_fc.weight):
        assert 0.9 * (6 / sum(weight.shape)) ** 0.5 < weight.abs().max().item() <= (6 / sum(weight.shape)) ** 0.5
    source = random.decoder.transformer.state_dict()
    gpt2 = {name: torch.full_like(source[name], 0.5) for name in ("wte.weight", "h.1.attn.c_attn.weight")}
    model = tiny(d_model=64, gpt2=gpt2)
    assert (model.decoder.lm_head.decoder.weight == 0.5).all()
    assert (model.decoder.transformer.h[1].attn.c_attn.weight == 0.5).all()
    # What GPT-2 does not have: Conv1D N(0, 0.02), cross-attention Xavier, gates PyTorch's own.
    block = model.decoder.transformer.h[0]
    assert block.enc_dec_attn.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0.9 * (6 / 128) ** 0.5 < block.enc_dec_attn.fc_q.weight.abs().max().item() <= (6 / 128) ** 0.5
    assert block.fc_alpha1.weight.abs().max().item() <= 128**-0.5
    bound = (6 / (64 + 12)) ** 0.5
    assert 0.9 * bound < model.encoder.fc.weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_heads": 3}, "num_heads 3"),
        ({"visualgpt_compat": "on"}, "visualgpt_compat on"),
        ({"end_id": 11}, "below num_ids 11"),
        ({"gpt2": {"wte.weight": torch.zeros(2, 2)}}, "wte.weight"),
        ({"gpt2": {"h.7.ln_1.bias": torch.zeros(16)}}, "h.7.ln_1.bias"),
    ],
)
def test_options_that_cannot_be_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        tiny(**wrong)


def test_a_published_file_loads_whatever_its_decoding_state():
    model = tiny()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["encoder.fc.bias"] += 1
    state["decoder.transformer.h.0.attn.running_keys"] = torch.randn(15, 2, 4, 8)
    del state["decoder.running_mask_self_attention"]
    objective = Objective(tiny())
    assert load_published_state(objective, {f"module.{name}": value for name, value in state.items()}) == []
    assert torch.equal(objective.backbone.encoder.fc.bias, state["encoder.fc.bias"])
    assert objective.backbone.decoder.transformer.h[0].attn.running_keys.shape == (2, 0, 8)
    del state["encoder.fc.bias"]
    with pytest.raises(InputError, match="encoder.fc.bias"):
        load_published_state(objective, state)


def test_entries_that_nothing_uses_are_not_trained():
    model = tiny().train()
    model(None, TOKENS, features=given()).log_probs.sum().backward()
    untouched = {name for name, value in model.named_parameters() if value.grad is None}
    assert untouched == {name for name, value in model.named_parameters() if not value.requires_grad}
    assert len(untouched) == 3 * 6 + 2 * 2 and all("c_attn" in name for name in untouched)


def test_dropout_stands_where_published(monkeypatch):
    """On whole sums in the decoder, residual included; a cross-attention rate of its own; nothing on embeddings."""
    model, features, calls = tiny(dropout=0.25).train(), given(), []

    def seen(x, p, training):
        calls.append((tuple(x.shape), p, training))
        return x

    attended = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *inputs, dropout_p=0.0, **options: (attended.append(dropout_p), fused(*inputs, **options))[1],
    )
    monkeypatch.setattr(torch.nn.functional, "dropout", seen)
    model(None, TOKENS, features=features)
    encoder = [((3, 8, 16), 0.25, True)] + [((3, 8, width), 0.25, True) for _ in range(3) for width in (16, 24, 16)]
    assert calls == encoder + [((3, 5, 16), 0.25, True)] * 4  # two in each of two layers
    assert attended == [0.0] * 3 + [0.25, 0.2] * 2
    model.eval()(None, TOKENS, features=features)
    assert not any(training for *_, training in calls[14:]) and attended[7:] == [0.0] * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = tiny(tau=0.0)  # no gate flips by rounding
    expected = model(None, TOKENS, features=given()).log_probs
    with torch.autocast("cpu", dtype=dtype):
        actual = model(None, TOKENS, features=given()).log_probs
        generated = model.generate(None, features=given(), decoding=DecodingOptions(max_seq_length=5))
    assert actual.dtype == torch.float32 and generated.shape == (3, 5)
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        model.train()(None, TOKENS, features=given()).log_probs.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
