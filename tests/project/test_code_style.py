"""One formatter, no unused names, and types that fit in the rooms of the method."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


TOOLS = (
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    pytest.param(["mypy"], marks=pytest.mark.thorough, id="mypy"),
)


@pytest.mark.parametrize("tool", TOOLS, ids=" ".join)
def test_code_passes(tool):
    """pyproject.toml holds the settings: what is formatted how, and which rooms have checked types."""
    if tool == ["mypy"] and version("torch").startswith("2.10."):
        pytest.skip("torch 2.10 does not declare Module.to(memory_format=...)")
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
