"""R2GenCMN beyond the golden vectors: absent views, dropout, initialisation, and how much it computes."""

import pytest
import torch
from torch import nn

from benchmarks.measurement import operations
from models import backbone_class
from models.base import VisualFeatures
from models.r2gencmn import R2GenCMN, Settings
from modules.decoding.cache import COMPACTION_INTERVAL
from modules.decoding.options import DecodingOptions

torch.set_num_threads(1)


class FakeExtractor(nn.Module):
    """Stands where features are given."""

    width = 12


def tiny(**options) -> R2GenCMN:
    sizes = {"d_model": 16, "d_ff": 24, "num_heads": 2, "num_layers": 2, "topk": 4, "cmm_size": 64, "cmm_dim": 16}
    torch.manual_seed(0)
    return R2GenCMN(visual_extractor=FakeExtractor(), num_ids=11, settings=Settings(**sizes | options)).eval()


def given(batch: int = 3, patches: int = 8, mask: torch.Tensor | None = None) -> VisualFeatures:
    torch.manual_seed(1)
    visual = torch.randn(batch, patches, 12)
    return VisualFeatures(visual, mask, visual.mean(dim=1))


TOKENS = torch.tensor([[0, 4, 2, 9, 1], [0, 3, 3, 1, 0], [0, 7, 0, 0, 0]])


def test_patches_of_absent_views_do_not_matter():
    model = tiny()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False  # the second view of the second study
    features = given(mask=mask)
    expected = model(None, TOKENS, features=features)
    features.patches[1, 4:] = 1e3
    actual = model(None, TOKENS, features=features)
    torch.testing.assert_close(actual.log_probs, expected.log_probs)
    # A study of two views of which one is absent is a study of one view.
    single = VisualFeatures(features.patches[1:2, :4], None, features.pooled[1:2])
    torch.testing.assert_close(model(None, TOKENS[1:2], features=single).log_probs, expected.log_probs[1:2])
    decoding = DecodingOptions(max_seq_length=7)
    assert torch.equal(
        model.generate(None, features=single, decoding=decoding),
        model.generate(None, features=features, decoding=decoding)[1:2],
    )


def test_batch_norm_of_the_patch_embedding_leaves_absent_views_out():
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    model = tiny(use_bn=2)
    model.encoder_decoder.train()
    features = given(mask=mask)
    features.patches[1, 4:] = 1e3
    model(None, TOKENS, features=features)
    expected = 0.1 * features.patches[mask].mean(dim=0)  # momentum 0.1, from 0
    torch.testing.assert_close(model.encoder_decoder.att_embed[0].running_mean, expected)


def test_attention_drops_out_whatever_the_dropout_option_says():
    model = tiny(dropout=0.0, drop_prob_lm=0.0)
    features = given()
    first, second = (model.train()(None, TOKENS, features=features).log_probs for _ in range(2))
    assert not torch.allclose(first, second)
    for part in model.modules():
        if part.__class__.__name__ in ("Attention", "MemoryResponse"):
            assert part.dropout == 0.1
            part.dropout = 0.0
    first, second = (model(None, TOKENS, features=features).log_probs for _ in range(2))
    assert torch.equal(first, second)


def test_initialisation():
    torch.manual_seed(0)
    settings = Settings(d_model=64, d_ff=64, cmm_size=512, cmm_dim=64)
    model = R2GenCMN(visual_extractor=FakeExtractor(), num_ids=50, settings=settings)
    network = model.encoder_decoder
    assert network.memory_matrix.std().item() == pytest.approx(1 / 64, rel=0.03)
    for weight in (network.model.tgt_embed[0].lut.weight, network.cmn.linears[0].weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier-uniform
        assert 0.95 * bound < weight.abs().max().item() <= bound
    assert network.logit.weight.abs().max().item() <= 64**-0.5  # PyTorch's own
    assert network.cmn is network.model.cmn


@pytest.mark.parametrize("wrong", [{"cmm_dim": 8}, {"topk": 65}, {"num_heads": 3}])
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="{} {}".format(*next(iter(wrong.items())))):
        tiny(**wrong)


def test_the_model_is_refused_by_an_unknown_name():
    with pytest.raises(ValueError, match="r2gencmn"):
        backbone_class("r2gen2")


def test_the_memory_is_projected_once_per_pass_whatever_the_batch():
    model = tiny()
    rows = []
    for linear in model.encoder_decoder.cmn.linears[1:3]:
        linear.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    model(None, TOKENS, features=given())
    assert rows == [64, 64]
    rows.clear()
    model.generate(None, features=given(), decoding=DecodingOptions(max_seq_length=6))
    assert rows == [64, 64]


def test_cost_of_a_decoding_step_stays_flat():
    model = tiny(d_model=64, d_ff=64, cmm_dim=64)
    with torch.no_grad():
        session = model.session(given(), None, DecodingOptions(max_seq_length=60))
        tokens, parents, costs = torch.zeros(3, 1, dtype=torch.long), None, []
        for _ in range(60):
            costs.append(operations(lambda tokens=tokens, parents=parents: session.step(tokens, parents)))
            tokens, parents = torch.ones(3, 3, dtype=torch.long), torch.zeros(3, 3, dtype=torch.long)
    # Only attention to the prefix grows: 4 d FLOPs per slot, layer and hypothesis. Every beam continues the first
    # one here, so that a prefix needs one slot per token and three for those since the last compaction.
    assert costs[59] - costs[1] <= (60 + 2 * COMPACTION_INTERVAL) * 4 * 64 * 2 * 9
    assert costs[59] < 1.5 * costs[1]


def test_teacher_forcing_equals_decoding_step_by_step():
    model = tiny()
    tokens = torch.tensor([[0, 4, 2, 9, 1], [0, 3, 3, 1, 5], [0, 7, 6, 2, 8]])
    with torch.no_grad():
        expected = model(None, tokens, features=given()).log_probs
        session = model.session(given(), None, DecodingOptions(sample_method="greedy"))
        steps = [session.step(tokens[:, step : step + 1], None) for step in range(5)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = tiny(topk=64)  # all slots: which are the best would depend on rounding
    expected = model(None, TOKENS, features=given()).log_probs
    with torch.autocast("cpu", dtype=dtype):
        actual = model(None, TOKENS, features=given()).log_probs
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        model.train()(None, TOKENS, features=given()).log_probs.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
