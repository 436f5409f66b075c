"""Clinical efficacy: the arithmetic by hand and against scikit-learn, and the compute_ce script on users' files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modules.evaluation.clinical_scores import (
    AVERAGINGS,
    CLASS_SETS,
    FIVE_CLASSES,
    UNCERTAIN_POLICIES,
    class_table,
    clinical_scores,
    outcomes,
    scores_of,
)
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables
from modules.labels.labeler import CLASSES

ROOT = Path(__file__).resolve().parents[2]
NAN = np.nan


def labels(*reports: dict[str, float]) -> np.ndarray:
    """(N, 14) labels of reports given by the classes that they mention."""
    return np.array([[report.get(name, NAN) for name in CLASSES] for report in reports])


# Edema: one of two right, one false alarm. Fracture: the only one missed. Atelectasis: one doubtful on each side.
TRUTH = labels({"Edema": 1, "Fracture": 1}, {"Edema": 1, "Atelectasis": -1}, {"Edema": 0})
CLAIM = labels({"Edema": 1}, {"Edema": 0, "Atelectasis": 1}, {"Edema": 1, "Fracture": -1})


def test_scores_by_hand():
    scores = clinical_scores(TRUTH, CLAIM)
    assert len(scores) == 72
    # Uncertain as negative: TP 1 (Edema), FP 2 (Edema, Atelectasis), FN 2 (Fracture, Edema).
    assert scores["ce_rule_precision_micro_14_uncertain_negative"] == pytest.approx(1 / 3)
    assert scores["ce_rule_recall_micro_14_uncertain_negative"] == pytest.approx(1 / 3)
    assert scores["ce_rule_f1_micro_14_uncertain_negative"] == pytest.approx(1 / 3)
    # Edema has F1 2/(2+1+1), the thirteen others 0; of the five classes, four others.
    assert scores["ce_rule_f1_macro_14_uncertain_negative"] == pytest.approx(0.5 / 14)
    assert scores["ce_rule_f1_macro_5_uncertain_negative"] == pytest.approx(0.5 / 5)
    # Report 1: F1 2/(2+0+1); report 2 and 3 have nothing right.
    assert scores["ce_rule_f1_example_14_uncertain_negative"] == pytest.approx((2 / 3) / 3)
    # Uncertain as positive: Atelectasis of report 2 becomes right, Fracture of report 3 a false alarm.
    assert scores["ce_rule_precision_micro_14_uncertain_positive"] == pytest.approx(2 / 4)
    assert scores["ce_rule_recall_micro_14_uncertain_positive"] == pytest.approx(2 / 4)
    # Among the five classes there is no Fracture: TP 2, FP 1, FN 1.
    assert scores["ce_rule_f1_micro_5_uncertain_positive"] == pytest.approx(4 / 6)


SKLEARN = {"micro": "micro", "macro": "macro", "weighted": "weighted", "example": "samples"}


def by_scikit_learn(truth, claim, average):
    """Precision, recall and F1 of binary labels (N, C), or (N,) with average "binary"."""
    support = pytest.importorskip("sklearn.metrics").precision_recall_fscore_support
    return support(truth, claim, average=average, zero_division=0)[:3]


def ignoring(truth, claim, averaging):
    """The same of labels (N, C) of which pairs with an uncertain one are left out, or are negative on both sides."""
    kept = (truth != -1) & (claim != -1)
    truth, claim = truth == 1, claim == 1
    if averaging == "micro":
        return by_scikit_learn(truth[kept], claim[kept], "binary")
    return by_scikit_learn(truth & kept, claim & kept, SKLEARN[averaging])


def test_scores_equal_scikit_learn():
    """200 random label arrays: every averaging, class set and policy, to 1e-12."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        shares = rng.dirichlet([1, 1, 0.4, 1.5])
        truth, claim = rng.choice([1, 0, -1, NAN], (2, int(rng.integers(1, 12)), 14), p=shares)
        truth[:, trial % 14], claim[0] = (0, NAN) if trial % 3 == 0 else (truth[:, trial % 14], claim[0])
        scores = clinical_scores(truth, claim, labeler="chexbert")
        policy = UNCERTAIN_POLICIES[trial % 3]
        for class_set, names in CLASS_SETS.items():
            columns = [CLASSES.index(name) for name in names]
            pair = [side[:, columns] for side in (truth, claim)]
            for averaging in AVERAGINGS:
                if policy == "ignored":
                    expected = ignoring(*pair, averaging)
                else:
                    positive = (1, -1) if policy == "positive" else (1,)
                    expected = by_scikit_learn(*(np.isin(side, positive) for side in pair), SKLEARN[averaging])
                for name, value in zip(("precision", "recall", "f1"), expected, strict=True):
                    key = f"ce_chexbert_{name}_{averaging}_{class_set}_uncertain_{policy}"
                    assert scores[key] == pytest.approx(value, abs=1e-12), (trial, key)


def test_scores_of_sums_are_those_of_labels():
    """What intervals resample gives the same numbers as the labels themselves."""
    tables = clinical_tables(TRUTH, CLAIM, "rule")
    assert ReportStatistics(tables, "", "").scores() == pytest.approx(clinical_scores(TRUTH, CLAIM), abs=1e-15)


def test_rows_of_outcomes_resample():
    """Scores of a resample need no new labels: rows of the outcomes are drawn, as a bootstrap does."""
    rows = np.array([1, 1, 0])
    drawn = outcomes(TRUTH[rows], CLAIM[rows], "negative")
    result = outcomes(TRUTH, CLAIM, "negative")
    again = type(result)(result.true_positive[rows], result.false_positive[rows], result.false_negative[rows])
    assert scores_of(drawn) == scores_of(again) != scores_of(result)


def test_class_table():
    table = {row["class"]: row for row in class_table(TRUTH, CLAIM, "positive")}
    assert tuple(table) == CLASSES
    assert table["Edema"] == {
        "class": "Edema",
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "reference_positives": 2,
        "generated_positives": 2,
    }
    assert table["Atelectasis"]["f1"] == 1 and table["Fracture"]["recall"] == 0
    assert table["Pneumonia"]["reference_positives"] == 0 and table["Pneumonia"]["f1"] == 0


def test_five_classes_are_among_the_fourteen():
    assert len(set(FIVE_CLASSES) & set(CLASSES)) == 5


@pytest.mark.parametrize(("claim", "uncertain"), [(CLAIM[:2], "negative"), (CLAIM, "maybe")])
def test_outcomes_refuse(claim, uncertain):
    with pytest.raises(ValueError, match="cannot be compared|must be one of"):
        outcomes(TRUTH, claim, uncertain)


def run_script(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "compute_ce.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def write(path: Path, rows: list[list]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_compute_ce_of_reports_without_header(tmp_path):
    gts = write(tmp_path / "gts.csv", [["mild edema of both lungs ."], ["a rib fracture , no edema ."]])
    res = write(tmp_path / "res.csv", [["edema is seen ."], ["no edema ."]])
    done = run_script("--gts", gts, "--res", res, "--out", tmp_path / "ce.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ce.json").read_text())
    assert result["reports"] == 2
    # Edema right; the fracture missed, and No Finding claimed instead.
    assert result["scores"]["ce_rule_f1_micro_14_uncertain_negative"] == pytest.approx(2 / 4)
    assert [row["recall"] for row in result["classes"] if row["class"] in ("Edema", "Fracture")] == [1.0, 0.0]
    assert "| ce_rule_*_micro_14_uncertain_negative | 0.5000 | 0.5000 | 0.5000 | 0.0000 – 1.0000 |" in done.stdout
    assert result["intervals"]["ce_rule_f1_micro_14_uncertain_negative"] == [0, 1]


def test_compute_ce_of_labelled_files_by_name(tmp_path):
    """R2Gen's res_labeled.csv: a column of reports first; the classes may stand in any order."""
    backwards = list(reversed(CLASSES))
    truth, claim = ["1.0" if c == "Edema" else "" for c in CLASSES], ["1" if c == "Edema" else "-" for c in backwards]
    gts = write(tmp_path / "gts.csv", [["Reports", *CLASSES], ["x", *truth]])
    res = write(tmp_path / "res.csv", [["Reports", *backwards], ["y", *claim]])
    done = run_script("--gts", gts, "--res", res, "--labeler", "chexpert", "--out", tmp_path / "ce.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "ce.json").read_text())["scores"]
    assert scores["ce_chexpert_f1_micro_14_uncertain_negative"] == 1.0
    assert all(key.startswith("ce_chexpert_") for key in scores)


def test_compute_ce_matches_by_id(tmp_path):
    gts = write(tmp_path / "gts.csv", [["id", "report"], ["a", "Edema."], ["b", "No edema."]])
    res = write(tmp_path / "res.csv", [["report", "id"], ["No edema.", "b"], ["Edema.", "a"]])
    done = run_script("--gts", gts, "--res", res, "--out", tmp_path / "ce.json")
    assert json.loads((tmp_path / "ce.json").read_text())["scores"]["ce_rule_f1_micro_14_uncertain_negative"] == 1.0
    assert done.returncode == 0


def test_compute_ce_reads_the_same_column_as_score(tmp_path):
    gts = write(tmp_path / "gts.csv", [["id", "report"], ["a", "Edema."], ["b", "No edema."]])
    rows = [["a", "Edema.", "No edema."], ["b", "No edema.", "No edema."]]
    res = write(tmp_path / "res.csv", [["id", "report", "generated"], *rows])
    done = run_script("--gts", gts, "--res", res, "--out", tmp_path / "ce.json")
    assert done.returncode == 0 and "'generated' is read as the reports" in done.stderr
    assert json.loads((tmp_path / "ce.json").read_text())["scores"]["ce_rule_f1_micro_14_uncertain_negative"] < 1
    write(res, [["id", "report", "mine"], *([*row[:2], "There is no edema."] for row in rows)])
    assert "--res_column" in run_script("--gts", gts, "--res", res).stderr
    assert run_script("--gts", gts, "--res", res, "--res_column", "mine").returncode == 0


LABELLED = [["report", *CLASSES], ["x", *[""] * 14]]


@pytest.mark.parametrize(
    ("gts", "res", "flags", "message"),
    [
        ([["report"], ["Edema."]], [["report"], ["Edema."], ["x"]], [], "gts.csv has 1 rows and"),
        ([["report"], ["Edema."]], LABELLED, [], "label both with the same labeler"),
        ([["report"], ["Edema."]], [["report"], ["Edema."]], ["--labeler", "chexbert"], "only our rules"),
        (LABELLED, LABELLED, [], "--labeler is needed"),
        (LABELLED, LABELLED, ["--labeler", "Che Xbert"], "small letters and digits"),
        ([["report"]], [["report"]], [], "at least one report"),
        (LABELLED, [["Edema"], ["1"]], ["--labeler", "chexpert"], "no label column No Finding"),
        (LABELLED, [LABELLED[0], ["x", "2", *[""] * 13]], ["--labeler", "chexpert"], "row 1: No Finding is '2'"),
        ([["id", "report"], ["a", "x"]], [["id", "report"], ["b", "x"]], [], "no row with id a"),
        ([["id", "report"], ["a", "x"], ["a", "y"]], [["id", "report"], ["a", "x"]], [], "id a is in 2 rows"),
        ([["Edema", "edema"], ["1", "0"]], LABELLED, ["--labeler", "chexpert"], "two columns hold the labels of Edema"),
    ],
)
def test_compute_ce_errors(tmp_path, gts, res, flags, message):
    files = ["--gts", write(tmp_path / "gts.csv", gts), "--res", write(tmp_path / "res.csv", res)]
    done = run_script(*files, *flags, "--out", tmp_path / "ce.json")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "ce.json").exists()


@pytest.mark.parametrize(
    ("column", "units"),
    [("subject_id", "patients"), ("patient_id", "patients"), ("study_id", "studies"), ("", "reports")],
)
def test_compute_ce_resamples_whole_patients(tmp_path, column, units):
    texts = ["Lungs are clear.", "There is a large pleural effusion."]
    head, groups = ["report", *([column] if column else [])], [[str(n // 4)] if column else [] for n in range(16)]
    gts = write(tmp_path / "gts.csv", [head, *([texts[n // 4 % 2], *own] for n, own in enumerate(groups))])
    res = write(tmp_path / "res.csv", [["report"], *([texts[n // 8 % 2]] for n in range(16))])
    done = run_script("--gts", str(gts), "--res", str(res), "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert f"Intervals are a bootstrap over {units}." in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["intervals_over"] == units
