"""Starting several processes: the whole job end to end, its mistakes in one line, a killed process, a signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modules.flags import parse_flags
from modules.runtime.errors import InputError
from modules.runtime.launch import _failure, check_processes, process_device
from modules.training.checkpoint import load_checkpoint
from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(demo, tmp_path, *flags):
    paths = [
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--record_dir",
        tmp_path / "records",
        "--save_dir",
        tmp_path / "run",
    ]
    return [str(part) for part in (sys.executable, "main_train.py", *paths, *TINY, "--device", "cpu", *flags)]


@pytest.mark.thorough
def test_the_whole_job_in_two_processes(demo, demo_index, tmp_path):
    """Training and test in two processes; one process gives the best model the same scores."""
    flags = [
        "--n_gpu",
        2,
        "--negative_index",
        demo_index,
        "--epochs",
        2,
        "--batch_size",
        3,
        "--grad_accumulation",
        2,
        "--previous_epoch_start",
        "true",
        "--sync_bn",
        "true",
        "--scale_lr",
        "linear",
    ]
    done = subprocess.run(command(demo, tmp_path, *flags), capture_output=True, text=True, env=ENVIRONMENT, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "a step takes 12 samples (3 samples x 2 accumulated batches x 2 processes)" in log
    assert "learning rates 0.0001 and 0.002 (--scale_lr linear: x 2)" in log
    assert log.count("\nbest epoch") == 0 and log.count("epoch 1: ") == 1  # one process writes
    content = load_checkpoint(tmp_path / "run" / "model_best.pth")
    assert content["processes"] == 2 and not any(name.startswith("module.") for name in content["state_dict"])
    from modules.run.testing import run_testing

    given, ignored = parse_flags(
        ["--load", str(tmp_path / "run" / "model_best.pth"), "--save_dir", str(tmp_path / "alone")], "main_test.py", ""
    )
    run_testing(given, ignored)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "alone")]
    assert results[0]["test"] == results[1]["test"]


def test_a_mistake_is_said_once(demo, tmp_path):
    done = subprocess.run(
        command(demo, tmp_path, "--n_gpu", 2, "--ann_path", tmp_path / "none.json"),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: {tmp_path / 'none.json'}: no such file; data/README.md says")


def when(log, text, process, seconds=240):
    """Wait until ``log`` holds ``text``."""
    for _ in range(seconds * 10):
        if log.exists() and text in log.read_text():
            return
        assert process.poll() is None, "ended early"
        time.sleep(0.1)
    raise AssertionError(f"no {text!r} in {seconds} s")


def children(process) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listing.split()]


def kill_one_in_epoch_1(demo, tmp_path, *flags, seconds):
    """Exit code and output of a job in two processes, one of which is killed; it must end within ``seconds``."""
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            command(demo, tmp_path, "--n_gpu", 2, "--checkpoint_steps", 1, *flags),
            stdout=out,
            stderr=out,
            env=ENVIRONMENT,
        )
        when(tmp_path / "run" / "train.log", "epoch 1: ", process)
        own = children(process)
        os.kill(own[1], signal.SIGKILL)
        code = process.wait(seconds)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in own)
    return code, (tmp_path / "out").read_text()


@pytest.mark.slow
def test_a_kill_ends_all_within_a_minute(demo, tmp_path):
    code, said = kill_one_in_epoch_1(demo, tmp_path, "--epochs", 200, seconds=60)
    assert code == 1 and "of 2 was ended by SIGKILL; the others were stopped; continue with --resume auto" in said


@pytest.mark.slow
def test_after_a_kill_all_start_again_from_the_last_checkpoint(demo, tmp_path):
    code, said = kill_one_in_epoch_1(
        demo, tmp_path, "--epochs", 4, "--resume", "auto", "--max_restarts", 1, seconds=250
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert code == 0 and "of 2 was ended by SIGKILL; starting all 2 again" in said
    assert "resuming from" in log and log.count("epoch 4: ") == log.count("epoch 1: ") == 1


@pytest.mark.slow
def test_a_signal_saves_and_one_process_goes_on(demo, tmp_path):
    process = subprocess.Popen(
        command(demo, tmp_path, "--n_gpu", 2, "--epochs", 200, "--batch_size", 2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    when(tmp_path / "run" / "train.log", "epoch 1: ", process)
    own = children(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert not any(os.path.exists(f"/proc/{pid}") for pid in own)
    reached = load_checkpoint(tmp_path / "run" / "current_checkpoint.pth")["position"]
    done = subprocess.run(
        command(demo, tmp_path, "--resume", "auto", "--epochs", reached["epoch"]),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [row["epoch"] for row in history] == list(range(1, reached["epoch"] + 1))


@pytest.mark.slow
def test_two_machines_meet_under_slurm(demo, tmp_path):
    """Its stand-in starts what srun is given twice: two torchruns of a process each, which stand for two machines."""
    programs = {
        "scontrol": "echo localhost",
        "srun": 'shift\n"$@" &\n"$@" &\nwait -n && wait -n',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "slurm_train.sh", *command(demo, tmp_path, "--epochs", 1)[2:]],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | slurm,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a step takes 16 samples (8 samples x 2 processes)" in (tmp_path / "run" / "train.log").read_text()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"]


@pytest.mark.parametrize(
    ("codes", "code", "reason"),
    [
        ({0: 2, 1: -15}, 2, None),
        ({0: 1, 1: -9}, 1, "process 1 of 2 was ended by SIGKILL"),
        ({0: 143, 1: 7}, 1, "process 1 of 2 ended with code 7"),
    ],
)
def test_the_exit_code_of_all_is_that_of_the_one_that_failed(codes, code, reason):
    assert _failure(codes, 2) == (code, reason)


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    import torch

    assert process_device("auto") == "auto"  # alone
    for name, value in {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "here",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process_device("auto") == process_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_device("auto") == process_device("cuda") == "cuda:1"
    with pytest.raises(InputError, match="--device cuda:0: several processes take a GPU each"):
        process_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--nproc_per_node 4: there is 1 GPU here; give --nproc_per_node 1"):
        process_device("auto")


def test_without_gpus_processes_are_asked_for_on_the_cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_processes(2, "cpu")
    with pytest.raises(InputError, match="--n_gpu 2: there are no GPUs here; give --device cpu for 2 processes"):
        check_processes(2, "auto")
