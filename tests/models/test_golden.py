"""Every backbone against vectors computed with its published code (GOLDEN_DIR, see tests/golden_support.py)."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import backbone_class, settings_class
from models.base import Backbone, VisualFeatures
from modules.decoding.options import DecodingOptions
from modules.layers.prototypes import label_contrastive_loss
from modules.layers.visual_extractor import VisualExtractor
from tests.golden_support import GOLDEN_DIR, load_visual, published_settings, read_golden, visual_tensor

torch.set_num_threads(1)
TABLES = Path(__file__).resolve().parents[1] / "golden"
TIGHT = 2e-5  # several times the float32 noise of the stored vectors
CMN_ADAM = {"betas": (0.9, 0.98), "eps": 1e-9}
R2GENCMN_PARTS = {
    "encoder_decoder.att_embed": ["mid_att_embed_out"],
    "encoder_decoder.cmn": ["mid_cmn_visual_response", "mid_cmn_text_response"],
    "encoder_decoder.model.encoder": ["mid_encoder_out"],
    "encoder_decoder.model.decoder": ["mid_decoder_out"],
}


class GivenFeatures(nn.Module):
    """In place of a visual extractor where features are given."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


@dataclass(frozen=True)
class Published:
    """What differs between the published codes: their settings' names, their optimiser, what they recorded."""

    name: str
    folders: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # that the vectors were made with, beside their own
    arguments: dict[str, Any] = field(default_factory=dict)  # of the constructor
    parts: dict[str, list[str]] = field(default_factory=dict)  # module -> arrays of its outputs, in order of calls
    adam: dict[str, Any] = field(default_factory=dict)
    clip_value: float = 0.0
    own_entries: dict[str, list[int]] = field(default_factory=dict)  # of the state dict, which published files lack
    has_labels: bool = False
    has_greedy: bool = True


CASES = {
    "R2Gen": Published(
        "r2gen",
        ("iu_xray", "mimic_cxr"),
        parts={
            "encoder_decoder.att_embed": ["mid_att_embed_out"],
            "encoder_decoder.model.encoder": ["mid_encoder_out"],
            "encoder_decoder.model.rm": ["mid_relational_memory"],
            "encoder_decoder.model.decoder": ["mid_decoder_out"],
        },
        clip_value=0.1,
    ),
    "R2GenCMN": Published("r2gencmn", ("iu_xray", "mimic_cxr"), parts=R2GENCMN_PARTS, adam=CMN_ADAM),
    "XProNet": Published(
        "xpronet",
        ("iu_xray", "mimic_cxr"),
        settings={"xpronet_labels": "reference", "label_loss_weight": 0.0},
        arguments={"no_finding": 0},
        parts=R2GENCMN_PARTS
        | {
            "encoder_decoder.fuse_feature": ["mid_fused_visual"],
            "encoder_decoder.model.fuse_feature": ["mid_fused_text"],
        },
        adam=CMN_ADAM,
        own_entries={"label_head.weight": [14, 2048], "label_head.bias": [14]},
        has_labels=True,
        has_greedy=False,  # its published greedy routine is broken
    ),
    "VisualGPT": Published("visualgpt", ("tau0.0", "tau0.2"), settings={"visualgpt_compat": "published"}),
}
R2GEN_FAMILY = [(name, folder) for name, case in CASES.items() if case.parts for folder in case.folders]
EVERY = [(name, folder) for name, case in CASES.items() for folder in case.folders]


class Reference:
    """The vectors of one folder, with the model of the same weights."""

    def __init__(self, name: str, folder: str):
        self.case, self.golden = CASES[name], read_golden(name, folder)
        self.arrays, self.config = self.golden.arrays, self.golden.config
        self.is_gpt = name == "VisualGPT"
        self.model = self.build()
        patches = self.arrays["features" if self.is_gpt else "att_feats"]
        self.features = VisualFeatures(patches, None, patches.mean(dim=1))
        self.labels = self.arrays["labels"] if self.case.has_labels else None

    def build(self) -> Backbone:
        kind, settings = backbone_class(self.case.name), settings_class(self.case.name)
        config, arguments = self.config, dict(self.case.arguments)
        if self.is_gpt:
            names = {"d_ff": "enc_d_ff", "num_heads": "heads", "num_layers": "enc_layers", "gpt2_layers": "n_layer"}
            given = {name: config[there] for name, there in names.items()}
            given |= {"d_model": config["d_model"], "gpt2_positions": config["n_positions"], "tau": config["tau"]}
            extractor: nn.Module = GivenFeatures(config["d_in"])
            arguments |= {"begin_id": config["bos"], "end_id": config["eos"], "pad_token": config["pad"]}
            arguments |= {"context": config["n_ctx"], "num_ids": config["V"]}
        else:
            options = self.golden.options
            given = {item.name: options[item.name] for item in fields(settings) if item.name in options}
            extractor = VisualExtractor(options["visual_extractor"])
            load_visual(extractor, config["visual_seed"])
            arguments["num_ids"] = config["vocab_size"] + 1
        model = kind(visual_extractor=extractor, settings=settings(**(given | self.case.settings)), **arguments)
        own = ("visual_extractor.", *(name for name in self.case.own_entries))
        kept = {name: value for name, value in model.state_dict().items() if name.startswith(own)}
        model.load_state_dict(self.golden.state | kept)  # strict: the stored file has no position tables
        return model.eval()

    @property
    def ids(self) -> Tensor:
        """(B, T + 1) tokens of the reports: 0 for begin, end and padding, and the end's id for GPT-2's word 0."""
        if not self.is_gpt:
            return self.arrays["report_ids"]
        ids, config = self.arrays["seq"], self.config
        special = torch.isin(ids, torch.tensor([config["bos"], config["eos"], config["pad"]]))
        return torch.where(special, 0, torch.where(ids == 0, config["eos"], ids))

    def losses(self, model: Backbone) -> dict[str, Tensor]:
        """Cross entropy over the reports' words, and the backbone's further losses."""
        mask = self.arrays["seq"] != self.config["pad"] if self.is_gpt else self.arrays["report_masks"]
        images, features = (None, self.features) if self.is_gpt else (self.golden.images(), None)
        output = model(images, self.ids[:, :-1], features=features, labels=self.labels)
        nll = -output.log_probs.gather(-1, self.ids[:, 1:, None]).squeeze(-1)
        return {"ce": (nll * mask[:, 1:]).sum() / mask[:, 1:].sum(), **output.auxiliary}

    def search(self, **changes):
        length = self.config["beam_max_len"] if self.is_gpt else self.golden.options["max_seq_length"]
        decoding = DecodingOptions(max_seq_length=length, **changes)
        return self.model.search(None, features=self.features, labels=self.labels, decoding=decoding)

    def published_ids(self, tokens: Tensor) -> Tensor:
        """What the published search returns for ``tokens``: with GPT-2 the end's id, then zeros."""
        if not self.is_gpt:
            return tokens
        end = (tokens == 0) & ((tokens == 0).cumsum(dim=-1) == 1)
        return torch.where(end, self.config["eos"], torch.where(tokens == self.config["eos"], 0, tokens))

    def published_columns(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities in the order of the published ids."""
        if not self.is_gpt:
            return log_probs
        order = torch.arange(log_probs.size(-1))
        order[0], order[self.config["eos"]] = self.config["eos"], 0
        return log_probs[..., order]


@pytest.fixture(scope="module", params=EVERY, ids="-".join)
def reference(request) -> Reference:
    return Reference(*request.param)


@pytest.fixture(scope="module", params=R2GEN_FAMILY, ids="-".join)
def family(request) -> Reference:
    return Reference(*request.param)


def close(actual: Tensor, expected: Tensor, tolerance: float = TIGHT) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def test_log_probs_and_losses(reference):
    config = reference.config
    tokens = reference.ids if reference.is_gpt else reference.ids[:, :-1]
    with torch.no_grad():
        output = reference.model(None, tokens, features=reference.features, labels=reference.labels)
        losses = reference.losses(reference.model)
    close(reference.published_columns(output.log_probs), reference.arrays["logprobs"])
    assert losses["ce"].item() == pytest.approx(config["nll" if reference.is_gpt else "ce_loss"], rel=1e-5)
    if reference.case.has_labels:
        assert losses["img_con"].item() == pytest.approx(config["img_con_loss"], abs=1e-6)
        text = reference.golden.options["weight_txt_con_loss"] * config["txt_con_loss"]
        assert losses["txt_con"].item() == pytest.approx(text, rel=1e-4)


def test_gradient_norms(reference):
    model = reference.build()
    sum(reference.losses(model).values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in reference.config["grad_norms"].items():
        if expected is None:
            assert gradients[name] is None, name
        else:
            assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_intermediate_tensors(family):
    seen: dict[str, list[Tensor]] = {name: [] for name in family.case.parts}
    hooks = [
        family.model.get_submodule(name).register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out))
        for name, kept in seen.items()
    ]
    with torch.no_grad():
        output = family.model(None, family.ids[:, :-1], features=family.features, labels=family.labels)
    for hook in hooks:
        hook.remove()
    for part, names in family.case.parts.items():
        for found, name in zip(seen[part], names, strict=False):
            close(found, family.arrays[name], 1e-5)
    assert output.report_features is seen["encoder_decoder.model.decoder"][0]


def test_training_history(family):
    model, rates = family.build(), family.config["eval_mode_train_lr"]
    groups = [
        {"params": model.visual_extractor.parameters(), "lr": rates["ve"]},
        {"params": model.encoder_decoder.parameters(), "lr": rates["ed"]},
    ]
    optimiser = torch.optim.Adam(groups, weight_decay=5e-5, amsgrad=True, **family.case.adam)
    expected = family.config["eval_mode_train_losses"]
    for step, value in enumerate(expected):
        loss = sum(family.losses(model).values())
        assert loss.item() == pytest.approx(value, rel=1e-4), step
        if step < len(expected) - 1:
            optimiser.zero_grad()
            loss.backward()
            if family.case.clip_value:
                nn.utils.clip_grad_value_(model.parameters(), family.case.clip_value)
            optimiser.step()


def test_beam_search(family):
    arrays = family.arrays
    found = family.search(beam_size=3, sample_n=3)
    assert torch.equal(found.tokens[:, 0], arrays["beam_seq"])
    assert torch.equal(found.tokens, arrays["beam_all_seq"].clamp(min=0))
    close(found.log_probs[:, 0], arrays["beam_token_logprobs"])
    close(found.scores, arrays["beam_all_p"])
    close(found.scores[:, 0], torch.tensor(family.config["beam_sum_logprob"]))
    decoding = DecodingOptions(max_seq_length=family.golden.options["max_seq_length"], beam_size=3)
    best = family.model.generate(family.golden.images(), labels=family.labels, decoding=decoding)
    assert torch.equal(best, arrays["beam_seq"])


def test_beam_of_width_one(family):
    found = family.search(beam_size=1)
    assert torch.equal(found.tokens[:, 0], family.arrays["beam1_seq"])
    close(found.scores, family.arrays["beam1_p"])


@pytest.mark.parametrize("block_trigrams", [0, 1])
def test_greedy(family, block_trigrams):
    if not family.case.has_greedy and block_trigrams:
        pytest.skip("the published greedy routine of this backbone is broken")
    found = family.search(sample_method="greedy", block_trigrams=block_trigrams)
    if not family.case.has_greedy:  # without trigram blocking it is the beam of width 1
        assert torch.equal(found.tokens[:, 0], family.arrays["beam1_seq"])
        return
    suffix = f"bt{block_trigrams}"
    assert torch.equal(found.tokens[:, 0], family.arrays[f"greedy_seq_{suffix}"])
    close(found.log_probs[:, 0], family.arrays[f"greedy_token_logprobs_{suffix}"])
    close(found.scores[:, 0], torch.tensor(family.config[f"greedy_sum_logprob_{suffix}"]))


@pytest.mark.parametrize("beam_size", [1, 3, 5])
@pytest.mark.parametrize("folder", CASES["VisualGPT"].folders)
def test_visualgpt_beam_search(folder, beam_size):
    reference = Reference("VisualGPT", folder)
    found = reference.search(beam_size=beam_size, sample_n=beam_size)
    assert torch.equal(reference.published_ids(found.tokens), reference.arrays[f"beam{beam_size}_seq"])
    close(found.log_probs, reference.arrays[f"beam{beam_size}_token_logprobs"])
    close(found.scores, torch.tensor(reference.config[f"beam{beam_size}_sum"]))
    best = reference.search(beam_size=beam_size).tokens[:, 0]
    assert torch.equal(reference.published_ids(best), reference.arrays[f"beam{beam_size}_seq"][:, 0])


@pytest.mark.parametrize("folder", CASES["VisualGPT"].folders)
def test_visualgpt_encoder_and_hidden_states(folder):
    reference = Reference("VisualGPT", folder)
    with torch.no_grad():
        levels, keep = reference.model.encoder(reference.features.patches, None)
        output = reference.model(None, reference.ids, features=reference.features)
    close(levels, reference.arrays["encoder_out"])
    assert torch.equal(~keep, reference.arrays["encoder_mask"])
    close(output.report_features, reference.arrays["decoder_hidden"])


@pytest.mark.parametrize("folder", CASES["R2GenCMN"].folders)
def test_visual_features(folder):
    reference = Reference("R2GenCMN", folder)
    shapes = {key: tuple(value.shape) for key, value in VisualExtractor("resnet18").model.state_dict().items()}
    for key, digest in reference.config["visual_key_sha16"].items():
        raw = visual_tensor(key, shapes[key], reference.config["visual_seed"]).tobytes()
        assert hashlib.sha256(raw).hexdigest()[:16] == digest, key
    with torch.no_grad():
        patches, mask, pooled = reference.model.visual_extractor(reference.golden.images())
    close(patches, reference.arrays["att_feats"], 1e-4)
    assert mask is None
    close(pooled, reference.arrays["fc_feats"].unflatten(1, (-1, patches.size(-1))).mean(dim=1), 1e-4)


def test_memory_loads_from_either_of_its_names():
    reference = Reference("R2GenCMN", "iu_xray")
    for dropped in ("encoder_decoder.cmn.", "encoder_decoder.model.cmn."):
        state = {name: value for name, value in reference.model.state_dict().items() if not name.startswith(dropped)}
        other = reference.build()
        weight = other.encoder_decoder.cmn.linears[0].weight
        nn.init.zeros_(weight)
        other.load_state_dict(state)
        assert torch.equal(weight, reference.model.encoder_decoder.cmn.linears[0].weight)


@pytest.mark.parametrize("case", json.loads((GOLDEN_DIR / "XProNet" / "con_loss" / "cases.json").read_text()), ids=str)
def test_xpronet_contrastive_loss(case):
    with np.load(GOLDEN_DIR / "XProNet" / "con_loss" / "data.npz") as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data.files}
    number, margin = case["case"], case["margin"]
    features = arrays[f"features{number}"].requires_grad_()
    loss = label_contrastive_loss(features, arrays[f"labels{number}"], margin)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    close(features.grad, arrays[f"grad{number}_{margin}"], 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_full_size_names_shapes_and_order(case):
    published = json.loads((TABLES / f"state_dict_{case.name}.json").read_text())
    is_gpt = case.name == "visualgpt"
    settings = settings_class(case.name)(**published_settings(case.name))
    with torch.device("meta"):
        extractor = GivenFeatures(2048) if is_gpt else VisualExtractor("resnet101")
        model = backbone_class(case.name)(
            visual_extractor=extractor, num_ids=50257 if is_gpt else 761, settings=settings, **case.arguments
        )
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert shapes == published["shapes"] | case.own_entries
    assert [name for name, _ in model.named_parameters()] == published["parameter_order"] + list(case.own_entries)
