"""Checkpoints that were cut, flipped, edited or made by another run: one line from --resume and --load, no training."""

import copy
import random

import pytest
import torch

from modules.flags import parse_flags
from modules.run.testing import run_testing
from modules.run.training import run_training
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from modules.training.checkpoint_folder import CURRENT, CheckpointFolder
from tests.conftest import TINY

EXTRACTOR = ["--visual_extractor", "test_efficientnet"]


class Began(Exception):
    """Work began that a bad checkpoint must not reach."""


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """Path and content of the checkpoint of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--save_dir",
        folder,
        "--record_dir",
        folder / "records",
        "--epochs",
        1,
        *TINY,
        *EXTRACTOR,
        "--lr_scheduler",
        "ReduceLROnPlateau",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modules.run.training.test_and_write", lambda *_, **__: None)
        run_training(*parse_flags([str(part) for part in argv], "main_train.py", ""))
    return folder / CURRENT, load_checkpoint(folder / CURRENT)


@pytest.fixture
def used(monkeypatch, tmp_path):
    """``used(path)``: what --resume and --load say to a checkpoint, None where they go to work with it."""

    def begin(*_, **__):
        raise Began

    monkeypatch.setattr("modules.training.trainer.Trainer.train", begin)
    monkeypatch.setattr("modules.run.testing.test_and_write", begin)

    def lines(path, *flags):
        said = []
        for run, flag in ((run_training, "--resume"), (run_testing, "--load")):
            argv = [flag, path, "--save_dir", tmp_path / "new", "--epochs", 2, *flags]
            try:
                run(*parse_flags([str(part) for part in argv], "main_train.py", ""))
            except InputError as error:
                said.append(str(error))
            except Began:
                said.append(None)
        return said

    return lines


def replaced(content, path, value):
    """A copy of ``content`` with the entry at ``path`` (keys) replaced, or removed where ``value`` is ``...``."""
    content = copy.copy(content)
    key, *rest = path
    if rest:
        content[key] = replaced(content[key], rest, value)
    elif value is ...:
        del content[key]
    else:
        content[key] = value
    return content


JUNK = (..., "text", torch.ones(3))
# Entries without which, or with junk in which, neither program may go on.
BOTH = [
    ("config",),
    ("vocabulary",),
    ("history",),
    ("epoch",),
    ("strategy",),
    ("vocabulary", "tokens"),
    ("vocabulary", "cleaner"),
    ("config", "d_model"),
    ("config", "dataset_name"),
    ("config", "adam_betas"),
    ("config", "lr_ed"),
    ("config", "amsgrad"),
    ("config", "visual_extractor"),
    ("state_dict",),
]
RESUME_ONLY = [
    ("objective",),
    ("optimizer",),
    ("optimizer", "state"),
    ("optimizer", "param_groups"),
    ("scheduler",),
    ("scheduler", "best"),
    ("scheduler", "bad_epochs"),
    ("scaler",),
    ("scaler", "scale"),
    ("rng",),
    ("rng", "cpu"),
    ("rng", "cuda"),
    ("best",),
    ("best", "score"),
    ("best", "epoch"),
    ("position",),
    ("position", "epoch"),
    ("position", "batches"),
    ("position", "trained"),
    ("means",),
    ("means", "totals"),
    ("guard",),
    ("guard", "in_a_row"),
    ("history", 0),
    ("annotation_sha256",),
]


# A setting that is missing has its default, a CPU needs no state of a GPU, a strategy is a name to show, and between
# two epochs another annotation with the same vocabulary is none of a checkpoint's business.
HARMLESS = {
    ("config", "lr_ed"),
    ("config", "amsgrad"),
    ("config", "adam_betas"),
    ("config", "dataset_name"),
    ("rng", "cuda"),
    ("history", 0),
    ("strategy",),
    ("annotation_sha256",),
}


@pytest.mark.thorough
@pytest.mark.parametrize("path", BOTH + RESUME_ONLY, ids=lambda path: "/".join(map(str, path)))
def test_an_edited_entry_is_one_line(trained, used, tmp_path, path):
    for value in JUNK:
        torch.save(replaced(trained[1], path, value), tmp_path / "edited.pth")
        lines = used(tmp_path / "edited.pth")
        for line in lines if path in BOTH else lines[:1]:
            assert line or path in HARMLESS
            assert not line or ("\n" not in line and len(line) < 700)


def test_the_unchanged_content_is_taken(trained, used, tmp_path):
    torch.save(trained[1], tmp_path / "same.pth")
    assert used(trained[0]) == used(tmp_path / "same.pth") == [None, None]


def test_another_architecture_and_another_vocabulary(trained, used, tmp_path):
    path, content = trained
    for flags, reason in (
        (["--d_model", 32, "--cmm_dim", 32], "--cmm_dim 32: the run of --resume"),
        (["--visual_extractor", "resnet18"], ""),
        (["--num_layers", 2], "began with 1"),
    ):
        resumed, loaded = used(path, *flags)
        assert resumed and "current_checkpoint.pth" in resumed and reason in resumed
        assert f"{flags[0]} {flags[1]}: contradicts checkpoint {path}" in loaded
    resumed, loaded = used(path, "--threshold", 1)
    assert "trained with another vocabulary" in resumed and loaded is None  # the checkpoint brings its own
    tokens = content["vocabulary"]["tokens"]
    torch.save(replaced(content, ("vocabulary", "tokens"), tokens[::-1]), tmp_path / "permuted.pth")
    resumed, loaded = used(tmp_path / "permuted.pth")
    assert "another vocabulary" in resumed and "its vocabulary was changed since it was written" in loaded
    weights = {name: value for name, value in content["state_dict"].items() if "logit" not in name}
    torch.save(content | {"state_dict": weights}, tmp_path / "part.pth")
    assert "entries are missing" in used(tmp_path / "part.pth")[1]
    for history in ([1, "x"], [{"epoch": "1"}], [{"epoch": 1, "val_BLEU_4": "high"}]):
        torch.save(content | {"history": history}, tmp_path / "history.pth")
        assert all("'history' is not a list of rows of numbers" in line for line in used(tmp_path / "history.pth"))
    wrong = replaced(content, ("optimizer", "state", 0, "exp_avg"), torch.ones(7))
    torch.save(wrong, tmp_path / "shape.pth")
    assert "the optimiser's exp_avg has shape (7,)" in used(tmp_path / "shape.pth")[0]


@pytest.mark.parametrize(
    "flag", ["freeze_visual_extractor true", "image_feature class", "feature_grid 1", "num_heads 4"]
)
def test_what_a_resumed_run_cannot_change(flag, trained, used):
    line = used(trained[0], *f"--{flag}".split())[0]
    assert line.lower().startswith(f"--{flag}: the run of --resume") and "must continue with it" in line


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--eval_batches", 1], ["eval_batches was 0, is 1"]),
        (["--beam_size", 1, "--suppress_unk", "false"], ["beam_size was 2, is 1", "suppress_unk was True, is False"]),
        (["--image_size", 64, "--views", "separate"], ["image_size was 32, is 64", "views was paired, is separate"]),
        (["--beam_size", 1, "--epochs", 1], None),  # it has ended, and only tests its best model
        (["--seed", 3, "--drop_prob_lm", 0.2, "--num_workers", 1], None),
    ],
)
def test_a_best_score_of_another_validation_is_forgotten(flags, changed, trained, used, monkeypatch):
    trainers, said = [], []
    monkeypatch.setattr("modules.training.trainer.Trainer.train", lambda self: trainers.append(self))
    monkeypatch.setattr("modules.run.training._test_best", lambda *_: None)
    monkeypatch.setattr("modules.run.resuming.logger.warning", lambda line, *values: said.append(line % values))
    used(trained[0], *flags)
    said = [line for line in said if "validation scores" in line]
    best, scheduler = trainers[0].best, trainers[0].scheduler
    if changed is None:
        assert best.epoch == 1 and scheduler.best and not said
    else:
        assert (best.epoch, best.score, scheduler.best) == (0, None, {}) and len(said) == 1
        assert all(f"--{part}" in said[0] for part in changed) and said[0].count(" was ") == len(changed)


def test_the_likelihood_does_not_depend_on_how_reports_are_decoded():
    from types import SimpleNamespace

    from modules.flags import resolve_config
    from modules.run.resuming import _judge_alike
    from modules.training.trainer import Best

    began = resolve_config({"monitor_metric": "nll"})
    for flags, kept in (({"beam_size": 1, "guidance": 0.5}, True), ({"max_seq_length": 30}, False)):
        trainer = SimpleNamespace(best=Best(1.0, 2), has_ended=False, scheduler=None)
        _judge_alike(trainer, resolve_config({"monitor_metric": "nll"} | flags), began)
        assert (trainer.best.epoch == 2) is kept


@pytest.mark.parametrize("checksum", [True, False])
def test_every_cut_and_every_flipped_bit_is_named_or_does_no_harm(trained, tmp_path, checksum, caplog):
    """What passes holds the same numbers; where there is a checksum, the log says that it differs."""
    folder = CheckpointFolder(tmp_path)
    small = {name: value for name, value in trained[1].items() if name not in ("objective", "optimizer")}
    folder.save(small | {"state_dict": {"w": torch.arange(2000.0)}}, best=False)
    path = tmp_path / CURRENT
    if not checksum:
        path.with_name(f"{CURRENT}.sha256").unlink()
    whole, draw, passed = path.read_bytes(), random.Random(3), 0
    for trial in range(120):
        damaged = bytearray(whole)
        if trial % 2:
            damaged = damaged[: draw.randrange(len(whole))]
        else:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except InputError as error:
            assert "\n" not in str(error) and CURRENT in str(error)
        else:
            passed += 1
            assert torch.equal(found["state_dict"]["w"], torch.arange(2000.0))
    assert passed < (4 if checksum else 40)
    assert caplog.text.count("does not belong to it or is damaged") == (passed if checksum else 0)
