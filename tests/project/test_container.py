"""Dockerfile and .dockerignore: what they name exists, nothing runs as root, no data goes into an image."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint():
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_is_copied_exists():
    copied = [word for line in LINES if line.startswith("COPY") for word in line.split()[2:-1]]
    assert "requirements.txt" in copied
    assert not [name for name in copied if not (ROOT / name).exists()]
    # setup.sh must find its files unchanged when the demo calls it again, without a network.
    needed = set(re.findall(r"\$root/([\w/-]+\.txt)", (ROOT / "setup.sh").read_text()))
    assert len(needed) > 3 and all(name in copied or str(Path(name).parent) in copied for name in needed)
    assert not [name for name in needed if not (ROOT / name).is_file()]


def test_nothing_runs_as_root():
    users = [line.split()[1] for line in LINES if line.startswith("USER")]
    assert users == ["${USER_ID}"] and "ARG USER_ID=1000" in LINES
    runs = [index for index, line in enumerate(LINES) if line.startswith(("RUN", "CMD")) and ".sh" in line]
    assert len(runs) == 2 and LINES.index("USER ${USER_ID}") < min(runs)


def test_the_default_is_locked_and_can_name_its_base_by_digest():
    text = "\n".join(LINES)
    assert "ARG SETUP=--locked" in LINES and "ARG TORCH=cuda" in LINES  # the lock's torch
    assert re.search(r"^ARG BASE=\S+\nFROM \$\{BASE\}$", text, re.MULTILINE)
    installs = [line for line in LINES if " pip install" in line]
    assert len(installs) == 1 and "--require-hashes" in installs[0]
    assert any(line.startswith("HEALTHCHECK") and " CMD " in line for line in LINES)


def ignored(path):
    """Whether .dockerignore keeps ``path`` out: the last pattern that fits it or a folder above it decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("/")
        if not pattern or pattern.startswith("#"):
            continue
        above = [path, *(str(parent) for parent in Path(path).parents)]
        if any(fnmatch(name, pattern) or pattern.startswith("**/") and fnmatch(name, pattern[3:]) for name in above):
            result = not line.startswith("!")
    return result


@pytest.mark.parametrize(
    "path",
    [
        "data/iu_xray/annotation.json",
        "data/mimic_cxr/images/p10/x.jpg",
        "results/a/res.csv",
        "records/iu_xray.csv",
        "model_best.pth",
        "sub/negatives.safetensors",
        ".git/HEAD",
        ".venv/bin/python",
        "modules/__pycache__/a.pyc",
    ],
)
def test_data_stays_out(path):
    assert ignored(path)


def test_code_goes_in():
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert not [path for path in tracked.stdout.split() if ignored(path)]
