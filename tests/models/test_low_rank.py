"""Low-rank adapters: what learns, that merged and separate weights compute the same, and what peft reads of them."""

import json
from dataclasses import replace

import pytest
import torch

from models.encoder_decoder import EncoderDecoder, Settings
from models.encoder_decoder_language import describe_language
from modules.inference.hub_format import write_adapters
from modules.layers.low_rank import adapter_files, merge_adapters
from tests.models.test_encoder_decoder import BEGIN, END, ROWS, Extractor, build, features_of

# The layers that have adapters by default, in one layer of the decoder.
DEFAULTS = {
    "gpt2": {"attn.c_attn"},
    "bert": {"attention.self.query", "attention.self.value"},
    "bart": {"self_attn.q_proj", "self_attn.v_proj", "encoder_attn.q_proj", "encoder_attn.v_proj"},
    "t5": {"0.SelfAttention.q", "0.SelfAttention.v", "1.EncDecAttention.q", "1.EncDecAttention.v"},
    "llama": {"self_attn.q_proj", "self_attn.v_proj"},
    "qwen2": {"self_attn.q_proj", "self_attn.v_proj"},
}
TOKENS = torch.tensor([[0, 4, 5, 6], [0, 6, 7, 2]])


def adapted(folder, kind, **options):
    """transformers' model in ``folder``, and the backbone that read it there and was given adapters."""
    reference, plain = build(folder, kind)
    text = describe_language(json.loads((folder / "config.json").read_text()), "here")
    settings = replace(Settings(decoder_config=text, lora_rank=2), **options)
    special = {"begin_id": BEGIN, "end_id": END, "keeps_vocabulary": True}
    backbone = EncoderDecoder(
        visual_extractor=Extractor(), num_ids=ROWS, settings=settings, folder=folder, **special
    ).eval()
    backbone.projection.load_state_dict(plain.projection.state_dict())
    return reference, plain, backbone


def move(backbone):
    """Make the adapters do something."""
    with torch.no_grad():
        for name, value in backbone.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value))


@pytest.mark.parametrize("kind", DEFAULTS)
def test_adapters_alone_learn_and_merged_weights_are_equal(tmp_path, kind):
    _, plain, backbone = adapted(tmp_path, kind)
    features = features_of(2, masked=True)
    first = plain(None, TOKENS, features=features).log_probs
    torch.testing.assert_close(backbone(None, TOKENS, features=features).log_probs, first)
    # With B = 0 the gradient of A is 0, and it would look as if nothing arrived.
    move(backbone)
    output = backbone.train()(None, TOKENS, features=features)
    output.log_probs[..., 1].sum().backward()
    moved = {name for name, value in backbone.named_parameters() if value.grad is not None and value.grad.any()}
    fresh = ("crossattention", "ln_cross_attn") if kind in ("gpt2", "bert") else ()
    layers = {name.partition(".lora_")[0] for name in moved if "lora_" in name}
    assert {name for name in layers if name.endswith(tuple(f".{end}" for end in DEFAULTS[kind]))} == layers
    assert len(layers) == 2 * len(DEFAULTS[kind])  # of both layers
    others = {name for name in moved if "lora_" not in name and not any(part in name for part in fresh)}
    assert others == {name for name, _ in backbone.named_parameters() if name.startswith("projection.")}
    assert {name for name, value in backbone.named_parameters() if value.requires_grad} >= moved

    with torch.no_grad():
        before = backbone.eval()(None, TOKENS, features=features).log_probs
        assert not torch.allclose(before, first, atol=1e-2)
        merge_adapters(backbone)
        torch.testing.assert_close(backbone(None, TOKENS, features=features).log_probs, before, rtol=1e-5, atol=1e-5)
    assert backbone.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_peft_reads_the_adapters_on_the_original_model(tmp_path, kind):
    from peft import PeftModel

    reference, _, backbone = adapted(tmp_path, kind)
    move(backbone)
    write_adapters(tmp_path / "adapter", *adapter_files(backbone.decoder.model))
    found = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    inputs = {"inputs_embeds": torch.randn(2, 5, 16)}
    torch.testing.assert_close(found(**inputs).logits, backbone.decoder.model(**inputs).logits)
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()


def test_layers_are_named_by_flag(tmp_path):
    _, _, backbone = adapted(tmp_path, "llama", lora_targets="gate_proj,down_proj")
    assert {
        name.partition(".lora_")[0].rpartition(".")[2] for name, _ in backbone.named_parameters() if "lora_" in name
    } == {"gate_proj", "down_proj"}
    _, _, every = adapted(tmp_path, "llama", lora_targets="all-linear")
    layers = {name.partition(".lora_")[0] for name, _ in every.named_parameters() if "lora_" in name}
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    with pytest.raises(ValueError, match="lora_targets wq: no linear layer of that name; there are down_proj, gate_p"):
        adapted(tmp_path, "llama", lora_targets="q_proj,wq")


def test_scale_is_alpha_over_rank(tmp_path):
    _, _, backbone = adapted(tmp_path, "llama", lora_alpha=6)
    layer = backbone.decoder.model.model.layers[0].self_attn.q_proj
    move(backbone)
    x = torch.randn(3, 16)
    added = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * added)


def test_a_vocabulary_of_words_is_trained_beside_the_adapters(tmp_path):
    build(tmp_path, "gpt2")
    text = describe_language(json.loads((tmp_path / "config.json").read_text()), "here")
    settings = Settings(decoder_config=text, lora_rank=2)
    backbone = EncoderDecoder(visual_extractor=Extractor(), num_ids=11, settings=settings, folder=tmp_path)
    learning = {name for name, value in backbone.named_parameters() if value.requires_grad}
    assert backbone.vocabulary_entry in learning
    assert not any(".mlp." in name or name.endswith("wpe.weight") for name in learning)
