"""Decoders of transformers on visual tokens: log-probabilities, greedy choices and beams are transformers' own."""

import dataclasses
import json

import pytest
import torch
import transformers
from torch import nn

from models.base import VisualFeatures
from models.encoder_decoder import EncoderDecoder, Settings
from models.encoder_decoder_language import describe_language
from modules.decoding.capture import FixedStep
from modules.decoding.options import DecodingOptions
from modules.decoding.search import Search
from modules.inference.attention import recorded_attention
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.errors import InputError

torch.set_num_threads(1)
ROWS, WIDTH, BEGIN, END, LENGTH = 23, 16, 1, 2, 9
SMALL = {"vocab_size": ROWS, "pad_token_id": 3, "bos_token_id": BEGIN, "eos_token_id": END}
LLAMA = SMALL | {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
BART = SMALL | {
    "d_model": WIDTH,
    "max_position_embeddings": 32,
    "decoder_start_token_id": BEGIN,
    "forced_eos_token_id": None,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16),
}
CONFIGS = {
    "gpt2": SMALL | {"n_embd": WIDTH, "n_head": 2, "n_layer": 2, "n_positions": 32, "add_cross_attention": True},
    "bert": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    | {"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False},
    "bart": BART,
    "t5": SMALL
    | {"d_model": WIDTH, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 2, "decoder_start_token_id": BEGIN},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}
CLASSES = {
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertLMHeadModel,
    "bart": transformers.BartForConditionalGeneration,
    "t5": transformers.T5ForConditionalGeneration,
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
}


class Extractor(nn.Module):
    """Stands for a visual extractor."""

    width = 6


def build(folder, kind):
    """transformers' model as it saved itself in ``folder``, and the backbone that read it there."""
    torch.manual_seed(4)
    reference = CLASSES[kind](transformers.CONFIG_MAPPING[kind](**CONFIGS[kind])).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name or "ln_" in name))
    reference.save_pretrained(folder)
    settings = Settings(decoder_config=describe_language(json.loads((folder / "config.json").read_text()), "here"))
    backbone = EncoderDecoder(
        visual_extractor=Extractor(),
        num_ids=ROWS,
        settings=settings,
        begin_id=BEGIN,
        end_id=END,
        keeps_vocabulary=True,
        folder=folder,
    ).eval()
    return reference, backbone


def features_of(rows, masked=False):
    torch.manual_seed(5)
    patches, there = 4 * torch.randn(rows, 4, Extractor.width), None
    if masked:
        there = torch.ones(rows, 4, dtype=torch.bool)
        there[0, 2:] = False
    return VisualFeatures(patches, there, patches.mean(1))


def inputs_of(reference, backbone, features, ids):
    """The arguments with which transformers' model reads ``ids`` (B, T) after the visual tokens (B, S, D)."""
    visual, there = backbone.projection(features.patches), features.patch_mask
    if backbone.decoder.language.prefix:
        texts = reference.get_input_embeddings()(ids)
        there = torch.ones(visual.shape[:2], dtype=torch.bool) if there is None else there
        mask = torch.cat([there, torch.ones_like(ids, dtype=torch.bool)], dim=1).long()
        return {"inputs_embeds": torch.cat([visual, texts], dim=1), "attention_mask": mask}
    if backbone.decoder.language.encoder:
        found = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=visual)
        mask = {} if there is None else {"attention_mask": there.long()}
        return {"encoder_outputs": found, "decoder_input_ids": ids, **mask}
    mask = {} if there is None else {"encoder_attention_mask": there.long()}
    return {"encoder_hidden_states": visual, "input_ids": ids, **mask}


def exchanged(ids, end=END):
    """Ids of the language model as ours, where 0 is the end, and the other way round."""
    return torch.where(ids == 0, end, torch.where(ids == end, 0, ids))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_log_probabilities_are_those_of_transformers(tmp_path, kind, masked):
    reference, backbone = build(tmp_path, kind)
    features = features_of(2, masked)
    ids = torch.randint(3, ROWS, (2, 6))
    ids[:, 0] = BEGIN
    ids[0, 3] = 0  # a word of the language model
    tokens = exchanged(ids)
    tokens[:, 0] = 0
    inputs = inputs_of(reference, backbone, features, ids)
    if "inputs_embeds" in inputs:  # as generate places them
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    wanted = reference(**inputs).logits[:, -6:].log_softmax(-1)
    found = backbone(None, tokens, features=features)
    torch.testing.assert_close(found.log_probs[..., 3:], wanted[..., 3:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_probs[..., 0], wanted[..., END], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_probs[..., END], wanted[..., 0], rtol=1e-5, atol=1e-5)
    assert found.report_features.shape == (2, 6, backbone.report_dim)
    assert torch.equal(backbone(None, tokens, features=features, supervised_rows=1).log_probs, found.log_probs[:1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_reports_are_those_of_generate(tmp_path, kind, beams):
    reference, backbone = build(tmp_path, kind)
    features, rows = features_of(6, masked=True), 6
    method = {"sample_method": "greedy", "block_trigrams": 0} if beams == 1 else {"beam_size": beams}
    decoding = DecodingOptions(max_seq_length=LENGTH, **method)
    end = choose_end(backbone, features, decoding)
    found = backbone.generate(None, features=features, decoding=decoding)
    inputs = inputs_of(reference, backbone, features, torch.full((rows, 1), BEGIN))
    assert torch.equal(found, generated(reference, backbone, inputs, end, num_beams=beams, length_penalty=0.0))
    assert bool((found == 0).any())
    if (kind, beams) != ("bert", 1):  # its random weights write the same about every image
        assert len(found.unique(dim=0)) > 1


def choose_end(backbone, features, decoding):
    """Make a word the end that no report begins with, so that some end later on; its id in the language model."""
    endless = backbone.generate(None, features=features, decoding=decoding)
    words = [word for word in endless.unique().tolist() if word != BEGIN]
    ours = next((word for word in words if word in endless[:, 1:] and word not in endless[:, 0]), words[0])
    backbone.end_id = int(exchanged(torch.tensor(ours)))
    backbone.exchanged = torch.tensor([0, backbone.end_id])
    return backbone.end_id


def generated(reference, backbone, inputs, end, **options):
    """What transformers' ``generate`` writes, as our tokens (B, LENGTH)."""
    # generate makes gpt2 and bert a cache without room for the visual tokens.
    cached = backbone.decoder.config.model_type not in ("gpt2", "bert")
    options = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": end, "pad_token_id": end, **options}
    wanted = reference.generate(**inputs, **options, use_cache=cached)
    wanted = wanted if backbone.decoder.language.prefix else wanted[:, 1:]
    return exchanged(nn.functional.pad(wanted, (0, LENGTH - wanted.size(1)), value=end), end)


RULES = {
    "repetition": {"repetition_penalty": 1.6},
    "n-grams": {"no_repeat_ngram_size": 2},
    "shortest": {"min_length": 6},
    "long": {"length_penalty": 2.0},
    "short": {"length_penalty": -1.0},
    "all": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_length": 4, "length_penalty": 1.0},
}


@pytest.mark.parametrize(
    ("kind", "beams", "rules"),
    [
        *(("gpt2", 3, rules) for rules in RULES),
        *(("gpt2", 1, rules) for rules in ("repetition", "all")),
        *(("llama", 3, rules) for rules in ("long", "all")),
    ],
)
@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")
@torch.no_grad()
def test_reports_under_rules_are_those_of_generate(tmp_path, kind, beams, rules):
    """Begin, which transformers' rules take for a word, is ruled out on both sides.

    Greedy decoding there penalises logits; here log-probabilities are penalised by every search, as its beams do.
    """
    reference, backbone = build(tmp_path, kind)
    features, rows = features_of(6, masked=True), 6
    method = {"sample_method": "greedy", "block_trigrams": 0} if beams == 1 else {"beam_size": beams}
    plain = DecodingOptions(max_seq_length=LENGTH, **method)
    end = choose_end(backbone, features, plain)
    backbone.unk_id = BEGIN
    ours = dict(RULES[rules])
    if (beams, rules) == (1, "all"):  # there, penalties of log-probabilities would come last
        del ours["repetition_penalty"]
    found = backbone.generate(None, features=features, decoding=dataclasses.replace(plain, **ours))
    theirs = {"length_penalty": 0.0, **ours, "suppress_tokens": [BEGIN], "num_beams": beams}
    theirs["min_new_tokens"] = theirs.pop("min_length", None)
    if beams == 1 and (penalty := theirs.pop("repetition_penalty", None)):
        normalised = [transformers.LogitNormalization(), transformers.RepetitionPenaltyLogitsProcessor(penalty)]
        theirs["logits_processor"] = transformers.LogitsProcessorList(normalised)
    inputs = inputs_of(reference, backbone, features, torch.full((rows, 1), BEGIN))
    assert torch.equal(found, generated(reference, backbone, inputs, end, **theirs))
    if rules != "short":
        unruled = generated(reference, backbone, inputs, end, num_beams=beams, length_penalty=0.0)
        assert not torch.equal(found, unruled)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "bert"])
@torch.no_grad()
def test_steps_of_one_shape_write_the_same(tmp_path, kind, masked, monkeypatch):
    """As a CUDA graph needs them: every slot is seen through a mask. Types that take no such mask grow."""
    _, backbone = build(tmp_path, kind)
    features, made = features_of(3, masked), []
    options = [DecodingOptions(max_seq_length=LENGTH, **how) for how in ({"beam_size": 3}, {"sample_method": "greedy"})]
    wanted = [backbone.search(None, features=features, decoding=decoding) for decoding in options]

    def fixed(search, session):
        made.append(FixedStep.of(search, session, capture=lambda step: None))
        return made[-1]

    run = Search.run
    monkeypatch.setattr(Search, "run", lambda self, session: run(self, session, fixed))
    for decoding, grown in zip(options, wanted, strict=True):
        found = backbone.search(None, features=features, decoding=decoding)
        assert torch.equal(found.tokens, grown.tokens)
        torch.testing.assert_close(found.log_probs, grown.log_probs, rtol=1e-4, atol=1e-4)
    assert [step is not None for step in made] == [kind != "bert"] * 2


@pytest.mark.parametrize("kind", ["gpt2", "bert", "bart", "t5"])
@torch.no_grad()
def test_attention_is_recorded_where_it_is_asked_for(tmp_path, kind):
    _, backbone = build(tmp_path, kind)
    features, tokens = features_of(2, masked=True), torch.tensor([[0, 4, 5], [0, 6, 7]])
    plain = backbone(None, tokens, features=features).log_probs
    with recorded_attention(backbone.cross_attention()) as found:
        torch.testing.assert_close(backbone(None, tokens, features=features).log_probs, plain, rtol=1e-5, atol=1e-5)
    assert [part.shape for part in found] == [(2, 2, 3, 4)] * 2
    assert not found[0][0, :, :, 2:].any()  # absent
    torch.testing.assert_close(found[1].sum(-1), torch.ones(2, 2, 3))
    backbone(None, tokens, features=features)
    assert len(found) == 2


@pytest.mark.parametrize("kind", ["gpt2", "bert", "bart", "t5"])
@torch.no_grad()
def test_what_attention_reads_is_its_modules_output(tmp_path, kind):
    _, backbone = build(tmp_path, kind)
    features, tokens, read = features_of(2), torch.tensor([[0, 4, 5], [0, 6, 7]]), []
    backbone.cross_attention()[-1].register_forward_hook(lambda module, given, output: read.append(output))
    for _ in range(2):
        backbone(None, tokens, features=features)
        features.patches[0] *= -1
    assert read[0].shape == (2, 3, backbone.report_dim)
    torch.testing.assert_close(read[1][1], read[0][1])
    assert not torch.allclose(read[1][0], read[0][0], atol=1e-3)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_every_parameter_learns_but_those_of_a_frozen_decoder(frozen, own):
    settings = Settings(d_model=8, d_ff=8, num_heads=2, freeze_decoder=frozen)
    backbone = EncoderDecoder(visual_extractor=Extractor(), num_ids=9, settings=settings, keeps_vocabulary=own)
    output = backbone(None, torch.tensor([[0, 4, 5]]), features=features_of(1))
    output.log_probs[..., 1].sum().backward()
    silent = {name for name, value in backbone.named_parameters() if value.grad is None}
    drawn = ("crossattention", "ln_cross_attn", *(() if own else ("wte", "lm_head")))
    kept = {name for name, _ in backbone.named_parameters() if "decoder." in name and not any(k in name for k in drawn)}
    assert silent == (kept if frozen else set())


def test_a_vocabulary_of_words_keeps_the_other_weights(tmp_path):
    reference, _ = build(tmp_path, "gpt2")
    text = describe_language(json.loads((tmp_path / "config.json").read_text()), "here")
    backbone = EncoderDecoder(
        visual_extractor=Extractor(), num_ids=11, settings=Settings(decoder_config=text), folder=tmp_path
    )
    assert backbone.state_dict()[backbone.vocabulary_entry].shape == (11, WIDTH)
    assert torch.equal(
        backbone.decoder.model.transformer.h[1].mlp.c_fc.weight, reference.transformer.h[1].mlp.c_fc.weight
    )


def test_pretrained_gpt2_without_cross_attention_gains_it(tmp_path):
    sizes = {key: value for key, value in CONFIGS["gpt2"].items() if key != "add_cross_attention"}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    text = describe_language(json.loads((tmp_path / "config.json").read_text()), "here")
    EncoderDecoder(visual_extractor=Extractor(), num_ids=ROWS, settings=Settings(decoder_config=text), folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not the configuration of a decoder"),
        ('{"model_type": "vit"}', "not the configuration of a decoder"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "not the configuration of a decoder"),
    ],
)
def test_what_is_no_decoder_is_refused(text, part):
    with pytest.raises(ValueError, match=part):
        EncoderDecoder(visual_extractor=Extractor(), num_ids=9, settings=Settings(decoder_config=text))


def test_too_few_embeddings_are_refused():
    text = json.dumps({"model_type": "gpt2", "vocab_size": 5, "n_embd": 8, "n_head": 2, "n_layer": 1})
    with pytest.raises(ValueError, match="its 5 token embeddings are fewer than the 9 tokens"):
        EncoderDecoder(
            visual_extractor=Extractor(), num_ids=9, settings=Settings(decoder_config=text), keeps_vocabulary=True
        )


@pytest.mark.parametrize(
    ("encoder", "patches", "width", "decoder", "report_dim"),
    [
        (
            {"model_type": "cvt", "depth": [1, 4, 16]},  # CvT-21
            (384, 24 * 24),
            384,
            {"model_type": "gpt2", "n_layer": 6, "vocab_size": 50257},  # DistilGPT2
            768,
        ),
        (
            {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},  # Swin-B
            (224, 7 * 7),
            1024,
            {"model_type": "llama"},  # the defaults are the 7 B's sizes
            4096,
        ),
    ],
)
def test_published_systems_have_their_sizes(encoder, patches, width, decoder, report_dim):
    size, count = patches
    look = {"library": "transformers", "config": encoder, "mean": [0.5], "std": [0.5], "size": size}
    with torch.device("meta"):
        extractor = VisualExtractor("hf:x", description=json.dumps(look), image_size=size)
        settings = Settings(decoder_config=json.dumps(decoder))
        backbone = EncoderDecoder(
            visual_extractor=extractor, num_ids=32000, settings=settings, end_id=2, keeps_vocabulary=True
        )
    assert (extractor.patches_per_view, extractor.width, backbone.report_dim) == (count, width, report_dim)
    number = sum(parameter.numel() for parameter in backbone.decoder.parameters()) / 1e6
    # Six layers of DistilGPT2 gain 6 x (768 x 3 x 768 + 768 x 768 and norms) of cross-attention.
    assert number == pytest.approx(96.1 if decoder["model_type"] == "gpt2" else 6738.4, rel=2e-3)


TINY_GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 64}
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
    "vocab_size": 9,
}


def from_flags(decoder_config, **flags):
    """The backbone of the flags, on an extractor of 4 patches."""
    from modules.data.tokenizers import Tokenizer
    from modules.flags import resolve_config
    from modules.run.build import build_backbone

    described = describe_language(decoder_config, "--decoder_config")
    config = resolve_config({"model_name": "hf", "decoder_config": described, "max_seq_length": 12, **flags})
    extractor = Extractor()
    extractor.patches_per_view = 4
    words = Tokenizer.from_counts({"heart": 3, "lungs": 3}, 1, "iu_xray")
    return build_backbone(config, extractor, words, pretrained=True)


@pytest.mark.parametrize(
    "change",
    [
        {"n_head": 0},
        {"n_head": 3},
        {"n_embd": 0},
        {"n_embd": -8},
        {"activation_function": "foo"},
        {"n_layer": 0},
        {"n_layer": -1},
        {"resid_pdrop": 7},
    ],
)
def test_a_configuration_that_describes_no_model_names_its_flag(change):
    from_flags(TINY_GPT2)
    with pytest.raises(InputError, match="^--decoder_config: ") as error:
        from_flags(TINY_GPT2 | change)
    assert "\n" not in str(error.value)


def test_visual_tokens_before_the_report_need_positions_too():
    from_flags(TINY_LLAMA, dataset_name="iu_xray", max_seq_length=56)  # of 64, two views have 8
    for flags in ({"max_seq_length": 57}, {"max_views": 14}):
        with pytest.raises(InputError, match=r"decoder reads \d+ x 4 visual tokens, .* positions for 64 tokens in all"):
            from_flags(TINY_LLAMA, **flags)
    from_flags(TINY_LLAMA, max_seq_length=60, views="separate")
    from_flags(TINY_GPT2, max_seq_length=64)  # which reads them by cross-attention
