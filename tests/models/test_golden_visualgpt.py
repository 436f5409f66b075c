"""VisualGPT against vectors computed with the published code (GOLDEN_DIR/VisualGPT, tau 0 and 0.2)."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.base import VisualFeatures
from models.visualgpt import Settings, VisualGPT
from modules.decoding.options import DecodingOptions
from tests.golden_support import Golden, published_settings, read_golden

torch.set_num_threads(1)


class GivenFeatures(nn.Module):
    """Stands where detection features are given."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


def build(golden: Golden) -> VisualGPT:
    config = golden.config
    settings = Settings(
        d_model=config["d_model"],
        d_ff=config["enc_d_ff"],
        num_heads=config["heads"],
        num_layers=config["enc_layers"],
        gpt2_layers=config["n_layer"],
        gpt2_positions=config["n_positions"],
        tau=config["tau"],
        visualgpt_compat="published",
    )
    model = VisualGPT(
        visual_extractor=GivenFeatures(config["d_in"]),
        num_ids=config["V"],
        settings=settings,
        begin_id=config["bos"],
        end_id=config["eos"],
        pad_token=config["pad"],
        context=config["n_ctx"],
    )
    model.load_state_dict(golden.state)  # strict: every name of the published file has its place
    return model.eval()


@pytest.fixture(scope="module", params=["tau0.0", "tau0.2"])
def golden(request) -> Golden:
    return read_golden("VisualGPT", request.param)


@pytest.fixture(scope="module")
def model(golden) -> VisualGPT:
    return build(golden)


@pytest.fixture(scope="module")
def features(golden) -> VisualFeatures:
    patches = golden.arrays["features"]
    return VisualFeatures(patches, None, patches.mean(dim=1))


def tokens_of(golden: Golden, ids: Tensor) -> Tensor:
    """GPT-2's ids as the project has them: 0 for begin, end and padding, and the end's id for GPT-2's word 0."""
    config = golden.config
    special = torch.isin(ids, torch.tensor([config["bos"], config["eos"], config["pad"]]))
    return torch.where(special, 0, torch.where(ids == 0, config["eos"], ids))


def own_columns(golden: Golden, log_probs: Tensor) -> Tensor:
    """Log-probabilities in the order of GPT-2's ids."""
    order = torch.arange(log_probs.size(-1))
    order[0], order[golden.config["eos"]] = golden.config["eos"], 0
    return log_probs[..., order]


def ids_of(golden: Golden, tokens: Tensor) -> Tensor:
    """What the published search returns for answers of ours: their end, then zeros."""
    end = (tokens == 0) & ((tokens == 0).cumsum(dim=-1) == 1)
    word_zero = tokens == golden.config["eos"]
    return torch.where(end, golden.config["eos"], torch.where(word_zero, 0, tokens))


def nll(model: VisualGPT, golden: Golden, features: VisualFeatures) -> Tensor:
    seq = golden.arrays["seq"]
    tokens, mask = tokens_of(golden, seq), seq[:, 1:] != golden.config["pad"]
    output = model(None, tokens[:, :-1], features=features)
    return -output.log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)[mask].mean()


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def test_log_probs_and_loss(model, golden, features):
    with torch.no_grad():
        output = model(None, tokens_of(golden, golden.arrays["seq"]), features=features)
        loss = nll(model, golden, features)
    close(own_columns(golden, output.log_probs), golden.arrays["logprobs"])
    close(output.report_features, golden.arrays["decoder_hidden"])
    assert loss.item() == pytest.approx(golden.config["nll"], rel=1e-5)


def test_encoder(model, golden, features):
    with torch.no_grad():
        levels, keep = model.encoder(features.patches, None)
    close(levels, golden.arrays["encoder_out"])
    assert torch.equal(~keep, golden.arrays["encoder_mask"])


def test_gradient_norms(golden, features):
    model = build(golden)
    nll(model, golden, features).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in golden.config["grad_norms"].items():
        if expected is None:
            assert gradients[name] is None, name
        else:
            assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("beam_size", [1, 3, 5])
def test_beam_search(model, golden, features, beam_size):
    length, arrays = golden.config["beam_max_len"], golden.arrays
    found = model.search(
        None,
        features=features,
        decoding=DecodingOptions(max_seq_length=length, beam_size=beam_size, sample_n=beam_size),
    )
    assert torch.equal(ids_of(golden, found.tokens), arrays[f"beam{beam_size}_seq"])
    close(found.log_probs, arrays[f"beam{beam_size}_token_logprobs"])
    close(found.scores, torch.tensor(golden.config[f"beam{beam_size}_sum"]))
    best = model.generate(None, features=features, decoding=DecodingOptions(max_seq_length=length, beam_size=beam_size))
    assert torch.equal(ids_of(golden, best), arrays[f"beam{beam_size}_seq"][:, 0])


def test_full_size_names_shapes_and_order():
    published = json.loads((Path(__file__).resolve().parents[1] / "golden" / "state_dict_visualgpt.json").read_text())
    with torch.device("meta"):
        model = VisualGPT(
            visual_extractor=GivenFeatures(2048), num_ids=50257, settings=Settings(**published_settings("visualgpt"))
        )
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == published["shapes"]
    assert [name for name, _ in model.named_parameters()] == published["parameter_order"]
