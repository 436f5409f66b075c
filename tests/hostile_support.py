"""Runs the entry points as a user does, in this process, and builds files that would do harm if they could."""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.runtime.errors import run_entry_point
from tests.conftest import TINY


class Touch:
    """Unpickled, it makes the file ``canary``: what a malicious file would do, and much more."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def run(monkeypatch, capsys, program: str, *argv) -> tuple[int, str]:
    """Exit code of ``program`` (main_train, scripts.compute_ce, ...) and what it wrote to stderr, bars excepted."""
    module = __import__(program, fromlist=["main"])
    monkeypatch.setattr(sys, "argv", [program, *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        run_entry_point(module.main)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return done.value.code, "\n".join(line for line in lines if line.strip() and "%|" not in line)


def refused(monkeypatch, capsys, program: str, *argv) -> str:
    """The one line of an entry point that ends with exit code 2."""
    code, said = run(monkeypatch, capsys, program, *argv)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    return errors[0]


def training(demo: Path, tmp_path: Path, *flags) -> list:
    """Arguments of main_train.py for the tiny data set."""
    return [
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--epochs",
        1,
        "--save_dir",
        tmp_path / "results",
        "--record_dir",
        tmp_path / "records",
        *TINY,
        *flags,
    ]


def _saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _tar(canary: Path) -> bytes:
    """torch's format before 0.1.10: a tar archive of pickles."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Touch(canary))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _script(canary: Path) -> bytes:
    """A TorchScript archive, whose code is Python that torch.load would hand to the compiler."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def object_array(canary: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Touch(canary)], dtype=object))
    return buffer.getvalue()


def _absurd_header(canary: Path) -> bytes:
    return struct.pack("<Q", 2**62) + b'{"__metadata__":{}}'


def _lying_header(canary: Path) -> bytes:
    """A safetensors file with a tensor of more elements than there are bytes in the world."""
    header = json.dumps({"neighbours": {"dtype": "I32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    return struct.pack("<Q", len(header)) + header


def _archive_bomb(canary: Path) -> bytes:
    """64 MB of zeros in some hundred kilobytes."""
    plain = io.BytesIO(_saved({"state_dict": {"w": torch.zeros(64_000_000, dtype=torch.uint8)}}))
    packed = io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    return packed.getvalue()


def _as_weights(content) -> dict:
    return {"state_dict": {"w": content}, "model_state_dict": {"w": content}, "extra": content}


HARMFUL = {
    "zip with a call": lambda canary: _saved(_as_weights(Touch(canary))),
    "call among tensors": lambda canary: _saved({"state_dict": {"w": torch.ones(1)}, "extra": Touch(canary)}),
    "call, old format": lambda canary: _saved(_as_weights(Touch(canary)), _use_new_zipfile_serialization=False),
    "bare pickle": lambda canary: pickle.dumps({"a": Touch(canary)}),
    "tar of pickles": _tar,
    "TorchScript": _script,
    "object array": object_array,
    "absurd header": _absurd_header,
    "lying header": _lying_header,
    "archive bomb": _archive_bomb,
    "sparse tensors": lambda canary: _saved(_as_weights(torch.eye(3).to_sparse())),
    "one number of huge shape": lambda canary: _saved(_as_weights(torch.zeros(1).expand(2**40))),
    "a module": lambda canary: _saved(torch.nn.Linear(2, 2)),
}
