"""Checkpoints survive failed writes, and nothing but tensors and plain values is ever read from one."""

import os
import pickle

import numpy as np
import pytest
import torch

from modules.checkpoint import keep_as_best, load_checkpoint, require_resumable, save_checkpoint
from modules.errors import InputError


def state(value: float) -> dict:
    return {"state_dict": {"w": torch.full((3,), value)}, "epoch": 1, "history": [{"val_BLEU_4": None}]}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "c.pth", state(2.0))
    content = load_checkpoint(tmp_path / "c.pth")
    assert content["state_dict"]["w"].tolist() == [2.0, 2.0, 2.0] and content["history"] == [{"val_BLEU_4": None}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("write failed")])
def test_failed_write_leaves_the_previous_file(tmp_path, monkeypatch, failure):
    path = tmp_path / "c.pth"
    save_checkpoint(path, state(1.0))

    def fail(content, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"c\.pth: cannot be written"):
        save_checkpoint(path, state(2.0))
    assert load_checkpoint(path)["state_dict"]["w"][0] == 1.0
    assert len(list(tmp_path.iterdir())) == 1


def test_best_stays_when_current_is_written_again(tmp_path):
    current, best = tmp_path / "current_checkpoint.pth", tmp_path / "model_best.pth"
    save_checkpoint(current, state(1.0))
    keep_as_best(current, best)
    save_checkpoint(current, state(2.0))
    assert load_checkpoint(best)["state_dict"]["w"][0] == 1.0
    keep_as_best(current, best)
    assert load_checkpoint(best)["state_dict"]["w"][0] == 2.0


def test_published_scores_saved_as_numpy_numbers_load(tmp_path):
    torch.save(state(1.0) | {"monitor_best": np.float64(0.165)}, tmp_path / "published.pth")
    assert load_checkpoint(tmp_path / "published.pth")["monitor_best"] == 0.165


def test_bare_state_dict_is_wrapped(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "bare.pth")
    assert set(load_checkpoint(tmp_path / "bare.pth")) == {"state_dict"}


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickled_code_is_not_run(tmp_path, write):
    bomb = Bomb()
    bomb.target = str(tmp_path / "ran")
    write({"state_dict": {"w": torch.ones(1)}, "extra": bomb}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="not loaded"):
        load_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", [1, 2], {"state_dict": {}}, {"state_dict": {"w": [1.0]}},
    {"state_dict": {"w": torch.eye(2).to_sparse()}},
])
def test_other_content_gets_one_line(tmp_path, content):
    path = tmp_path / "bad.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError) as error:
        load_checkpoint(path)
    assert "bad.pth" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "c.pth"
    save_checkpoint(path, state(1.0))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=r"c\.pth: damaged"):
        load_checkpoint(path)


def test_missing_file_and_weights_without_training_state(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="weights only"):
        require_resumable({"state_dict": {}}, "published.pth")


def test_a_checkpoint_without_its_settings_is_no_start_for_more_training(tmp_path):
    save_checkpoint(tmp_path / "c.pth", state(1.0) | dict.fromkeys(
        ["objective", "optimizer", "scheduler", "scaler", "rng", "best", "vocabulary"], {}))
    with pytest.raises(InputError, match=r"--resume c\.pth: weights only"):
        require_resumable(load_checkpoint(tmp_path / "c.pth"), "c.pth")
