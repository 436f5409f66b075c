"""Scores of radeval through a process of its own, with a package that stands in for it."""

import sys

import numpy as np
import pytest

from modules.evaluation import score
from modules.evaluation.metric_table import RADEVAL, smaller_is_better
from modules.evaluation.radeval import RadEval
from modules.evaluation.settings import ScoringSettings
from modules.runtime.errors import InputError

STAND_IN = """
import os

import nltk

assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
assert nltk.download("punkt") is False
print("as packages do, on standard output")
KEYS = {"rouge": ["rouge1", "rouge2", "rougeL"], "radcliq": ["radcliq_v1"], "ratescore": ["ratescore"]}


class RadEval:
    def __init__(self, metrics, per_sample, show_progress):
        [self.name] = metrics
        if self.name == "ratescore" and not os.path.isfile(os.environ["XDG_CACHE_HOME"] + "/weights"):
            raise OSError("no weights in the cache\\nand more lines")

    def __call__(self, refs, hyps):
        lengths = [float(len(hyp)) for hyp in hyps]
        return {key: [value + number for value in lengths] for number, key in enumerate(KEYS[self.name])}
"""


@pytest.fixture
def python(tmp_path):
    """An interpreter that has packages radeval and nltk, and gets the arguments that any Python would get."""
    for name, content in (("radeval", STAND_IN), ("nltk", "def download(name):\n    raise OSError('network')\n")):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(content)
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable} -IS\nimport runpy, sys\nassert sys.argv[1] == '-I'\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "runpy.run_path(sys.argv[2], run_name='__main__')\n"
    )
    path.chmod(0o755)
    return str(path)


def test_scores_of_each_report_get_intervals(python):
    found = RadEval("rouge, radcliq", python).score(["a", "b"], ["xyz", ""])
    assert {name: values.ravel().tolist() for name, values in found.items()} == {
        "RadEval_ROUGE_1": [3, 0], "RadEval_ROUGE_2": [4, 1], "RadEval_ROUGE_L": [5, 2], "RadEval_RadCliQ_v1": [3, 0],
    }  # fmt: skip
    settings = ScoringSettings(meteor=False, clinical=False, radeval="radcliq", radeval_python=python)
    scored = score(["a b", "b c", "c"], ["x", "y", "zzz"], settings=settings)
    assert scored.scores["model"]["RadEval_RadCliQ_v1"] == pytest.approx(5 / 3)
    assert np.array_equal(scored.statistics["model"].tables["RadEval_RadCliQ_v1"], [[1], [1], [3]])
    low, high = scored.intervals["model"]["RadEval_RadCliQ_v1"]
    assert 1 <= low < 5 / 3 < high <= 3


def test_lower_is_better_for_radcliq_alone():
    names = [each.name for scores in RADEVAL.values() for each in scores.values()]
    assert [name for name in names if smaller_is_better(name)] == ["RadEval_RadCliQ_v1"]


def test_weights_are_looked_for_in_the_folder_and_their_absence_is_one_line_at_the_start(python, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(
        InputError, match="--radeval ratescore: did not run in .*OSError: no weights in the cache"
    ) as error:
        RadEval("rouge,ratescore", python, str(folder))
    assert "and more lines" not in str(error.value) and str(folder) in str(error.value)
    (folder / "weights").touch()
    assert RadEval("ratescore", python, str(folder)).score(["a"], ["b"])["RadEval_RaTEScore"].tolist() == [[1]]


def test_mistakes_are_named(python, tmp_path):
    with pytest.raises(InputError, match="--radeval rouje: must be one of rouge.*did you mean rouge"):
        RadEval("rouje", python)
    with pytest.raises(InputError, match="--radeval_weights nowhere: no such folder"):
        RadEval("rouge", python, "nowhere")
    with pytest.raises(InputError, match="--radeval_python .*none: cannot be run"):
        RadEval("rouge", str(tmp_path / "none"))
