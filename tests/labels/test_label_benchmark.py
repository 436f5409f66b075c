"""benchmarks/label_reports.py: agreement by class, and the cross-validation over the phrase tables."""

import subprocess
import sys

import pytest

from benchmarks import label_reports as benchmark
from modules.labels import rules as clinical_rules
from modules.labels.labeler import CLASSES, label_report
from modules.runtime.environment import ROOT

REPORTS = ["Heart failure.", "Edema.", "Edema on both sides.", "No edema.", "No fracture.", "Small effusion."]


def test_alternatives_of_a_pattern():
    pattern = r"a|b(?:c\||[|(]d|(?<!e|f)g)|(?=h)i"
    found = sorted(pattern[start:end] for start, end in benchmark.alternatives(pattern))
    assert found == ["(?<!e|f)g", "(?=h)i", "[|(]d", "a", r"b(?:c\||[|(]d|(?<!e|f)g)", r"c\|", "e", "f"]
    assert benchmark.alternatives("abc") == []


def test_a_labeler_without_some_alternatives():
    pattern = clinical_rules.FINDINGS["Edema"]
    start = pattern.index("heart failure")
    labeler = benchmark.without([("FINDINGS", "Edema", start, start + len("heart failure"))])
    assert labeler.label_report("Heart failure.")["Edema"] is None
    assert labeler.label_report("Edema.")["Edema"] == 1
    entry = next(index for index, (name, _, _) in enumerate(clinical_rules.CONVENTIONS) if name == "Lung Opacity")
    slip = "No focal air space opacities."
    labeler = benchmark.without([("CONVENTIONS", entry, 0, len(clinical_rules.CONVENTIONS[entry][1]))])
    assert (label_report(slip)["Lung Opacity"], labeler.label_report(slip)["Lung Opacity"]) == (1, 0)


def test_what_only_one_fold_needs_does_not_label_it(monkeypatch):
    monkeypatch.setattr(
        benchmark,
        "places",
        lambda: [
            ("FINDINGS", "Edema", start, end) for start, end in benchmark.alternatives(clinical_rules.FINDINGS["Edema"])
        ],
    )
    truth = [list(label_report(report).values()) for report in REPORTS]
    labels = benchmark.cross_validate(REPORTS, truth, folds=6, seed=0)
    assert labels[0][CLASSES.index("Edema")] is None  # no other report speaks of heart failure
    assert labels[1:] == truth[1:]


def test_agreement_of_a_file(tmp_path, capsys, monkeypatch):
    rows = [",".join(["report", *CLASSES])]
    for report in REPORTS:
        cells = ["" if label is None else str(label) for label in label_report(report).values()]
        rows.append(",".join([report, *cells]))
    (tmp_path / "labelled.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(sys, "argv", ["label_reports.py", str(tmp_path / "labelled.csv")])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert "Edema                           1.000 (   3)    1.000 (   1)      nan (   0)" in lines
    assert "per CPU second" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "there is no such file"),
        (["labelled.csv", "--folds", "1"], "--folds 1: 2 to 1"),
        (["labelled.csv", "--column", "text"], "no column 'text'"),
    ],
)
def test_wrong_input_gets_one_line(tmp_path, arguments, message):
    (tmp_path / "labelled.csv").write_text(",".join(["report", *CLASSES]) + "\nEdema." + "," * 14 + "\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "label_reports.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
