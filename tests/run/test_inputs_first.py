"""Inputs are read and checked before anything of an earlier run is touched, and what has no effect is named."""

import json
import os
import shutil

import pytest

from modules.flags import parse_flags
from modules.run.testing import run_testing
from modules.runtime.errors import InputError
from modules.training.trainer import epoch_table


@pytest.fixture
def finished(trained, tmp_path):
    """A finished run in the folder that ``train`` writes to."""
    copied = shutil.copytree(trained, tmp_path / "results", ignore=shutil.ignore_patterns("*.pth"))
    for checkpoint in trained.glob("*.pth"):
        os.link(checkpoint, copied / checkpoint.name)
    return copied


def content(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".training.lock"]
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in files}


MISTAKES = {
    "--ann_path": "no such file; data/README.md",
    "--image_dir": "is not a folder",
    "--negative_index": "nowhere",
    "--visual_extractor_weights": "no such file",
    "--bertscore_path": "nowhere",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistyped_input_leaves_a_finished_run_where_it_is(train, finished, tmp_path, flag):
    before = content(finished)
    with pytest.raises(InputError, match=MISTAKES[flag]):
        train(flag, tmp_path / "nowhere")
    assert content(finished) == before


@pytest.mark.thorough
def test_the_corrected_command_continues_the_run(train, finished, tmp_path):
    with pytest.raises(InputError):
        train("--ann_path", tmp_path / "nowhere", "--epochs", 2)
    train("--epochs", 2, "--resume", "auto", "--floors", "false")
    assert [row["epoch"] for row in json.loads((finished / "history.json").read_text())] == [1, 2]
    assert not list(finished.glob("earlier_*/*.pth"))  # the results of epoch 1 are set aside, its weights are not


def test_a_run_that_fails_at_its_inputs_leaves_no_folder(train, tmp_path):
    with pytest.raises(InputError):
        train("--ann_path", tmp_path / "nowhere", "--save_dir", tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists() and not (tmp_path / "records").exists()


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_a_wrong_image_dir_is_found_before_weights_are_fetched(train, tmp_path, monkeypatch, on_bad_image):
    monkeypatch.setattr("modules.run.build.build_extractor", lambda *_, **__: pytest.fail("weights come later"))
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"split 'train', study 'SYN\d+': image .*other.*No such file"):
        train("--image_dir", tmp_path / "other", "--on_bad_image", on_bad_image)


def test_a_threshold_that_no_word_reaches_is_refused(train):
    with pytest.raises(InputError, match="--threshold 9999: no word of the training reports"):
        train("--threshold", 9999)


def test_flags_without_effect_on_a_checkpoint_are_named_and_not_recorded(trained, tmp_path):
    flags = "--threshold 5 --tokenizer word --lr_ve 1 --strategy mochi --rm_num_slots 9 --label_path x --beam_size 1"
    given, ignored = parse_flags(
        ["--load", str(trained / "model_best.pth"), "--save_dir", str(tmp_path / "test"), *flags.split()],
        "main_test.py",
        "",
    )
    run_testing(given, ignored)
    log = (tmp_path / "test" / "test.log").read_text()
    for line in (
        "no effect here (only training depends on them): --strategy, --lr_ve\n",
        "no effect here (stored in the checkpoint): --threshold, --tokenizer\n",
        "no effect here (not settings of --model_name r2gencmn): --rm_num_slots\n",
        "no effect here (--model_name r2gencmn needs no labels): --label_path\n",
    ):
        assert line in log
    config = json.loads((tmp_path / "test" / "results.json").read_text())["config"]
    trained_with = json.loads((trained / "results.json").read_text())["config"]
    assert config | {"save_dir": "", "load": "", "beam_size": 0} == trained_with | {
        "save_dir": "",
        "load": "",
        "beam_size": 0,
    }
    assert config["beam_size"] == 1


def test_an_epoch_is_a_short_table():
    scores = {f"val_BLEU_{order}": 2.1e-14 for order in range(1, 5)} | {"val_METEOR": None, "val_CIDEr": 0.123456}
    losses = {"train_loss": 2.31407, "train_nll": 2.10001, "train_steps": 250, "train_skipped_steps": 0}
    row = {"epoch": 3, "lr_ve": 5e-5, "lr_ed": 7e-4, **losses, **scores, "seconds": 724.2}
    assert epoch_table(row) == [
        "epoch 3: 250 steps in 12 min 04 s, learning rates 5e-05 (visual extractor) and 0.0007",
        "  training    loss 2.3141  nll 2.1000",
        "  validation  BLEU_1 0.0000  BLEU_2 0.0000  BLEU_3 0.0000  BLEU_4 0.0000  METEOR -  CIDEr 0.1235",
    ]
    row |= {f"train_cos_of_kind_{number}": 0.5 for number in range(7)}
    wrapped = epoch_table(row)[1:-1]
    assert len(wrapped) == 2 and max(map(len, wrapped)) <= 120 and wrapped[1].startswith(" " * 14 + "cos_of_kind_")
    assert "  ".join(line.strip() for line in wrapped).count("cos_of_kind_") == 7
