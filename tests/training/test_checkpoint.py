"""Checkpoints survive failed writes, and nothing but tensors and plain values is ever read from one."""

import os
import pickle

import numpy as np
import pytest
import torch

from modules.runtime.errors import InputError
from modules.training.checkpoint import (
    FORMAT,
    RESUMED,
    checksum_file,
    load_checkpoint,
    require_resumable,
    write_checkpoint,
)


def state(value: float) -> dict:
    return {"state_dict": {"w": torch.full((3,), value)}, "epoch": 1, "history": [{"val_BLEU_4": None}]}


def test_round_trip(tmp_path):
    write_checkpoint(tmp_path / "c.pth", state(2.0))
    content = load_checkpoint(tmp_path / "c.pth")
    assert content["state_dict"]["w"].tolist() == [2.0, 2.0, 2.0] and content["history"] == [{"val_BLEU_4": None}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.pth"]


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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint",
        [1, 2],
        {"state_dict": {}},
        {"state_dict": {"w": [1.0]}},
        {"state_dict": {"w": torch.eye(2).to_sparse()}},
    ],
)
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
    write_checkpoint(path, state(1.0))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(InputError, match=r"c\.pth: damaged"):
        load_checkpoint(path)


def test_missing_file_and_weights_without_training_state(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(InputError, match="is a folder; give a checkpoint in it, such as .*model_best.pth"):
        load_checkpoint(tmp_path)
    with pytest.raises(InputError, match="weights only"):
        require_resumable({"state_dict": {}}, "published.pth")


@pytest.mark.parametrize("entry", list(RESUMED))
def test_a_checkpoint_without_an_entry_or_with_a_wrong_one_is_no_start_for_more_training(tmp_path, entry):
    content = {"format": FORMAT} | {name: kind() for name, kind in RESUMED.items()}
    require_resumable(content, "c.pth")
    with pytest.raises(InputError, match=rf"c\.pth: its entry '{entry}' is missing"):
        require_resumable({name: value for name, value in content.items() if name != entry}, "c.pth")
    with pytest.raises(InputError, match=rf"c\.pth: its entry '{entry}' is a NoneType"):
        require_resumable(content | {entry: None}, "c.pth")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "endless", "binary", "empty"])
def test_a_checksum_file_that_is_none_costs_a_warning(kind, tmp_path, caplog):
    path = tmp_path / "model_best.pth"
    torch.save({"state_dict": {"w": torch.arange(3.0)}}, path)
    place = checksum_file(path)
    {
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
        "device": lambda: place.symlink_to("/dev/zero"),
        "endless": lambda: (place.touch(), os.truncate(place, 2**40)),
        "binary": lambda: place.write_bytes(bytes(range(256))),
        "empty": place.touch,
    }[kind]()
    assert load_checkpoint(path)["state_dict"]["w"][2] == 2
    assert caplog.text.count("model_best.pth.sha256 does not belong to it or is damaged") == 1
    path.write_bytes(path.read_bytes().replace(torch.arange(3.0).numpy().tobytes(), bytes(12)))
    with pytest.raises(InputError, match=r"damaged, it differs from its checksum in .*sha256 \(its part"):
        load_checkpoint(path)
