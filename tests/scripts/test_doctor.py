"""scripts/doctor.py: what each check says on machines that lack something, and that nothing is needed to run it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from modules.runtime import environment
from modules.runtime.packages import remedy
from scripts import doctor
from scripts.doctor import NOTE, OK, PROBLEM

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def test_packages(tmp_path, monkeypatch):
    assert doctor.packages()[0] == OK
    versions = {"torch": "2.9.1+cu126", "numpy": "2.4", "pycocoevalcap": "1.2"}

    def version(name):
        if name not in versions:
            raise doctor.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    needed = tmp_path / "requirements.txt"
    needed.write_text("# note\ntorch>=2.10,<2.16\nnumpy>=2.0,<3\npycocoevalcap==1.2\ntimm>=1.0.20,<2\n-r x.txt\n")
    assert doctor.packages(needed) == (
        PROBLEM,
        "torch 2.9.1+cu126 is installed, torch>=2.10,<2.16 is needed; timm>=1.0.20,<2 is not installed: " + remedy(),
    )


@pytest.mark.parametrize(
    ("specifiers", "version", "allowed"),
    [
        (">=2.10,<2.16", "2.10.0", True),
        (">=2.10,<2.16", "2.9", False),
        (">=2.10,<2.16", "2.16.0+cpu", False),
        (">=3,<4", "3.0.2", True),
        ("==1.2", "1.2.0", True),
        ("==1.2", "1.2.1", False),
        (">=0.5,<1", "0.7.0rc1", True),
    ],
)
def test_versions(specifiers, version, allowed):
    assert doctor._allows(specifiers, version) is allowed


def pretend_gpu(monkeypatch, capability, flags, free=20):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 32 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: flags.split())


def test_gpu(monkeypatch):
    pretend_gpu(monkeypatch, (7, 0), "sm_75 sm_80 sm_90")
    (finding,) = doctor.examine([("gpu", doctor.gpu)])
    assert finding.state == PROBLEM and "capability 7.0" in finding.text and "constraints-v100.txt" in finding.text
    pretend_gpu(monkeypatch, (7, 0), "sm_70 sm_75")
    state, text = doctor.gpu()
    assert state == OK and text.count("Tesla V100") == 2 and "20.0 of 32.0 GiB free" in text
    assert "--precision float16" in text
    pretend_gpu(monkeypatch, (7, 0), "sm_70 sm_75", free=1)
    assert doctor.gpu()[0] == NOTE and "nvidia-smi" in doctor.gpu()[1]


def test_no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver, state in ((None, NOTE), ("/usr/bin/nvidia-smi", PROBLEM)):
        monkeypatch.setattr(doctor.shutil, "which", lambda name, driver=driver: driver)
        monkeypatch.setattr(environment.shutil, "which", lambda name, driver=driver: driver)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        assert doctor.gpu()[0] == state
    assert "driver of 580 or newer" in doctor.gpu()[1]


def test_meteor(monkeypatch):
    monkeypatch.setattr("modules.evaluation.meteor.find_java", lambda: "/bin/false")
    state, text = doctor.meteor()
    assert state == NOTE and "java ended" in text and "METEOR will be empty" in text


def test_text_encoder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert doctor.text_encoder("tfidf")[0] == OK
    state, text = doctor.text_encoder("zzxslp/RadBERT-RoBERTa-4m")
    assert state == NOTE and "hf download zzxslp/RadBERT-RoBERTa-4m" in text
    assert doctor.text_encoder(str(tmp_path))[0] == PROBLEM
    (tmp_path / "config.json").write_text("{}")
    assert doctor.text_encoder(str(tmp_path))[0] == OK
    (finding,) = doctor.examine([("text encoder", lambda: doctor.text_encoder("no/such/model"))])
    assert finding.state == PROBLEM and "\n" not in finding.text


def test_visual_extractor(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert doctor.visual_extractor("tf_efficientnet_lite0")[0] == OK
    assert doctor.visual_extractor("resnet18")[0] == NOTE
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert doctor.visual_extractor("resnet18")[0] == OK
    assert doctor.visual_extractor("resnet1801")[0] == PROBLEM


@pytest.mark.parametrize(("free", "state"), [(1, PROBLEM), (5, NOTE), (50, OK)])
def test_disk(monkeypatch, free, state):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free * GIB))
    assert doctor.disk()[0] == state


def test_permissions(tmp_path, monkeypatch):
    # pytest's folders are closed further up, which would hide everything below.
    monkeypatch.setattr(doctor, "_readable_by_others", lambda folder: bool(folder.stat().st_mode & 0o005))
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o755)
    (tmp_path / "data" / "README.md").touch()
    assert doctor.permissions(tmp_path)[0] == OK
    (tmp_path / "data" / "annotation.json").touch()
    state, text = doctor.permissions(tmp_path)
    assert state == NOTE and f"{tmp_path}/data: chmod go-rwx" in text
    (tmp_path / "data").chmod(0o700)
    assert doctor.permissions(tmp_path)[0] == OK
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # root may write everywhere
    assert doctor.permissions(tmp_path)[0] == PROBLEM


def test_workers(tmp_path, monkeypatch):
    assert doctor.workers(tmp_path)[0] == OK
    assert doctor.workers(tmp_path / "absent")[0] == PROBLEM
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 * 2**20))  # docker's own
    state, text = doctor.workers(tmp_path)
    assert state == NOTE and "--shm-size" in text


def test_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    assert "--image_dir DIR" in doctor.loader("", "resnet18")[1]
    images = tmp_path / "data" / "own" / "images"
    images.mkdir(parents=True)
    Image.new("L", (300, 300), 90).save(images / "a.png")
    monkeypatch.setattr(doctor, "_images_per_second_of_gpu", lambda name: 1e9)
    state, text = doctor.loader("", "resnet18")
    assert state == NOTE and "300 x 300" in text and "reading would limit the GPU" in text
    monkeypatch.setattr(doctor, "_images_per_second_of_gpu", lambda name: 1e-9)
    assert doctor.loader(str(images), "resnet18")[0] == OK


def test_without_torch_and_with_a_broken_check(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = doctor.examine([("gpu", doctor.gpu), ("broken", lambda: 1 / 0)])
    assert findings[0].text == "needs the package torch: " + remedy()
    assert findings[1].text == "the check failed: ZeroDivisionError: division by zero"


def test_a_machine_with_nothing_installed():
    """-S hides every installed package, as on a fresh machine."""
    command = [sys.executable, "-S", ROOT / "scripts" / "doctor.py", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    report = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert not report["ok"] and found["python"]["state"] == OK
    assert "torch>=" in found["packages"]["text"] and found["gpu"]["text"].startswith("needs the package torch: ")
    assert found["gpu"]["text"].partition("torch: ")[2] in found["packages"]["text"]
