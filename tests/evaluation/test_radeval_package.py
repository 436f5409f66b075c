"""ROUGE through the bridge is the package radeval's own, in a small environment that has it."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from modules.evaluation.radeval import RadEval

# What radeval imports for ROUGE beside this project's packages; all that it requires is far more.
PACKAGES = ["radeval==2.2.1", "rouge_score", "nltk", "regex", "rich", "markdown-it-py", "mdurl", "pygments", "six"]
OWN = """
import json, sys
import nltk
nltk.download = lambda *_, **__: False
from radeval.metrics.rouge.adapter import RougeMetric
refs, hyps = json.load(sys.stdin)
print(json.dumps(RougeMetric().compute(refs, hyps, per_sample=True)))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """RADEVAL_PYTHON, else the Python of an environment that is made from the package index."""
    if given := os.environ.get("RADEVAL_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("radeval")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True)
    [site] = (folder / "lib").glob("python3*/site-packages")
    (site / "project.pth").write_text(sysconfig.get_path("purelib"))
    path = str(folder / "bin" / "python")
    done = subprocess.run([path, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no radeval from the package index: {done.stderr.strip().splitlines()[-1]}")
    return path


@pytest.mark.slow  # installs packages
@pytest.mark.timeout(600)
def test_rouge_equals_the_packages_own_on_fifty_pairs(python):
    rng = np.random.default_rng(0)
    words = "no small left right pleural effusions edema is seen unchanged heart normal clear lungs".split()
    texts = [" ".join(rng.choice(words, size=int(rng.integers(1, 30)))) + "." for _ in range(100)]
    references, generated = texts[:50], texts[50:]
    done = subprocess.run(
        [python, "-c", OWN], input=json.dumps([references, generated]), capture_output=True, text=True, check=True
    )
    expected = json.loads(done.stdout.splitlines()[-1])
    found = RadEval("rouge", python).score(references, generated)
    for key, name in (("rouge1", "RadEval_ROUGE_1"), ("rouge2", "RadEval_ROUGE_2"), ("rougeL", "RadEval_ROUGE_L")):
        assert found[name][:, 0] == pytest.approx(expected[key], abs=1e-9)
    assert Path(python).is_file() and found["RadEval_ROUGE_1"].mean() > 0.2
