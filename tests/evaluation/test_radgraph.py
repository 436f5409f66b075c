"""RadGraph F1 through a process of its own, with a package that stands in for radgraph and answers by words shared."""

import sys

import pytest

from modules.evaluation.radgraph import RadGraph
from modules.runtime.errors import InputError

STAND_IN = """
import os

assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
print("Using device: as the package says on standard output")


class F1RadGraph:
    def __init__(self, reward_level, model_type, model_cache_dir, cuda):
        if not os.path.isfile(os.path.join(model_cache_dir, model_type, "weights.th")):
            raise RuntimeError("no weights")
        assert (reward_level, model_type, cuda) == ("all", "radgraph-xl", -1)

    def __call__(self, hyps, refs):
        shares = [len(set(h.split()) & set(r.split())) / len(h.split()) for h, r in zip(hyps, refs)]
        levels = (shares, [s / 2 for s in shares], [s / 4 for s in shares])
        return tuple(sum(level) / len(level) for level in levels), levels, [], []
"""


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "models" / "radgraph-xl"
    folder.mkdir(parents=True)
    (folder / "weights.th").write_bytes(b"")
    return folder


@pytest.fixture
def python(tmp_path):
    """An interpreter that has a package radgraph, and gets the arguments that any Python would get."""
    (tmp_path / "site" / "radgraph").mkdir(parents=True)
    (tmp_path / "site" / "radgraph" / "__init__.py").write_text(STAND_IN)
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable} -IS\nimport runpy, sys\nassert sys.argv[1] == '-I'\n"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "runpy.run_path(sys.argv[2], run_name='__main__')\n"
    )
    path.chmod(0o755)
    return str(path)


def test_scores_come_back_in_order_and_empty_texts_get_none(model, python):
    scores = RadGraph(str(model), python).score(["no effusion", "a b", "", "heart"], ["no edema", "b a", "x", "  "])
    assert {name: values.ravel().tolist() for name, values in scores.items()} == {
        "RadGraph_F1_simple": [0.5, 1.0, 0, 0],
        "RadGraph_F1_partial": [0.25, 0.5, 0, 0],
        "RadGraph_F1_complete": [0.125, 0.25, 0, 0],
    }


def test_a_process_that_cannot_run_is_one_line_at_the_start(model, python, tmp_path):
    with pytest.raises(InputError, match="--radgraph_path .*weights.th"):
        RadGraph(str(tmp_path), python)
    with pytest.raises(InputError, match="--radgraph_python .*cannot be run: No such file"):
        RadGraph(str(model), str(tmp_path / "none"))
    (tmp_path / "site" / "radgraph" / "__init__.py").write_text("import transformers_below_5")
    with pytest.raises(InputError, match="did not run in .*No module named 'transformers_below_5'") as error:
        RadGraph(str(model), python)
    assert "\n" not in str(error.value)
