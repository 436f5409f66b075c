"""The command line: people's scripts go on working, types are honest, mistakes get one line."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from models import MODELS, SYSTEMS, backbone_class, settings_class
from modules.config import PRESETS, Config
from modules.flags import Parser, flags_in_effect, parse_flags, preset, resolve_config, stage_settings
from modules.runtime.errors import InputError
from modules.runtime.settings import part_of

# The flags of R2GenCMN's published IU X-Ray command line.
R2GENCMN_SCRIPT = """--image_dir data/iu_xray/images/ --ann_path data/iu_xray/annotation.json --dataset_name iu_xray
--max_seq_length 60 --threshold 3 --batch_size 16 --epochs 100 --save_dir results/iu_xray --step_size 10 --gamma 0.8
--lr_ve 1e-4 --lr_ed 5e-4 --topk 32 --cmm_size 2048 --cmm_dim 512 --seed 7580 --beam_size 3 --log_period 50""".split()


def resolve(*argv):
    given, _ = parse_flags(argv, "main_train.py", "")
    return resolve_config(given)


def test_published_command_line_is_understood():
    config = resolve(*R2GENCMN_SCRIPT)
    assert (config.lr_ve, config.lr_ed, config.step_size, config.gamma) == (1e-4, 5e-4, 10, 0.8)
    assert config.seed == 7580 and config.ithn == "auto"


def test_defaults_are_those_of_r2gencmn():
    config = Config()
    assert (config.lr_ve, config.lr_ed, config.step_size, config.gamma) == (5e-5, 7e-4, 50, 0.1)
    assert (config.adam_betas, config.adam_eps, config.amsgrad) == ((0.9, 0.98), 1e-9, True)
    assert (config.topk, config.cmm_size, config.beam_size, config.seed) == (32, 2048, 3, 9233)


@pytest.mark.parametrize(("text", "value"), [("False", False), ("0", False), ("true", True), ("Yes", True)])
def test_booleans_mean_what_they_say(text, value):
    assert resolve("--amsgrad", text).amsgrad is value


@pytest.mark.parametrize("argv", [["(0.8,0.99)"], ["0.8", "0.99"], ["0.8,", "0.99"]])
def test_pairs_take_two_values(argv):
    assert resolve("--adam_betas", *argv).adam_betas == (0.8, 0.99)


def test_flags_without_effect_are_accepted_and_named():
    given, ignored = parse_flags(["--bos_idx", "0", "--d_vf", "2048", "--lr_ve", "1e-3"], "main_train.py", "")
    assert given == {"lr_ve": 1e-3}
    assert len(ignored) == 2 and "--d_vf" in ignored[1] and "inferred" in ignored[1]


def test_a_preset_gives_defaults():
    config = resolve("--preset", "small", "--epochs", "7")
    assert {name: getattr(config, name) for name in PRESETS["small"]} == PRESETS["small"] | {"epochs": 7}
    assert resolve_config({"preset": "small"}, {"batch_size": 4}).batch_size == 4  # of the checkpoint
    with_backbone = resolve("--preset", "small", "--backbone", "r2gen")
    assert (with_backbone.model_name, with_backbone.d_model, with_backbone.beam_size) == ("r2gen", 256, 3)


@pytest.mark.parametrize(("backbone", "d_model"), [("r2gen", 256), ("r2gencmn", 256), ("visualgpt", 768)])
def test_a_preset_builds_with_a_backbone(backbone, d_model):
    settings = part_of(resolve("--preset", "small", "--backbone", backbone), settings_class(backbone))
    extractor = nn.Identity()
    extractor.width = 12
    with torch.device("meta"):
        model = backbone_class(backbone)(visual_extractor=extractor, num_ids=9, settings=settings)
    assert model.report_dim == d_model


def test_the_values_of_a_preset_are_told_in_short_lines():
    _, notes = parse_flags(["--preset", "small", "--d_ff", "64"], "main_train.py", "")
    assert notes[0].startswith("from --preset small: --visual_extractor tf_efficientnet_lite0  --")
    assert "--lr_ed 0.0015" in " ".join(notes) and "--d_ff" not in " ".join(notes) and max(map(len, notes)) <= 120
    assert parse_flags(["--d_ff", "64"], "main_train.py", "")[1] == []
    _, notes = parse_flags(["--preset", "small", "--backbone", "cvt2distilgpt2"], "main_train.py", "")
    replaced = " ".join(notes).partition("takes the place of the published ")[2]
    assert replaced.startswith("--visual_extractor hf:microsoft/cvt-21-384-22k  ") and "--image_size" not in replaced


def test_names_of_visualgpt_are_translated():
    config = resolve(
        "--workers", "3", "--num_train_epochs", "3.0", "--optimizer_type", "adamw", "--max_grad_norm", "1.0"
    )
    assert (config.num_workers, config.epochs, config.optim, config.clip_norm) == (3, 3, "AdamW", 1.0)


def test_restarts_are_spelled_as_torchrun_does():
    assert resolve("--max-restarts", "3").max_restarts == resolve("--max_restarts", "3").max_restarts == 3


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--lr_ve", "fast"], "--lr_ve"),
        (["--alpha", "nan"], "--alpha nan: must be a finite number"),
        (["--strategy", "harder"], "one of ithn, mochi, prior"),
        (["--d_model", "510"], "--d_model 510 cannot be divided by --num_heads 8"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--adam_betas", "0.9"], "two numbers"),
        (["--amsgrad", "maybe"], "neither true nor false"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--batchsize", "1", "--lr_vee=2"], "--lr_vee=2; did you mean --batch_size and --lr_ve? (see"),
        (["--dataset_name", "iu-xray"], "must be one of iu_xray, mimic_cxr, coco; did you mean iu_xray?"),
        (["--model_name", "r2gen_cmn"], "visualgpt, hf; did you mean r2gencmn?"),
        (["--model_name", "r2gengpt"], "r2gengpt: is a --backbone"),
        (["model_best.pth"], "name it with --load (see"),
        (["--split", "test"], "arguments: --split test (see"),
        (["--preset", "small", "--context", "indication"], "add --guidance 0"),
        (["--backbone", "xproNet"], "did you mean xpronet? (see"),
        (["--preset", "smal"], "did you mean small? (see"),
        (["--preset", "small", "--unfreeze", "last:1"], "add --freeze_visual_extractor false where a preset"),
        (["--backbone", "r2gengpt", "--unfreeze", "lora:8"], "add --freeze_visual_extractor false where a preset"),
        (["--preset", "small", "--freeze_visual_extractor", "false"], 'or --feature_cache ""'),
        (["--preset", "small", "--image_cache", "x"], 'with --feature_cache no image is read; set that to ""'),
        (["--preset", "small", "--shards", "x"], 'does not go with --feature_cache; add --feature_cache ""'),
        (["--preset", "small", "--detection_features", "x"], "--feature_grid 3: --detection_features have no grid"),
        (["--use_amp", "--precision", "float32"], "--use_amp and --precision float32 disagree"),
        (["--random_seed", "1.5"], "--random_seed 1.5: not a value for --seed"),
        (["--workers", "2.9"], "--workers 2.9: not a value for --num_workers"),
        (["--num_train_epochs", "3.7"], "--num_train_epochs 3.7: not a value for --epochs"),
        (["--workers", "many"], "--workers many"),
        (["--monitor_metric", "METEOR", "--meteor", "false"], "needs --meteor true"),
        (["--monitor_metric", "xpronet_selection", "--meteor", "false"], "xpronet_selection: needs --meteor true"),
        (["--start_eval_epoch", "9", "--epochs", "3"], "--start_eval_epoch 9: no epoch"),
        (["--seed", str(2**63)], "--seed 9223372036854775808: must be at most"),
        (["--save_dir", ""], "--save_dir is empty"),
    ],
)
def test_a_mistake_names_flag_and_value(argv, part):
    with pytest.raises(InputError) as error:
        resolve(*argv)
    assert part in str(error.value)


def test_settings_of_a_checkpoint_yield_to_flags():
    saved = {"beam_size": 3, "d_model": 256, "adam_betas": [0.9, 0.9], "gone": 1}
    config = resolve_config({"beam_size": 5}, saved)
    assert (config.beam_size, config.d_model, config.adam_betas) == (5, 256, (0.9, 0.9))


@pytest.mark.parametrize("program", ["main_train.py", "main_test.py"])
def test_help_lists_flags_and_defaults_without_importing_torch(program):
    code = (
        f"import sys, runpy; sys.argv = ['{program}', '--help']\n"
        f"try: runpy.run_path('{program}', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--cmm_size INT" in done.stdout and "(default: 2048)" in done.stdout
    last = "only training depends on these:" if program == "main_test.py" else "results:"
    assert [line for line in done.stdout.splitlines() if re.fullmatch(r"\S.*:", line)][-1] == last


def test_a_mistake_exits_with_2_and_one_line():
    done = subprocess.run([sys.executable, "main_train.py", "--lr_ve", "fast"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_flags_are_not_abbreviated():
    parser = Parser(prog="x.py", description="")
    parser.add_argument("--label_path")
    with pytest.raises(InputError, match=r"unrecognized arguments: --label a.csv; did you mean --label_path\? \(see"):
        parser.parse_args(["--label", "a.csv"])


def test_a_backbone_brings_its_published_settings_beneath_the_flags_given():
    given, notes = parse_flags(["--backbone", "r2gen", "--lr_ve", "1e-3", "--dataset_name", "mimic_cxr"], "x", "")
    config = resolve_config(given)
    assert (config.model_name, config.lr_ve, config.lr_ed) == ("r2gen", 1e-3, 1e-4)
    assert (config.clip_value, config.max_seq_length, config.threshold) == (0.1, 100, 10)
    assert "--lr_ed 0.0001" in " ".join(notes) and "--lr_ve" not in " ".join(notes)


def test_a_checkpoints_own_settings_go_before_the_published_ones():
    given, notes = parse_flags(["--backbone", "r2gen", "--load", "model_best.pth", "--beam_size", "5"], "x", "")
    saved = {"model_name": "r2gen", "dataset_name": "mimic_cxr", "max_seq_length": 24, "beam_size": 2}
    config = resolve_config(given, saved)
    assert (config.max_seq_length, config.beam_size, config.threshold) == (24, 5, 10)
    assert "checkpoint" in notes[-1]


def test_backbone_and_model_name_must_agree():
    with pytest.raises(InputError, match="disagree"):
        parse_flags(["--backbone", "r2gen", "--model_name", "r2gencmn"], "x", "")


@pytest.mark.parametrize("dataset_name", ["iu_xray", "mimic_cxr"])
@pytest.mark.parametrize("backbone", (*MODELS, *SYSTEMS))
def test_presets_hold_flags_that_exist(backbone, dataset_name):
    Config(model_name=SYSTEMS.get(backbone, backbone), **preset(backbone, dataset_name))


def test_a_published_system_is_a_backbone_with_settings():
    given, notes = parse_flags(["--backbone", "cvt2distilgpt2", "--beam_size", "2"], "x", "")
    config = resolve_config(given)
    assert (config.model_name, config.decoder, config.max_seq_length, config.beam_size) == ("hf", "distilgpt2", 128, 2)
    assert "published settings of cvt2distilgpt2" in notes[0]
    with pytest.raises(InputError, match="disagree"):
        parse_flags(["--backbone", "r2gengpt", "--model_name", "r2gen"], "x", "")


@pytest.mark.parametrize(
    ("backbone", "dataset_name", "published"),
    [
        ("r2gen", "iu_xray", (60, 3, 100, 5e-5, 1e-4, 50, 0.1, 9223)),
        ("r2gen", "mimic_cxr", (100, 10, 30, 5e-5, 1e-4, 1, 0.8, 456789)),
        ("r2gencmn", "iu_xray", (60, 3, 100, 1e-4, 5e-4, 10, 0.8, 7580)),
        ("r2gencmn", "mimic_cxr", (100, 10, 30, 1e-4, 5e-4, 3, 0.8, 9153)),
        ("xpronet", "iu_xray", (60, 3, 30, 1e-3, 2e-3, 10, 0.8, 7580)),
        ("xpronet", "mimic_cxr", (100, 10, 30, 5e-5, 1e-4, 3, 0.8, 7580)),
    ],
)
def test_presets_are_those_of_the_papers_run_scripts(backbone, dataset_name, published):
    names = ("max_seq_length", "threshold", "epochs", "lr_ve", "lr_ed", "step_size", "gamma", "seed")
    assert tuple(preset(backbone, dataset_name)[name] for name in names) == published


def test_a_metrics_direction_comes_with_the_metric():
    saved = {"monitor_metric": "nll", "monitor_mode": "min"}
    for given in ({"self_critical": True}, {"monitor_metric": "BLEU_4"}):
        assert resolve_config(given, stage_settings(given, saved)).monitor_mode == "max"
    assert stage_settings({"epochs": 3}, saved) == saved


@pytest.mark.parametrize(
    ("argv", "idle"),
    [
        ("--scst_samples 3", "scst_samples"),
        ("--self_critical true --load a.pth --ce_weight 2", "ce_weight"),
        ("--lr_scheduler constant --step_size 3 --gamma 0.2", "step_size gamma"),
        ("--optim SGD --amsgrad false", "amsgrad"),
        ("--freeze_visual_extractor true --lr_ve 1e-3", "lr_ve"),
        ("--sample_method greedy --beam_size 5", "beam_size"),
        ("--diversity_lambda 0.2", "diversity_lambda"),
        ("--num_neighbours 9 --alpha 0.1 --cosine_weight 1", "num_neighbours"),
        ("--strategy mochi --num_neighbours 9 --alpha 0.1 --queue_hardest 9", "queue_hardest"),
        ("--strategy prior --alpha 0.1 --cosine_weight 1 --renormalise_negative false", "alpha"),
        ("--strategy columns --negatives_as average --detach_negative true", "negatives_as"),
        ("--strategy contrastive --cosine_weight 1 --detach_negative false", "cosine_weight detach_negative"),
        ("--strategy mochi_queue --queue_size 9 --alpha 1 --negatives_as average", "alpha negatives_as"),
        ("--ithn off --same_label_weight 2 --label_path x.csv", "label_path"),
        ("--feature_dtype float16", "feature_dtype"),
        ("--detection_features x --unfreeze last:1 --visual_extractor resnet18", "unfreeze visual_extractor"),
    ],
)
def test_flags_that_another_choice_makes_idle_are_named_and_dropped(argv, idle):
    given, _ = parse_flags(argv.split(), "main_train.py", "")
    left, [line] = flags_in_effect(given, resolve_config(given))
    assert set(given) - set(left) == set(idle.split()) and all(f"--{name}" in line for name in idle.split())


def test_two_names_of_a_flag_must_agree():
    with pytest.raises(InputError, match="--lr 1e-3 and --lr_ed 0.0001 disagree"):
        parse_flags("--lr 1e-3 --lr_ed 1e-4".split(), "main_train.py", "")


def test_the_plain_backbone_continues_with_weights_of_any_ithn():
    saved = {"ithn": "on", "ithn_variant": "released", "contrastive_features": "extractor"}
    assert resolve_config({"ithn": "off"}, saved).ithn_variant == "paper"
