"""A run that was stopped, wherever, and goes on ends bit by bit as one that never stopped."""

import json
import re
import shutil
import signal

import pytest
import torch

from modules.flags import parse_flags
from modules.run.training import run_training
from modules.runtime.errors import InputError
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.checkpoint import load_checkpoint
from modules.training.checkpoint_folder import BEST, CURRENT, PREVIOUS
from modules.training.trainer import Best, Trainer
from tests.conftest import TINY
from tests.data.test_shards import make

EPOCHS = 2
# Two batches make a step: four steps an epoch, the last one of a single batch.
FLAGS = [
    "--visual_extractor",
    "test_efficientnet",
    "--epochs",
    EPOCHS,
    "--batch_size",
    2,
    "--grad_accumulation",
    2,
    "--sample_method",
    "sample",
    "--alpha",
    "0.5",
    "--previous_epoch_start",
    "true",
    "--use_bn",
    "1",
    "--log_period",
    "1",
    "--monitor_metric",
    "nll",
]


class StopAt(GracefulShutdown):
    """As if a signal had come at the end of the ``number``-th block that a signal does not break off."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def check(self):
        self.left -= 1
        if self.left == 0:
            self.number = signal.SIGTERM
        super().check()


def without_test(monkeypatch):
    monkeypatch.setattr("modules.run.training.test_and_write", lambda *_, **__: None)
    monkeypatch.setattr("modules.run.training.training_curves", lambda history: b"")  # the slowest part


@pytest.fixture
def run(demo, demo_index, tmp_path, monkeypatch):
    """``run(name, *flags, shutdown=)`` trains into the folder ``name`` and tests nothing; returns the folder."""
    without_test(monkeypatch)

    def train(name, *flags, shutdown=None):
        argv = [
            "--ann_path",
            demo / "annotation.json",
            "--image_dir",
            demo / "images",
            "--negative_index",
            demo_index,
            "--save_dir",
            tmp_path / name,
            "--record_dir",
            tmp_path / "records",
            *TINY,
            *FLAGS,
            *flags,
        ]
        given, ignored = parse_flags([str(part) for part in argv], "main_train.py", "")
        run_training(given, ignored, shutdown)
        return tmp_path / name

    return train


@pytest.mark.parametrize("kept", ["previous", "queue"])
def test_samples_of_another_annotation_are_not_those_remembered(run, demo, tmp_path, monkeypatch, capfd, kept):
    chosen = ["--strategy", "mochi_queue", "--previous_epoch_start", "false", "--queue_size", 8]
    flags = ["--num_workers", 0, *(chosen if kept == "queue" else [])]
    with pytest.raises(Stopped):
        run("run", *flags, shutdown=StopAt(5))  # after the last step of the first epoch, before its validation
    monkeypatch.setattr("modules.run.training._test_best", lambda *_: None)
    monkeypatch.setattr("modules.run.data.HardNegativeIndex.check", lambda *_: None)
    known = []
    monkeypatch.setattr(Trainer, "train", lambda self: known.append(getattr(self.objective, kept).known.clone()))
    run("run", *flags, "--resume", "auto")
    annotation = json.loads((demo / "annotation.json").read_text())
    annotation["train"].reverse()
    (tmp_path / "annotation.json").write_text(json.dumps(annotation))
    capfd.readouterr()
    run("run", *flags, "--resume", "auto", "--ann_path", tmp_path / "annotation.json")
    assert known[0].any() and not known[1].any()
    assert "are forgotten" in "".join(capfd.readouterr())


def assert_same(one, other, where=""):
    """Equal bit by bit, but for what tells of the time and the place of a run."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in ("seconds", "provenance", "config"):
                assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert type(one) is type(other) and one == other, where


def logged(folder):
    """The losses in the log, and what was judged; not the times."""
    lines = [line.split(" INFO ")[1] for line in (folder / "train.log").read_text().splitlines() if " INFO " in line]
    kept = [line for line in lines if re.match(r"epoch \d+( step|:)|  (training|validation) |best epoch", line)]
    return [re.sub(r" in \d+ min \d+ s,", "", line) for line in kept]


def test_a_resumed_run_is_the_uninterrupted_one(run):
    """Stopped again and again: before a last step, after it, after a validation; with and without workers."""
    whole = run("whole")
    for blocks, workers in ((1, 0), (2, 2), (1, 2), (1, 0), (1, 0), (3, 2)):
        with pytest.raises(Stopped) as stopped:
            run("part", "--num_workers", workers, "--resume", "auto", shutdown=StopAt(blocks))
        assert stopped.value.code == 143
    position = load_checkpoint(whole.with_name("part") / CURRENT)["position"]
    assert (position["epoch"], position["steps"], position["batches"]) == (2, 3, 6)
    part = run("part", "--resume", "auto")
    assert_same(load_checkpoint(whole / CURRENT), load_checkpoint(part / CURRENT))
    assert_same(load_checkpoint(whole / BEST), load_checkpoint(part / BEST))
    assert logged(whole) == logged(part) and len(logged(whole)) >= 4 * EPOCHS
    history = [json.loads((folder / "history.json").read_text()) for folder in (whole, part)]
    assert_same(*history)


@pytest.mark.thorough
def test_a_float16_run_that_was_killed_goes_on_from_its_last_step(run, monkeypatch):
    """The scaler's state too; and a kill leaves what --checkpoint_steps had saved."""
    whole = run("whole", "--precision", "float16")
    monkeypatch.setattr("modules.training.trainer.Trainer._step", _killed_at_call(7))
    with pytest.raises(RuntimeError, match="killed"):
        run("part", "--precision", "float16", "--checkpoint_steps", 3)
    monkeypatch.undo()
    without_test(monkeypatch)
    saved = load_checkpoint(whole.with_name("part") / CURRENT)
    assert saved["position"]["total_steps"] == 6 and saved["position"]["batches"] == 4
    part = run("part", "--precision", "float16", "--resume", "auto")
    one, other = load_checkpoint(whole / CURRENT), load_checkpoint(part / CURRENT)
    assert_same(one, other)
    assert one["scaler"]["scale"] < 65536 and any(row["train_skipped_steps"] for row in one["history"])


def test_a_kill_after_a_validation_that_chose_nothing_loses_nothing(run, monkeypatch):
    """Such an epoch's checkpoint is the one from before its validation, which is then repeated."""
    update, flags = Best.update, ("--epochs", 3)
    # The first epoch stays the best.
    monkeypatch.setattr(Best, "update", lambda self, score, epoch, _: update(self, float(epoch), epoch, True))
    whole = run("whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr("modules.training.trainer.Trainer._step", _killed_at_call(10))
        with pytest.raises(RuntimeError, match="killed"):
            run("part", *flags)
    position = load_checkpoint(whole.with_name("part") / CURRENT)["position"]
    assert (position["epoch"], position["trained"]) == (2, True)
    part = run("part", *flags, "--resume", "auto")
    assert "resumed in epoch 2 after 7 of its batches, before its validation" in (part / "train.log").read_text()
    one, other = load_checkpoint(whole / CURRENT), load_checkpoint(part / CURRENT)
    assert_same(one, other)
    assert one["best"]["epoch"] == 1 and one["position"]["epoch"] == 4
    assert_same(load_checkpoint(whole / BEST), load_checkpoint(part / BEST))


def _killed_at_call(number):
    from modules.training.trainer import Trainer

    original, calls = Trainer._step, []

    def step(self, group):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError("killed")
        original(self, group)

    return step


def test_a_crash_in_validation_loses_nothing(run, monkeypatch):
    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr("modules.evaluation.tester.Tester.evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("part")
    assert load_checkpoint(whole.with_name("part") / CURRENT)["position"]["trained"]
    part = run("part", "--resume", "auto")
    assert "resumed in epoch 1 after 7 of its batches, before its validation" in (part / "train.log").read_text()
    assert_same(load_checkpoint(whole / CURRENT), load_checkpoint(part / CURRENT))


def test_auto_takes_the_latest_valid_one_and_says_so(run):
    whole = run("whole")
    folder = run("part", "--resume", "auto", "--epochs", 1)
    log = folder / "train.log"
    assert f"no checkpoint in {folder}, training starts from the beginning" in log.read_text()
    whole_file = (folder / CURRENT).read_bytes()
    (folder / CURRENT).unlink()  # the best model is the same file
    (folder / CURRENT).write_bytes(whole_file[: len(whole_file) // 2])
    run("part", "--resume", "auto")
    assert re.search(r"not used: checkpoint .*current_checkpoint.pth: damaged", log.read_text())
    # The best model is of the end of epoch 1, the previous checkpoint of the moment before its validation.
    assert f"resuming from {folder / BEST}" in log.read_text()
    assert_same(load_checkpoint(whole / CURRENT), load_checkpoint(folder / CURRENT))
    for name in (CURRENT, PREVIOUS, BEST):
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match="--resume auto: no checkpoint in .* can be used"):
        run("part", "--resume", "auto")


def test_a_finished_run_that_is_resumed_trains_no_more(run):
    folder = run("one")
    before = load_checkpoint(folder / CURRENT)
    run("one", "--resume", folder / CURRENT)
    assert_same(before, load_checkpoint(folder / CURRENT))
    # Early stopping had ended it: it is not one epoch longer for having been resumed.
    content = before | {"best": before["best"] | {"epochs_without": 51}}
    shutil.copytree(folder, folder.with_name("other"))
    torch.save(content, folder.with_name("other") / "stopped.pth")
    run("other", "--resume", folder.with_name("other") / "stopped.pth", "--epochs", 9)
    assert "training stops" in (folder.with_name("other") / "train.log").read_text()


def test_another_batch_size_goes_on_behind_the_samples_that_were_seen(run):
    with pytest.raises(Stopped):
        run("part", shutdown=StopAt(2))
    folder = run("part", "--resume", "auto", "--batch_size", 3, "--epochs", 1)
    # 14 samples, 8 of which had been seen in two steps of two batches of two; then a step of two batches of three.
    assert json.loads((folder / "history.json").read_text())[0]["train_steps"] == 2 + 1
    with pytest.raises(Stopped):
        run("again", shutdown=StopAt(1))
    for flags, reason in (
        (["--seed", 1], "--seed 1: the run of"),
        (["--views", "separate"], "--views separate: the run of"),
    ):
        with pytest.raises(InputError, match=reason):
            run("again", "--resume", "auto", *flags)
    with pytest.raises(Stopped):
        run("like", "--length_bucketing", "true", shutdown=StopAt(1))
    with pytest.raises(InputError, match="--length_bucketing true: .* have 2 samples"):
        run("like", "--length_bucketing", "true", "--resume", "auto", "--batch_size", 1)


@pytest.mark.thorough
def test_shards_are_read_on_at_the_right_sample(run, demo, demo_index, tmp_path):
    """The order depends on what each of them holds, not on where they lie."""
    for name, size in (("shards", 0.02), ("others", 0.05)):
        make(tmp_path / name, demo, "--negative_index", demo_index, "--shard_mb", size)
    whole = run("whole", "--shards", tmp_path / "shards")
    with pytest.raises(Stopped):
        run("part", "--shards", tmp_path / "shards", shutdown=StopAt(2))
    for flags, reason in (
        (["--shards", tmp_path / "others"], "others': --resume .* began with other shards"),
        (["--shards", ""], "--shards '': --resume .* is from the middle of epoch 1, which began with"),
        (["--batch_size", 1], "--batch_size 1: the run of .* began with 2"),
    ):
        with pytest.raises(InputError, match=reason):
            run("part", "--resume", "auto", *flags)
    part = run("part", "--resume", "auto", "--shards", (tmp_path / "shards").rename(tmp_path / "moved"))
    assert_same(load_checkpoint(whole / CURRENT), load_checkpoint(part / CURRENT))
    assert logged(whole) == logged(part)


def test_a_moved_folder_is_written_to_where_it_is(run, demo, demo_index, tmp_path):
    folder = run("here", "--epochs", 1)
    moved = tmp_path / "there"
    folder.rename(moved)
    given, ignored = parse_flags(["--resume", str(moved / CURRENT), "--epochs", "2"], "main_train.py", "")
    run_training(given, ignored)
    assert not folder.exists() and load_checkpoint(moved / CURRENT)["epoch"] == 2


def test_the_files_of_another_run_are_moved_aside(run):
    folder = run("one", "--epochs", 1)
    (folder / "results.json").write_text("{}")
    before = (folder / BEST).read_bytes()
    run("one", "--epochs", 1, "--seed", 5)
    assert (folder / "earlier_1" / BEST).read_bytes() == before
    assert (folder / "earlier_1" / "results.json").is_file() and not (folder / "results.json").exists()
    assert (
        f"{folder} held an earlier run: its files are now in {folder / 'earlier_1'}"
        in (folder / "train.log").read_text()
    )


def test_two_runs_with_deterministic_kernels_are_equal(run):
    try:
        one, other = (
            run(name, "--deterministic", "true", "--num_workers", workers)
            for name, workers in (("one", 0), ("other", 2))
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(load_checkpoint(one / CURRENT), load_checkpoint(other / CURRENT))
    assert logged(one) == logged(other)
