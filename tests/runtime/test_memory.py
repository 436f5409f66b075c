"""Memory or a disk that runs out is one line that says what helps; other errors keep their traceback."""

import pytest
import torch

from modules.runtime.errors import InputError
from modules.runtime.memory import explain_out_of_memory
from modules.training.checkpoint import load_checkpoint
from modules.training.trainer import Trainer


def raises(error):
    with pytest.raises(InputError) as raised, explain_out_of_memory("lower --batch_size"):
        raise error
    assert "\n" not in str(raised.value) and str(raised.value).endswith("lower --batch_size")
    return str(raised.value)


def test_the_gpu():
    assert "on the GPU" in raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))


def test_the_cpu_as_torch_says_it():
    with (
        pytest.raises(InputError, match="out of memory of this machine: lower"),
        explain_out_of_memory("lower --batch_size"),
    ):
        torch.empty(1 << 60)


def test_python_and_shared_memory():
    assert raises(MemoryError()).startswith("out of memory: ")
    assert "/dev/shm" in raises(
        RuntimeError(
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
            "RuntimeError: unable to write to file </torch_12_3>: No space left on device (28)"
        )
    )


def test_a_full_disk_whoever_wrote_to_it():
    with (
        pytest.raises(InputError, match=r"file 'events.1' cannot be written: No space left"),
        explain_out_of_memory(""),
    ):
        raise OSError(28, "No space left on device", "events.1")
    with pytest.raises(FileNotFoundError), explain_out_of_memory(""):
        raise FileNotFoundError(2, "No such file or directory", "x")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="a bug"), explain_out_of_memory("lower --batch_size"):
        raise RuntimeError("a bug")


def test_a_training_that_runs_out_leaves_its_last_checkpoint(train, tmp_path, monkeypatch):
    original, calls = Trainer._update, []

    def fail(self):
        calls.append(1)
        return original(self) if len(calls) < 4 else torch.empty(1 << 60)

    monkeypatch.setattr(Trainer, "_update", fail)
    with pytest.raises(InputError, match="lower --batch_size .* continue from it with --resume auto"):
        train("--checkpoint_steps", 2, "--epochs", 3, "--batch_size", 4, "--visual_extractor", "test_efficientnet")
    saved = load_checkpoint(tmp_path / "results" / "current_checkpoint.pth")
    assert saved["position"]["total_steps"] == 2
