"""Checks of Python, torch and GPU, and the provenance that is saved with results."""

import contextlib
import json
import subprocess
import sys

import pytest

from modules.runtime import environment
from modules.runtime.environment import (
    check_python,
    choose_device,
    choose_precision,
    git_state,
    package_versions,
    provenance,
    runs_on,
)
from modules.runtime.errors import InputError

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CUDA_12 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ((7, 0), CUDA_13, False),  # V100 under the newest torch: the case that the pin is for
        ((7, 0), CUDA_12, True),
        ((7, 5), ["sm_70"], True),  # same major, later minor
        ((8, 0), ["sm_86"], False),  # same major, earlier minor
        ((8, 9), CUDA_13, True),
        ((6, 1), CUDA_12, False),
        ((12, 1), ["sm_90", "compute_120"], True),  # PTX is compiled for what is newer
        ((9, 0), ["compute_120"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),  # architecture-specific: that one capability only
        ((12, 0), ["compute_100f"], False),
        ((10, 3), ["sm_100f"], True),
        ((8, 0), [], False),
        ((9, 4), ["gfx942"], True),  # ROCm
        ((9, 4), ["gfx90a:sramecc+:xnack-", "gfx1100"], False),
        ((9, 0), ["gfx90a:sramecc+:xnack-"], True),
        ((11, 0), ["gfx1100"], True),
        ((9, 4), ["gfx9-4-generic"], True),  # of a kind that is not known here: torch itself has to say
    ],
)
def test_which_gpus_a_build_runs_on(capability, flags, expected):
    assert runs_on(capability, flags) is expected


def test_old_python_is_named():
    check_python((3, 11, 0))
    check_python((3, 14, 2))
    with pytest.raises(InputError, match=r"Python 3\.10 .*3\.11 or newer"):
        check_python((3, 10, 12))


def pretend_gpu(monkeypatch, capability, flags, bf16=True):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: flags)
    # On a real V100 the first answer, with emulation, is yes.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def test_a_gpu_without_kernels_names_the_pin(monkeypatch):
    pretend_gpu(monkeypatch, (7, 0), CUDA_13)
    with pytest.raises(InputError, match=r"V100.*capability 7\.0.*constraints-v100\.txt"):
        choose_device("auto")
    assert choose_device("cpu").type == "cpu"
    pretend_gpu(monkeypatch, (7, 0), CUDA_12)
    assert str(choose_device("auto")) == "cuda:0"
    with pytest.raises(InputError, match="--device cuda:1.*1 GPUs"):
        choose_device("cuda:1")


def test_emulated_bfloat16_is_refused(monkeypatch):
    pretend_gpu(monkeypatch, (7, 0), CUDA_12, bf16=False)
    device = choose_device("cuda")
    assert choose_precision("float16", device) == choose_precision("auto", device) == "float16"
    with pytest.raises(InputError, match="use --precision float16"):
        choose_precision("bfloat16", device)
    assert choose_precision("bfloat16", choose_device("cpu")) == "bfloat16"


def test_auto_precision_is_what_the_device_computes_in(monkeypatch):
    pretend_gpu(monkeypatch, (8, 0), CUDA_12)
    assert choose_precision("auto", choose_device("cuda")) == "bfloat16"
    assert choose_precision("float32", choose_device("cuda")) == "float32"
    assert choose_precision("auto", choose_device("cpu")) == "float32"


def test_no_gpu(monkeypatch, caplog):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert choose_device("auto").type == "cpu"
    assert not caplog.records
    with pytest.raises(InputError, match="no NVIDIA GPU is visible"):
        choose_device("cuda")
    # A driver too old for the build must not turn a GPU run into a silent CPU run.
    monkeypatch.setattr(environment.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert choose_device("auto").type == "cpu"
    assert "driver of 580" in caplog.text
    with pytest.raises(InputError, match="must be auto, cpu, cuda or cuda:N"):
        choose_device("gpu")


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
        check=True,
        capture_output=True,
    )


def test_git_state_follows_the_code(tmp_path):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "main.py").write_text("a = 1\n")
    git(tmp_path, "add", "main.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False and clean["diff_sha256"] is None
    (tmp_path / "main.py").write_text("a = 2\n")
    edited = git_state(tmp_path)
    assert edited["commit"] == clean["commit"] and edited["dirty"]
    (tmp_path / "new.py").write_text("b = 1\n")
    assert git_state(tmp_path)["diff_sha256"] != edited["diff_sha256"]
    # A copy without its own .git inside somebody's repository must not borrow that commit.
    (tmp_path / "copy").mkdir()
    assert git_state(tmp_path / "copy") is None


def test_provenance_is_json_and_complete():
    saved = json.loads(json.dumps(provenance(argv=["main_train.py", "--seed", "1"])))
    assert saved["argv"] == ["main_train.py", "--seed", "1"]
    assert saved["packages"]["torch"].startswith("2.")
    assert saved["device_name"]
    assert saved["created"].endswith("+00:00")
    assert package_versions(["no-such-package"]) == {"no-such-package": None}


def test_provenance_needs_no_torch():
    code = (
        "import sys; from modules.runtime.environment import provenance; provenance(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT).returncode == 0
