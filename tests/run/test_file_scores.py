"""Files of anybody's reports are scored as a run's own: the numbers of a finished run come out again."""

import json

import pytest

from modules.evaluation import score
from modules.evaluation.baselines import COMMONEST
from modules.evaluation.metric_table import is_main
from modules.evaluation.report_scores import as_json
from modules.evaluation.report_statistics import load_statistics
from modules.evaluation.settings import ScoringSettings
from modules.evaluation.system_tests import paired_tests
from modules.run.file_scores import Inputs, folder_name, score_files, systems_of, write_run
from modules.runtime.errors import InputError
from scripts.compare_runs import compare_folders, read_folder

WITHOUT_JAVA = ScoringSettings(meteor=False)
REFERENCES = ["The heart is normal.", "Mild edema. Small effusion.", "No acute disease of the chest.", "Clear lungs."]
BASE = ["the heart is normal .", "edema .", "no effusion .", "the lungs are clear ."]
OURS = ["the heart is large .", "mild edema . small effusion .", "no disease .", "clear lungs ."]


@pytest.fixture(scope="module")
def results(trained):
    return json.loads((trained / "results.json").read_text())


def equal(found, expected):
    """Every number that both have agrees; expected may have more systems and the likelihood."""
    names = [name for name in expected if name != "nll"]
    assert set(names) == set(found)
    for name in names:
        assert found[name] == (pytest.approx(expected[name], abs=1e-12) if expected[name] is not None else None), name


def test_a_finished_run_is_repeated_from_its_export_and_annotation(trained, demo, results):
    """Both forms of the references, the baseline, seen references, classes, warnings, and all intervals."""
    annotation = str(demo / "annotation.json")
    found = score_files(
        Inputs(
            annotation,
            {"model": [str(trained / "exports" / "reports.json")]},
            training=annotation,
            cleaner="iu_xray",
            max_seq_length=results["config"]["max_seq_length"],
            threshold=results["config"]["threshold"],
        ),
        WITHOUT_JAVA,
        "cpu",
    )
    again = json.loads(json.dumps(as_json(found.scored)))
    for system in ("model", COMMONEST):
        equal(again["test"][system], results["test"][system])
        equal(again["intervals"][system], results["intervals"][system])
        assert again["variety"][system] == pytest.approx(results["variety"][system], abs=1e-12)
    for kind, part in results["by_reference"].items():
        assert again["by_reference"][kind]["reports"] == part["reports"]
        for system, scores in again["by_reference"][kind]["scores"].items():
            equal(scores, part["scores"][system])
    for key in ("clinical_classes", "missing", "intervals_are", "warnings"):
        assert again[key] == results[key]


def test_a_finished_run_is_repeated_from_gts_and_res(trained, results):
    """Of the references as published codes cut them, the plain names; ids are in neither file."""
    found = score_files(Inputs(str(trained), {"model": [str(trained / "res.csv")]}), WITHOUT_JAVA, "cpu")
    again, expected = as_json(found.scored)["test"]["model"], results["test"]["model"]
    plain = [name for name in expected if not name.endswith("_full") and name != "nll" and expected[name] is not None]
    assert len(plain) > 40
    for name in plain:
        assert again[name] == pytest.approx(expected[name], abs=1e-12), name
    limits = as_json(found.scored)["intervals"]["model"]
    for name in set(results["intervals"]["model"]) & set(plain):
        assert limits[name] == pytest.approx(results["intervals"]["model"][name], abs=1e-12), name


def test_the_folder_is_one_that_compare_runs_reads(tmp_path):
    (tmp_path / "gts.json").write_text(json.dumps(REFERENCES))
    raw = ["The heart is normal!", "Edema.", "No effusion (today).", "The lungs are clear."]
    for name, reports in (("base", raw), ("ours", OURS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(reports))
    systems = systems_of([str(tmp_path / "base.json"), f"our system={tmp_path / 'ours.json'}"])
    found = score_files(Inputs(str(tmp_path / "gts.json"), systems, cleaner="iu_xray"), WITHOUT_JAVA, "cpu")
    for run in found.generated:
        write_run(tmp_path / folder_name(run), found, run, samples=2)
    comparison = compare_folders(
        (read_folder(tmp_path / "base"), read_folder(tmp_path / "our_system")), by="ROUGE_L", show=1, all_scores=False
    )
    tests = paired_tests(found.scored, found.systems, is_main)
    assert {test.system for test in tests} == {"our system"}
    assert {line.name: line.second for line in comparison.scores} == pytest.approx(
        {test.score: test.value for test in tests}
    )
    assert {line.name: line.p_holm for line in comparison.scores} == pytest.approx(
        {test.score: test.p_holm for test in tests}
    )
    page = (tmp_path / "our_system" / "report.html").read_text()
    assert "our system, scored" in page and "<script" not in page and "hallucinated devices" in page
    again = score_files(Inputs(str(tmp_path / "base"), {"base": [str(tmp_path / "base")]}), WITHOUT_JAVA, "cpu").scored
    for name in ("BLEU_4", "ROUGE_L", "CIDEr"):
        assert again.scores["base"][name] == pytest.approx(found.scored.scores["base"][name], abs=1e-12)
    assert set(load_statistics(tmp_path / "base" / "statistics.npz")) == {"model"}


def test_seeds_are_tested_over_seeds_and_studies():
    systems = {"base": ["base seed 1", "base seed 2"], "ours": ["ours seed 1", "ours seed 2"]}
    reports = {"base seed 1": BASE, "base seed 2": BASE[:3] + [""], "ours seed 1": OURS, "ours seed 2": REFERENCES}
    scored = score(REFERENCES, reports, cleaner="iu_xray", settings=WITHOUT_JAVA)
    tests = paired_tests(scored, systems, lambda name: name == "ROUGE_L")
    [test] = tests
    assert test.change.p_seeds is not None and test.change.p == test.change.p_seeds
    both = [scored.scores[name]["ROUGE_L"] for name in systems["ours"]]
    assert test.value == pytest.approx(sum(both) / 2)
    with pytest.raises(InputError, match="ours has 1 seeds and base 2"):
        paired_tests(scored, systems | {"ours": ["ours seed 1"]}, lambda name: True)


def test_generated_texts_that_were_cleaned_before_stay_as_they_are():
    """A report that was cut ends without a full stop, and <unk> keeps its brackets."""
    cut = ["the heart is <unk>", *BASE[1:]]
    cleaned = score(REFERENCES, cut, cleaner="iu_xray", settings=WITHOUT_JAVA).scores["model"]
    lower = [
        "the heart is normal .",
        "mild edema . small effusion .",
        "no acute disease of the chest .",
        "clear lungs .",
    ]
    as_given = score(lower, cut, settings=WITHOUT_JAVA).scores["model"]
    for name in ("BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr"):
        assert cleaned[name] == pytest.approx(as_given[name], abs=1e-12)
    raw = score(REFERENCES, [text.capitalize() for text in lower], cleaner="iu_xray", settings=WITHOUT_JAVA)
    assert raw.scores["model"]["ROUGE_L"] == pytest.approx(1)


JAVA = """#!/bin/sh
echo start >> "$0.log"
case "$*" in
  *-stdio*) while read -r line; do echo 2 3 0 0 2 2 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 2 2; done ;;
  *) tr -d . ;;
esac
"""


@pytest.mark.parametrize(("cleaner", "starts"), [("coco", 2), ("iu_xray", 1)])
def test_two_java_processes_at_most_whatever_is_scored(tmp_path, monkeypatch, cleaner, starts):
    """One tokenises all captions of all systems, one answers METEOR's questions."""
    java = tmp_path / "java"
    java.write_text(JAVA)
    java.chmod(0o755)
    monkeypatch.setattr("modules.evaluation.meteor.find_java", lambda: str(java))
    references = [[text, text.lower()] for text in REFERENCES] if cleaner == "coco" else REFERENCES
    options = {} if cleaner == "coco" else {"training": REFERENCES, "max_seq_length": 9}
    scored = score(references, {"base": BASE, "ours": OURS}, cleaner=cleaner, **options)
    assert (tmp_path / "java.log").read_text().count("start") == starts
    assert scored.scores["ours"]["METEOR"] is not None and not scored.missing.get("METEOR")
    if cleaner == "coco":
        assert not any(name.startswith("ce_") for name in scored.scores["ours"])
        assert as_json(scored, "ours")["test"]["model"]["BLEU_1"] > 0


def test_names_of_systems(tmp_path):
    assert systems_of(["a/res.csv"]) == {"res": ["a/res.csv"]}
    assert systems_of(["a/res.csv", "b/res.csv"]) == {"a": ["a/res.csv"], "b": ["b/res.csv"]}
    assert systems_of(["x=a.csv", "x=b.csv", "y=c.csv", "y=d.csv"]) == {
        "x": ["a.csv", "b.csv"],
        "y": ["c.csv", "d.csv"],
    }
    (tmp_path / "a=b.csv").write_text("report\nx\n")
    assert systems_of([str(tmp_path / "a=b.csv")]) == {"a=b": [str(tmp_path / "a=b.csv")]}
    for given, cause in (
        (["a.csv", "a.csv"], "given twice"),
        (["x="], "names no file"),
        (["references=a"], "taken"),
        (["base.csv", "base=other.csv"], "--res base.csv: would be called base"),
    ):
        with pytest.raises(InputError, match=cause):
            systems_of(given)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"cleaner": "r2gen"}, "choose one of none, iu_xray, mimic_cxr, coco"),
        ({"threshold": 3}, "give these, a cleaner and max_seq_length"),
        ({"cleaner": "coco", "max_seq_length": 20}, "captions are not cut"),
        ({"max_seq_length": -1}, "must be 0, or at least"),
    ],
)
def test_options_that_exclude_one_another(options, cause):
    with pytest.raises(InputError, match=cause):
        score(REFERENCES, BASE, settings=WITHOUT_JAVA, **options)
    for texts, cause in (
        (BASE[:3] + [float("nan")], "model: number 4 is float, not a text"),
        ("one text", "model: a list of texts is needed"),
        ({"base": dict(enumerate(BASE))}, "base: a list of texts is needed.*not a dict"),
        ([[text] for text in BASE], "a report is one text"),
    ):
        with pytest.raises(InputError, match=cause):
            score(REFERENCES, texts, settings=WITHOUT_JAVA)
    with pytest.raises(InputError, match="only references may be several, with cleaner 'coco'"):
        score([[text] for text in REFERENCES], BASE, settings=WITHOUT_JAVA)
    with pytest.raises(InputError, match="model has 3 reports where there are 4 references"):
        score(REFERENCES, BASE[:3], settings=WITHOUT_JAVA)
