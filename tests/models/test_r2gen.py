"""R2Gen beyond the golden vectors: the recurrence and its gradient against a literal form, dropout, decoding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measurement import operations
from models.base import VisualFeatures
from models.r2gen import ConditionalLayerNorm, R2Gen, Settings
from modules.decoding.cache import COMPACTION_INTERVAL
from modules.decoding.options import DecodingOptions
from modules.layers.relational_memory import Recurrence, RelationalMemory

torch.set_num_threads(1)
TOKENS = torch.tensor([[0, 4, 2, 9, 1], [0, 3, 3, 1, 0], [0, 7, 0, 0, 0]])


class FakeExtractor(nn.Module):
    """Stands where features are given."""

    width = 12


def tiny(**options) -> R2Gen:
    # Heads of the memory and of the transformer differ, so that one cannot stand in for the other.
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": 2, "num_layers": 2, "rm_num_heads": 4, "rm_d_model": 16}
    torch.manual_seed(0)
    return R2Gen(visual_extractor=FakeExtractor(), num_ids=11, settings=Settings(**sizes | options)).eval()


def given(batch: int = 3, patches: int = 8, mask: Tensor | None = None) -> VisualFeatures:
    torch.manual_seed(1)
    visual = torch.randn(batch, patches, 12)
    return VisualFeatures(visual, mask, visual.mean(dim=1))


# ---- the recurrence


def literal(memory: RelationalMemory, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """The paper's steps one after the other, study-major; ``kept`` (T, s, s+1, B, h) as in the module."""
    batch, length, width = x.shape
    slots, heads = memory.num_slots, memory.num_heads
    state = torch.zeros(batch, slots, width, dtype=x.dtype)
    for slot in range(slots):
        state[:, slot, slot] = 1
    query, key, value, output = memory.attn.linears

    def split(y: Tensor) -> Tensor:
        return y.view(batch, -1, heads, width // heads).transpose(1, 2)

    after = []
    for t in range(length):
        token = x[:, t : t + 1]
        rows = torch.cat([state, token], dim=1)
        scores = split(query(state)) @ split(key(rows)).transpose(-1, -2) / math.sqrt(width // heads)
        probs = scores.softmax(dim=-1)  # (B, h, s, s+1)
        if kept is not None:
            probs = probs * kept[t].permute(2, 3, 0, 1)
        new = state + output((probs @ split(value(rows))).transpose(1, 2).reshape(batch, slots, width))
        new = new + memory.mlp(new)
        write, keep = (memory.W(token) + memory.U(torch.tanh(state))).chunk(2, dim=-1)
        state = torch.sigmoid(write) * torch.tanh(new) + torch.sigmoid(keep) * state
        after.append(state.flatten(1))
    return torch.stack(after, dim=1)


@pytest.fixture
def memory() -> RelationalMemory:
    torch.manual_seed(0)
    return RelationalMemory(d_model=8, num_slots=3, num_heads=2).double().eval()


def assert_same_with_gradients(memory: RelationalMemory, x: Tensor, ours: Tensor, theirs: Tensor):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    wanted = [x, *memory.parameters()]
    direction = torch.randn_like(theirs)
    actual, expected = (torch.autograd.grad(out, wanted, direction) for out in (ours, theirs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_recurrence_and_its_gradient_are_those_of_the_literal_form(memory):
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    assert_same_with_gradients(memory, x, memory(x), literal(memory, x))


def test_dropout_of_the_memorys_attention(memory):
    x = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True)
    kept = F.dropout(torch.ones(6, 3, 4, 3, 2, dtype=torch.float64), 0.4)
    tokens = x.transpose(0, 1)
    ours = Recurrence.apply(tokens, memory.token_gates(tokens), memory.initial(x), 2, kept, *memory.weights())
    assert_same_with_gradients(memory, x, ours, literal(memory, x, kept))
    # The module draws such factors itself, in training only: about a tenth of them zero, the others 1 / 0.9.
    drawn = []
    memory.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recurrence, "apply", lambda *inputs: drawn.append(inputs[4]))
        memory(torch.randn(40, 9, 8, dtype=torch.float64))
    assert drawn[0].shape == (9, 3, 4, 40, 2)
    assert drawn[0].unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (drawn[0] == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)


def test_steps_of_the_memory_equal_its_pass(memory):
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        expected, weights, state = memory(x), memory.weights().transposed(), None
        for t in range(5):
            state = memory.step(x[:, t], state, weights)
            torch.testing.assert_close(state, expected[:, t])


def test_memory_is_kept_in_float32_under_autocast():
    memory, x = RelationalMemory(16, 3, 4).eval(), torch.randn(2, 30, 16)
    expected = memory(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory(x), expected)
        assert memory(x.bfloat16()).dtype == torch.float32


# ---- the norm


def test_conditional_norm_is_that_of_the_paper():
    torch.manual_seed(0)
    norm = ConditionalLayerNorm(6, memory_dim=9)
    for linear in (norm.mlp_gamma[0], norm.mlp_gamma[2], norm.mlp_beta[0], norm.mlp_beta[2]):
        assert torch.equal(linear.bias, torch.full_like(linear.bias, 0.1))
    norm.double()
    with torch.no_grad():
        norm.gamma.uniform_(0.5, 2)
        norm.beta.normal_()
    # A spread of the size of eps shows whether eps is added to the unbiased std, outside its root.
    x, memory = 1e-6 * torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 9, dtype=torch.float64)
    first, second = norm.mlp_gamma[0], norm.mlp_gamma[2]
    scale = norm.gamma + F.linear(F.linear(memory, first.weight, first.bias).relu(), second.weight, second.bias)
    centred = x - x.mean(dim=-1, keepdim=True)
    unit = centred / ((centred.square().sum(dim=-1, keepdim=True) / 5).sqrt() + 1e-6)
    torch.testing.assert_close(norm(x, memory), scale * unit + norm.beta + norm.mlp_beta(memory))


# ---- the model


def test_initialisation():
    torch.manual_seed(0)
    model = R2Gen(visual_extractor=FakeExtractor(), num_ids=50, settings=Settings(d_model=64, d_ff=64, rm_d_model=64))
    network = model.encoder_decoder
    norm = network.model.decoder.layers[0].sublayer[0].norm
    for weight in (network.model.tgt_embed[0].lut.weight, network.model.rm.U.weight, norm.mlp_beta[0].weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier-uniform
        assert 0.95 * bound < weight.abs().max().item() <= bound
    assert norm.mlp_beta[2].bias.unique().tolist() == [pytest.approx(0.1)]
    assert network.logit.weight.abs().max().item() <= 64**-0.5  # PyTorch's own
    assert not isinstance(network.model.encoder.layers[0].sublayer[0].norm, ConditionalLayerNorm)
    assert not isinstance(network.model.decoder.norm, ConditionalLayerNorm)


def test_embedding_has_two_dropout_masks_in_training():
    model = tiny(dropout=0.5)
    seen = []
    model.encoder_decoder.model.tgt_embed[1].register_forward_hook(lambda *call: seen.append(call[2].detach()))
    model(None, TOKENS, features=given())
    first, second = seen
    assert torch.equal(first, second)
    seen.clear()
    model.train()(None, TOKENS, features=given())
    first, second = (embedded == 0 for embedded in seen)
    assert 0.3 < first.float().mean() < 0.7
    assert 0.3 < (first ^ second).float().mean() < 0.7


def test_attention_drops_out_whatever_the_dropout_option_says():
    model = tiny(dropout=0.0, drop_prob_lm=0.0)
    expected = model(None, TOKENS, features=given()).log_probs
    for part in model.train().modules():
        if part.__class__.__name__ in ("Attention", "RelationalMemory"):
            assert part.dropout == 0.1
            part.dropout = 0.0
    torch.testing.assert_close(model(None, TOKENS, features=given()).log_probs, expected)
    for dropping in (model.encoder_decoder.model.rm, model.encoder_decoder.model.encoder.layers[0].self_attn):
        dropping.dropout = 0.1
        assert not torch.allclose(model(None, TOKENS, features=given()).log_probs, expected)
        dropping.dropout = 0.0


def test_hard_negative_rows_have_features_only():
    model = tiny()
    every, some = model(None, TOKENS, features=given()), model(None, TOKENS, features=given(), supervised_rows=2)
    assert torch.equal(some.log_probs, every.log_probs[:2])
    assert torch.equal(some.report_features, every.report_features)


def test_patches_of_absent_views_do_not_matter():
    model = tiny()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False  # the second view of the second study
    features = given(mask=mask)
    expected = model(None, TOKENS, features=features)
    features.patches[1, 4:] = 1e3
    torch.testing.assert_close(model(None, TOKENS, features=features).log_probs, expected.log_probs)
    # A study of two views of which one is absent is a study of one view.
    single = VisualFeatures(features.patches[1:2, :4], None, features.pooled[1:2])
    torch.testing.assert_close(model(None, TOKENS[1:2], features=single).log_probs, expected.log_probs[1:2])
    decoding = DecodingOptions(max_seq_length=7)
    alone = model.generate(None, features=single, decoding=decoding)
    assert torch.equal(alone, model.generate(None, features=features, decoding=decoding)[1:2])


@pytest.mark.parametrize("wrong", [{"rm_d_model": 8}, {"rm_num_heads": 3}, {"num_heads": 3}])
def test_sizes_that_cannot_be_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} {value}"):
        tiny(**wrong)


# ---- decoding


def test_teacher_forcing_equals_decoding_step_by_step():
    model = tiny()
    tokens = torch.tensor([[0, 4, 2, 9, 1], [0, 3, 3, 1, 5], [0, 7, 6, 2, 8]])
    with torch.no_grad():
        expected = model(None, tokens, features=given()).log_probs
        session = model.session(given(), None, DecodingOptions(sample_method="greedy"))
        steps = [session.step(tokens[:, step : step + 1], None) for step in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)


def test_a_beam_takes_the_memory_of_the_one_it_continues():
    model = tiny()
    paths = torch.tensor([[0, 4, 7, 2], [0, 4, 1, 9], [0, 5, 3, 3]])  # what the three beams have read in the end
    with torch.no_grad():
        expected = model(None, paths, features=given(batch=1)).log_probs[:, -1]
        session = model.session(given(batch=1), None, DecodingOptions())
        session.step(torch.tensor([[0]]), None)
        session.step(torch.tensor([[5, 4, 8]]), torch.tensor([[0, 0, 0]]))
        session.step(torch.tensor([[7, 3, 1]]), torch.tensor([[1, 0, 1]]))
        last = session.step(torch.tensor([[2, 9, 3]]), torch.tensor([[0, 2, 1]]))
    torch.testing.assert_close(last[0], expected)


def test_studies_are_decoded_as_if_alone():
    model, features = tiny(), given(batch=6)
    decoding = DecodingOptions(max_seq_length=12)
    together = model.generate(None, features=features, decoding=decoding)
    lengths = (together != 0).sum(dim=1)
    assert lengths.min() < lengths.max(), "studies leave the batch at different steps"
    for row in range(6):
        one = VisualFeatures(features.patches[row : row + 1], None, features.pooled[row : row + 1])
        assert torch.equal(model.generate(None, features=one, decoding=decoding)[0], together[row])


def test_cost_of_a_decoding_step_stays_flat():
    model = tiny(d_model=64, d_ff=64, rm_d_model=64)
    with torch.no_grad():
        session = model.session(given(), None, DecodingOptions(max_seq_length=60))
        tokens, parents, costs = torch.zeros(3, 1, dtype=torch.long), None, []
        for _ in range(60):
            costs.append(operations(lambda tokens=tokens, parents=parents: session.step(tokens, parents)))
            tokens, parents = torch.ones(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
    # Only attention to the prefix grows: 4 d FLOPs per slot, layer and hypothesis. Every beam continues the first
    # one here, so that a prefix needs one slot per token and three for those since the last compaction.
    assert costs[59] - costs[1] <= (60 + 2 * COMPACTION_INTERVAL) * 4 * 64 * 2 * 9
    assert costs[59] < 1.2 * costs[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    # Wide enough that dropout leaves something of every patch: over a row of zeros the norm's gradient is divided by
    # its eps of 1e-6, which float16 cannot hold.
    model = tiny(d_model=64, d_ff=64, rm_d_model=64)
    expected = model(None, TOKENS, features=given()).log_probs
    with torch.autocast("cpu", dtype=dtype):
        actual = model(None, TOKENS, features=given()).log_probs
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=dtype):
        model.train()(None, TOKENS, features=given()).log_probs.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
