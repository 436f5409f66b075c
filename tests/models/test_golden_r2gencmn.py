"""R2GenCMN against vectors computed with the published code (GOLDEN_DIR/R2GenCMN, both data sets)."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.base import VisualFeatures
from models.r2gencmn import R2GenCMN, Settings
from modules.decoding.options import DecodingOptions
from modules.layers.visual_extractor import VisualExtractor
from tests.golden_support import Golden, load_visual, read_golden, visual_tensor

torch.set_num_threads(1)
OPTIONS = ("d_model", "d_ff", "num_heads", "num_layers", "dropout", "drop_prob_lm", "use_bn")
MEMORY_OPTIONS = ("topk", "cmm_size", "cmm_dim")


def build(golden: Golden) -> R2GenCMN:
    extractor = VisualExtractor(golden.options["visual_extractor"])
    load_visual(extractor, golden.config["visual_seed"])
    settings = Settings(**{name: golden.options[name] for name in OPTIONS + MEMORY_OPTIONS})
    model = R2GenCMN(visual_extractor=extractor, num_ids=golden.config["vocab_size"] + 1, settings=settings)
    visual = {name: value for name, value in model.state_dict().items() if name.startswith("visual_extractor.")}
    model.load_state_dict(golden.state | visual)  # strict: the stored file has no position tables
    return model.eval()


@pytest.fixture(scope="module", params=["iu_xray", "mimic_cxr"])
def golden(request) -> Golden:
    return read_golden("R2GenCMN", request.param)


@pytest.fixture(scope="module")
def model(golden) -> R2GenCMN:
    return build(golden)


@pytest.fixture(scope="module")
def features(golden) -> VisualFeatures:
    patches = golden.arrays["att_feats"]
    return VisualFeatures(patches, None, patches.mean(dim=1))


def masked_nll(log_probs: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    nll = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (nll * mask).sum() / mask.sum()


def training_loss(model: R2GenCMN, golden: Golden, features: VisualFeatures | None = None) -> Tensor:
    ids, mask = golden.arrays["report_ids"], golden.arrays["report_masks"]
    output = model(golden.images(), ids[:, :-1], features=features)
    return masked_nll(output.log_probs, ids[:, 1:], mask[:, 1:])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def test_visual_tensors_follow_the_seeded_rule(golden):
    shapes = {key: tuple(v.shape) for key, v in VisualExtractor("resnet18").model.state_dict().items()}
    for key, digest in golden.config["visual_key_sha16"].items():
        raw = visual_tensor(key, shapes[key], golden.config["visual_seed"]).tobytes()
        assert hashlib.sha256(raw).hexdigest()[:16] == digest, key


def test_visual_features(model, golden):
    with torch.no_grad():
        patches, mask, pooled = model.visual_extractor(golden.images())
    close(patches, golden.arrays["att_feats"])
    assert mask is None
    per_view = golden.arrays["fc_feats"].unflatten(1, (-1, patches.size(-1)))
    close(pooled, per_view.mean(dim=1))


def test_intermediate_tensors(model, golden, features):
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.setdefault(name, []).append(output)

    network = model.encoder_decoder
    parts = {
        "att_embed": network.att_embed,
        "cmn": network.cmn,
        "encoder": network.model.encoder,
        "decoder": network.model.decoder,
    }
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    with torch.no_grad():
        output = model(None, golden.arrays["report_ids"][:, :-1], features=features)
    for hook in hooks:
        hook.remove()
    arrays = golden.arrays
    close(seen["att_embed"][0], arrays["mid_att_embed_out"], 1e-5)
    close(seen["cmn"][0], arrays["mid_cmn_visual_response"], 1e-5)
    close(seen["cmn"][1], arrays["mid_cmn_text_response"], 1e-5)
    close(seen["encoder"][0], arrays["mid_encoder_out"], 1e-5)
    close(seen["decoder"][0], arrays["mid_decoder_out"], 1e-5)
    assert output.report_features is seen["decoder"][0]


def test_log_probs_and_loss(model, golden, features):
    with torch.no_grad():
        output = model(None, golden.arrays["report_ids"][:, :-1], features=features)
        loss = training_loss(model, golden)
    close(output.log_probs, golden.arrays["logprobs"], 2e-5)
    assert loss.item() == pytest.approx(golden.config["ce_loss"], rel=1e-5)


def test_gradient_norms(golden):
    model = build(golden)
    training_loss(model, golden).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in golden.config["grad_norms"].items():
        if expected is None:
            assert gradients[name] is None, name
        else:
            assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_training_history(golden):
    model = build(golden)
    rates = golden.config["eval_mode_train_lr"]
    visual = list(model.visual_extractor.parameters())
    optimiser = torch.optim.Adam(
        [{"params": visual, "lr": rates["ve"]}, {"params": model.encoder_decoder.parameters(), "lr": rates["ed"]}],
        betas=(0.9, 0.98),
        eps=1e-9,
        weight_decay=5e-5,
        amsgrad=True,
    )
    expected = golden.config["eval_mode_train_losses"]
    for step, value in enumerate(expected):
        loss = training_loss(model, golden)
        assert loss.item() == pytest.approx(value, rel=1e-4), step
        if step < len(expected) - 1:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def options(golden: Golden, **changes) -> DecodingOptions:
    return DecodingOptions(max_seq_length=golden.options["max_seq_length"], **changes)


def test_beam_search(model, golden, features):
    arrays = golden.arrays
    found = model.search(None, features=features, decoding=options(golden, beam_size=3, sample_n=3))
    assert torch.equal(found.tokens[:, 0], arrays["beam_seq"])
    close(found.log_probs[:, 0], arrays["beam_token_logprobs"], 2e-5)
    close(found.scores, arrays["beam_all_p"], 2e-5)
    close(found.scores[:, 0], torch.tensor(golden.config["beam_sum_logprob"]), 2e-5)
    assert torch.equal(found.tokens, arrays["beam_all_seq"].clamp(min=0))
    best = model.generate(golden.images(), decoding=options(golden, beam_size=3))
    assert torch.equal(best, arrays["beam_seq"])


def test_beam_of_width_one(model, golden, features):
    found = model.search(None, features=features, decoding=options(golden, beam_size=1))
    assert torch.equal(found.tokens[:, 0], golden.arrays["beam1_seq"])
    close(found.scores, golden.arrays["beam1_p"], 2e-5)


@pytest.mark.parametrize("block_trigrams", [False, True])
def test_greedy(model, golden, features, block_trigrams):
    decoding = options(golden, sample_method="greedy", block_trigrams=block_trigrams)
    found = model.search(None, features=features, decoding=decoding)
    suffix = f"bt{int(block_trigrams)}"
    assert torch.equal(found.tokens[:, 0], golden.arrays[f"greedy_seq_{suffix}"])
    close(found.log_probs[:, 0], golden.arrays[f"greedy_token_logprobs_{suffix}"], 2e-5)
    close(found.scores[:, 0], torch.tensor(golden.config[f"greedy_sum_logprob_{suffix}"]), 2e-5)


def test_memory_loads_from_either_of_its_names(model, golden):
    for dropped in ("encoder_decoder.cmn.", "encoder_decoder.model.cmn."):
        state = {name: value for name, value in model.state_dict().items() if not name.startswith(dropped)}
        other = build(golden)
        torch.nn.init.zeros_(other.encoder_decoder.cmn.linears[0].weight)
        other.load_state_dict(state)
        assert torch.equal(other.encoder_decoder.cmn.linears[0].weight, model.encoder_decoder.cmn.linears[0].weight)


def test_full_size_names_shapes_and_order():
    published = json.loads((Path(__file__).resolve().parents[1] / "golden" / "state_dict_r2gencmn.json").read_text())
    with torch.device("meta"):
        model = R2GenCMN(visual_extractor=VisualExtractor("resnet101"), num_ids=761, settings=Settings())
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == published["shapes"]
    assert [name for name, _ in model.named_parameters()] == published["parameter_order"]
