"""scripts/score.py: what is printed, what is written, and mistakes in one line."""

import dataclasses
import json
import stat
import sys

import pytest

from modules.evaluation.bootstrap import Difference
from modules.evaluation.system_tests import SystemTest
from modules.runtime.errors import InputError
from scripts import score

REFERENCES = {"a": "The heart is normal.", "b": "Mild edema. Small effusion.", "c": "No acute chest disease."}
BASE = {"c": "no disease .", "a": "the heart is normal .", "b": "effusion ."}
OURS = {"b": "mild edema . small effusion .", "c": "no acute chest disease .", "a": "the heart is large ."}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``run(*flags)`` runs the command in the folder of the files and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    for name, content in (("gts", REFERENCES), ("base", BASE), ("ours", OURS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    def of(*flags):
        argv = ["score.py", "--gts", "gts.json", "--meteor", "false", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        score.main()
        return capsys.readouterr().out

    return of


def test_one_system(run, tmp_path):
    text = run("--res", "base.json", "--cleaner", "iu_xray", "--train", "gts.json", "--out", "out")
    assert "| score | base | commonest training report |" in text and "percentile bootstrap over studies" in text
    assert "references seen in training (3)" in text and "p Holm" not in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["test"]["model"]["BLEU_1"] == results["test"]["model"]["BLEU_1_full"] > 0.5
    assert set(results["provenance"]["files_sha256"]) == {"gts", "res", "train"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json", "res.csv", "gts.csv", "statistics.npz", "report.html",
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "out" / "report.html").stat().st_mode) == 0o600
    assert "--res" not in text and "heart" not in text  # numbers, and no report


def test_several_systems_are_tested_against_the_first(run, tmp_path):
    text = run("--res", "base.json", "mine=ours.json", "--cleaner", "iu_xray", "--out", "out")
    assert (
        "| score | base | mine |" in text and "| mine | ROUGE_L | +" in text and "| p randomisation | p Holm |" in text
    )
    assert (tmp_path / "out" / "mine" / "comparison_with_base.html").is_file()
    text = run("--res", "x=base.json", "x=ours.json", "y=ours.json", "y=ours.json")
    assert "| score | x | y |" in text and " ± " in text and "| p seeds | p Holm |" in text


def test_the_interval_over_seeds_covers_what_their_p_value_does():
    change = Difference(0.2, 0.19, 0.21, 0.0002, 0.0001, p_seeds=0.5, error=0.25, freedom=2.0)
    row = score.render_tests([SystemTest("b", "CIDEr", 0.1, 0.3, change, 1.0)]).splitlines()[-1]
    assert row == "| b | CIDEr | +0.2000 | [-0.8757, +1.2757] | 0.5000 | 1.0000 |"
    of_one = SystemTest("b", "CIDEr", 0.1, 0.3, dataclasses.replace(change, p_seeds=None), 1.0)
    assert "| [+0.1900, +0.2100] | 0.0001 |" in score.render_tests([of_one])


def test_published_conventions_come_first(run):
    text = run("--res", "base.json", "--published", "promptmrg")
    assert text.startswith(
        "base, as PromptMRG publishes clinical scores:\n  example, 14 classes, uncertain as negative: "
    )
    with pytest.raises(InputError, match="'orgam'.*did you mean ORGan"):
        run("--res", "base.json", "--published", "orgam")


def test_mistakes_are_named_before_any_work(run, tmp_path):
    for flags, cause in (
        (("--res", "nowhere.json"), "nowhere.json: there is no such file"),
        (("--res", "base.json", "--threshold", "3"), "threshold 3"),
        (("--res", "base.json", "--out", "gts.json"), "--out gts.json: is not a folder"),
        (("--res", "a/b=base.json", "a_b=ours.json", "--out", "out"), "two systems would have one folder"),
        (("--res", "base.json", "--bertscore_path", "none"), "--bertscore_path none"),
    ):
        with pytest.raises(InputError, match=cause):
            run(*flags)
    assert not (tmp_path / "out").exists()
