"""A pretrained decoder in a run: its own tokenizer, a checkpoint that needs its folder no more, sharing, guidance."""

import json
import shutil
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from modules.config import EXPORTED
from modules.flags import flags_in_effect, parse_flags, resolve_config
from modules.inference.hub_format import write_hub_folder
from modules.run.descriptions import with_descriptions
from modules.run.predictor import load_predictor
from modules.run.testing import run_testing
from modules.run.training import run_training
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from scripts import export, plot_attention, predict
from scripts.research import probe_decoder, probe_gradients, probe_image_leakage
from tests.gpt2_support import save_bpe, save_gpt2
from tests.layers.test_hub_encoders import save
from tests.run.test_plugin import LLAMA


@pytest.fixture
def gpt2(tmp_path):
    """Folder of a GPT-2 of the smallest size with a tokenizer of its own."""
    save_bpe(tmp_path / "gpt2", special=["<|endoftext|>"])
    save_gpt2(tmp_path / "gpt2", 300)
    return tmp_path / "gpt2"


@pytest.fixture
def llama(tmp_path):
    """Folder of a Llama of the smallest size whose tokenizer has <s> and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"the heart lungs are is normal clear no . effusion pleural".split()]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "llama")
    sizes = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), hidden_size=8, intermediate_size=8, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def flags_of(folder):
    return ["--model_name", "hf", "--decoder", str(folder), "--ithn", "off"]


@pytest.mark.thorough
def test_a_run_its_test_resumption_and_export_need_the_folder_once(train, gpt2, tmp_path):
    folder = train(*flags_of(gpt2))
    shutil.rmtree(gpt2)
    content = load_checkpoint(folder / "model_best.pth")
    assert "bpe" in content["vocabulary"] and json.loads(content["config"]["decoder_config"])["n_embd"] == 16
    given, _ = parse_flags(["--load", str(folder / "model_best.pth")], "main_test.py", "")
    run_testing(given, [])
    given, _ = parse_flags(["--save_dir", str(folder), "--resume", "auto", "--epochs", "2"], "main_train.py", "")
    run_training(given, [])
    assert load_checkpoint(folder / "current_checkpoint.pth")["epoch"] == 2
    write_hub_folder(tmp_path / "out", content, "", EXPORTED)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    load_predictor(str(tmp_path / "out"), {})


@pytest.mark.slow
@pytest.mark.parametrize("described", ["", LLAMA])
def test_every_program_takes_it(described, train, demo, demo_index, demo_labels, tmp_path, monkeypatch, capsys):
    """Or says in a line what the decoder does not have: one that reads a prefix has no cross-attention."""
    flags = ["--model_name", "hf", "--decoder_config", described, "--negative_index", demo_index, "--views", "paired"]
    best = train(*flags, "--beam_size", 1) / "model_best.pth"
    study = next(path for path in (demo / "images").iterdir() if path.is_dir())
    views = sorted(study.glob("*.png"))
    page = tmp_path / "page.html"

    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, arguments)])
        assert not program.main()
        return capsys.readouterr().out

    call(predict, "--load", best, "--html", page, "--group", "all", "--quiet", *views)
    assert page.is_file()
    call(export, best, "--program", tmp_path / "program")
    assert str(best) in call(probe_gradients, "--load", best, "--batches", 1)
    assert str(best) in call(probe_image_leakage, "--load", best)
    monkeypatch.setattr("scripts.research.probe_images.NEEDED", {"train": 1, "val": 1, "test": 1})
    for program, more in (
        (plot_attention, ["--out", tmp_path / "maps", *views]),
        (probe_decoder, ["--label_path", demo_labels]),
    ):
        if not described:
            assert call(program, "--load", best, *more)
        else:
            with pytest.raises(InputError, match="attention|attend"):
                call(program, "--load", best, *more)


@pytest.mark.thorough
def test_a_prefix_decoder_with_two_views_and_guidance(train, llama):
    folder = train(*flags_of(llama), "--guidance", 0.5, "--freeze_decoder", "true", "--shard_parameters", "true")
    line = "no effect here (one process has all parameters): --shard_parameters"
    assert (folder / "train.log").read_text().count(line) == 1
    content = load_checkpoint(folder / "model_best.pth")
    assert content["vocabulary"]["special"] == ["<s>", "</s>", "<pad>"]
    first = LlamaForCausalLM.from_pretrained(llama).state_dict()
    for name, value in first.items():
        assert torch.equal(content["state_dict"][f"decoder.model.{name}"], value), name


@pytest.fixture
def adapted(train, llama, demo_index, tmp_path):
    """Results folder of a run with ITHN and adapters on the decoder and on a ViT, whose folders are gone since."""
    (tmp_path / "vit").mkdir()
    save(tmp_path / "vit", "vit", image_size=32)
    encoder = ["--visual_extractor", f"hf:{tmp_path / 'vit'}", "--unfreeze", "lora:2"]
    decoder = ["--model_name", "hf", "--decoder", llama, "--lora_rank", 2]
    folder = train(*encoder, *decoder, "--negative_index", demo_index, "--beam_size", 1)
    content = load_checkpoint(folder / "model_best.pth")
    for name, value in LlamaForCausalLM.from_pretrained(llama).state_dict().items():
        kept = {key.replace(".base_layer", ""): key for key in content["state_dict"]}
        assert torch.equal(content["state_dict"][kept[f"decoder.model.{name}"]], value), name
    learnt = [name for name, value in content["state_dict"].items() if "lora_B" in name and value.any()]
    assert {name.partition(".")[0] for name in learnt} == {"visual_extractor", "decoder"}
    shutil.rmtree(llama)
    shutil.rmtree(tmp_path / "vit")
    return folder


def test_adapters_are_resumed_tested_and_kept_apart_from_other_ranks(adapted):
    run_testing(*parse_flags(["--load", str(adapted / "model_best.pth")], "main_test.py", ""))
    argv = ["--save_dir", str(adapted), "--resume", "auto", "--epochs", "2"]
    with pytest.raises(InputError, match="--lora_rank 4: the run of --resume .* began with 2"):
        run_training(*parse_flags([*argv, "--lora_rank", "4"], "main_train.py", ""))
    run_training(*parse_flags(argv, "main_train.py", ""))
    assert load_checkpoint(adapted / "current_checkpoint.pth")["epoch"] == 2
    other = ["--load", str(adapted / "model_best.pth"), "--save_dir", str(adapted.parent / "other")]
    for flag, value in (("lora_rank", "4"), ("unfreeze", "last:1")):
        with pytest.raises(InputError, match=f"--{flag} {value}: contradicts checkpoint"):
            run_training(*parse_flags([*other, f"--{flag}", value], "main_train.py", ""))


def test_adapters_are_exported_merged_or_separate(adapted, tmp_path):
    images = torch.randint(0, 256, (3, 2, 3, 32, 32), dtype=torch.uint8)
    found = {}
    for how in ("separate", "merged"):
        given = export.build_parser().parse_args([str(adapted), "--out", "x", "--lora", how])
        export.to_folder(adapted / "model_best.pth", tmp_path / how, given)
        predictor = load_predictor(str(tmp_path / how), {})
        names = predictor.backbone.state_dict()
        assert any("lora_" in name for name in names) == (how == "separate")
        assert (tmp_path / how / "adapter").is_dir() == (how == "separate")
        with torch.no_grad():
            features = predictor.backbone.extract(predictor.transform.normalise(images))
            found[how] = predictor.backbone(None, torch.tensor([[0, 4, 5]] * 3), features=features).log_probs
    torch.testing.assert_close(found["merged"], found["separate"], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="--lora merged: .* has no low-rank adapters"):
        export.to_checkpoint(tmp_path / "merged", tmp_path / "merged.pth")
        export.to_folder(tmp_path / "merged.pth", tmp_path / "again", given)


def test_what_cannot_be_a_decoder_is_refused_in_a_line(tmp_path):
    given = {"model_name": "hf", "decoder": str(tmp_path / "none")}
    with pytest.raises(InputError, match="--decoder .*none: no such folder"):
        with_descriptions(given, None)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match=r"^--decoder .*: model_type 'vit'; the decoders are gpt2"):
        with_descriptions(given | {"decoder": str(tmp_path)}, None)
    with pytest.raises(InputError, match="named by a checkpoint that lacks its description, decoder_config"):
        with_descriptions({}, given)


def test_flags_that_a_decoder_makes_idle_are_named():
    given = {"model_name": "hf", "d_model": 64, "dropout": 0.2, "lora_targets": "c_attn"}
    for more, idle in (({}, ["lora_targets"]), ({"decoder_config": "{}"}, ["d_model", "dropout", "lora_targets"])):
        left, lines = flags_in_effect(given | more, resolve_config(given | more))
        assert set(given) - set(left) == set(idle)
        assert all(any(f"--{name}" in line and "no effect here (" in line for line in lines) for name in idle)


def test_a_configuration_alone(tmp_path):
    path = tmp_path / "small.json"
    path.write_text('{"model_type": "gpt2", "n_layer": 2, "auto_map": {"AutoModel": "evil.Model"}}')
    found = with_descriptions({"model_name": "hf", "decoder_config": str(path)}, None)
    assert json.loads(found["decoder_config"]) == {"model_type": "gpt2", "n_layer": 2}


@pytest.mark.parametrize("described", ["", '{"model_type": "bert", "max_position_embeddings": 1024}'])
def test_a_report_longer_than_the_decoders_positions_is_refused(train, described):
    with pytest.raises(InputError, match="--max_seq_length 1025: the decoder has positions for 1024 tokens"):
        train("--model_name", "hf", "--max_seq_length", 1025, "--decoder_config", described, "--ithn", "off")


def test_a_configuration_of_no_decoder_is_refused(train):
    with pytest.raises(InputError, match="--decoder_config: not the configuration of a decoder"):
        train("--model_name", "hf", "--decoder_config", '{"model_type": "vit"}', "--ithn", "off")
