"""The labeler on made-up sentences, on files, and, where they are at hand, against the CheXpert labeler's answers."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modules.labels.labeler import CLASSES, RuleLabeler, label_report, label_reports, with_parents
from modules.labels.sentences import split_sentences

ROOT = Path(__file__).resolve().parents[2]
DATA_DIR = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))
CHEXPERT = DATA_DIR / "iu_xray_text" / "chexpert_labels.csv"

SENTENCES = [
    # What is named, and by which words.
    ("A large left pneumothorax.", {"Pneumothorax": 1}),
    ("Hazy opacification and an ill-defined infiltrate at the right base.", {"Lung Opacity": 1}),
    ("A nodular opacity lies above the left hilum.", {"Lung Lesion": 1, "Lung Opacity": 1}),
    ("Two calcified nodules on the right.", {}),
    ("A pericardial effusion.", {}),
    ("Endotracheal tube and left PICC line in good position.", {"Support Devices": 1}),
    ("The trachea runs in the midline.", {}),
    ("Pulmonary fibrosis.", {"Pleural Other": 1}),
    # Negation, before and after, and how far it reaches.
    (
        "No pneumothorax, pleural effusion, or consolidation.",
        {"Pneumothorax": 0, "Pleural Effusion": 0, "Consolidation": 0},
    ),
    ("Lungs are free of edema.", {"Edema": 0}),
    ("Neither fracture nor pneumothorax.", {"Fracture": 0, "Pneumothorax": 0}),
    ("The right effusion has resolved.", {"Pleural Effusion": 0}),
    ("A pneumothorax is not seen.", {"Pneumothorax": 0}),
    ("A nodule, not seen on the prior study.", {"Lung Lesion": 1}),
    ("No pneumothorax, but a small effusion persists.", {"Pneumothorax": 0, "Pleural Effusion": 1}),
    ("No edema; left basal atelectasis.", {"Edema": 0, "Atelectasis": 1}),
    ("There is no effusion, there is mild edema.", {"Pleural Effusion": 0, "Edema": 1}),
    ("No change in the left effusion.", {"Pleural Effusion": 1}),
    ("Interval removal of the chest tube with new atelectasis.", {"Support Devices": 0, "Atelectasis": 1}),
    ("Effusion, pneumothorax, or edema is not seen.", {"Pleural Effusion": 0, "Pneumothorax": 0, "Edema": 0}),
    ("Pneumothorax: none.", {"Pneumothorax": 0}),
    ("No pneumothorax, small effusion is unchanged.", {"Pneumothorax": 0, "Pleural Effusion": 1}),
    ("No consolidation, findings consistent with edema.", {"Consolidation": 0, "Edema": 1}),
    ("No edema (small effusion).", {"Edema": 0, "Pleural Effusion": 1}),
    # Uncertainty.
    ("Cannot exclude a small effusion.", {"Pleural Effusion": -1}),
    ("Difficult to exclude edema.", {"Edema": -1}),
    ("R/O pneumonia.", {"Pneumonia": -1}),
    ("Pneumonia is unlikely.", {"Pneumonia": -1}),
    ("Not present in June and may represent pneumonia.", {"Pneumonia": -1}),
    ("Pneumothorax?", {"Pneumothorax": -1}),
    ("This may represent pneumonia.", {"Pneumonia": -1}),
    ("Pneumonia cannot be excluded.", {"Pneumonia": -1}),
    ("Atelectasis versus consolidation.", {"Atelectasis": -1, "Consolidation": -1}),
    ("Atelectasis vs. early consolidation.", {"Atelectasis": -1, "Consolidation": -1}),
    ("Atelectasis and/or scarring at the base.", {"Atelectasis": -1, "Lung Opacity": -1}),
    ("Consistent with pneumonia.", {"Pneumonia": 1}),
    ("Without signs of possible edema.", {"Edema": 0}),
    ("Vascular congestion on both sides.", {"Edema": -1}),
    ("No vascular congestion.", {"Edema": 0}),
    # Heart and mediastinum: normal, stable, or else abnormal.
    ("Heart size looks normal.", {"Cardiomegaly": 0}),
    ("The heart is not enlarged today.", {"Cardiomegaly": 0}),
    ("The heart is moderately enlarged.", {"Cardiomegaly": 1}),
    ("The heart is enlarged with normal vessels.", {"Cardiomegaly": 1}),
    ("Heart size is unchanged since June.", {"Cardiomegaly": -1}),
    ("Stable cardiomegaly since June.", {"Cardiomegaly": 1}),
    ("An opacity behind the heart.", {"Lung Opacity": 1}),
    ("Cardiac silhouette at the upper limits of normal.", {"Cardiomegaly": 0}),
    ("Heart size is at top limits of normal.", {"Cardiomegaly": 1}),
    ("Mediastinal contours are unremarkable.", {"Enlarged Cardiomediastinum": 0}),
    ("The mediastinum is widened.", {"Enlarged Cardiomediastinum": 1}),
    ("The cardiomediastinal silhouette is stable since June.", {"Enlarged Cardiomediastinum": -1}),
    ("The cardiomediastinal silhouette is stable and normal for age.", {"Enlarged Cardiomediastinum": 0}),
    ("HEART: Normal size.", {"Cardiomegaly": 0}),
    ("The cardiac shadow is enlarged.", {"Cardiomegaly": 1}),
    ("The cardiomediastinum is normal.", {"Enlarged Cardiomediastinum": 0}),
    ("The heart is possibly enlarged.", {"Cardiomegaly": -1}),
    ("The lungs are clear and the heart is mildly enlarged.", {"Cardiomegaly": 1}),
    ("Mild congestive heart failure.", {"Edema": 1, "Cardiomegaly": -1}),  # as the CheXpert labeler: in doubt
    ("No CHF.", {"Edema": 0}),
    # What has not changed is there, and so is what has not gone.
    ("No increase in the right effusion.", {"Pleural Effusion": 1}),
    ("There has been no progression of the left pneumothorax.", {"Pneumothorax": 1}),
    ("Without appreciable growth of the lingular mass.", {"Lung Lesion": 1}),
    ("No change in effusion, atelectasis or edema.", {"Pleural Effusion": 1, "Atelectasis": 1, "Edema": 1}),
    ("No recurrence of the effusion.", {"Pleural Effusion": 0}),
    ("No enlargement of the heart.", {"Cardiomegaly": 0}),
    ("No new consolidation.", {"Consolidation": 0}),
    ("The consolidation has not resolved.", {"Consolidation": 1}),
    ("No evidence of clearing of the infiltrate.", {"Lung Opacity": 1}),
    ("The atelectasis does not seem to have cleared.", {"Atelectasis": 1}),
    ("The effusion has partly resolved.", {"Pleural Effusion": 1}),
    ("The absence of a pneumothorax cannot be confirmed.", {"Pneumothorax": -1}),
    # Gone.
    ("The pneumothorax has since disappeared.", {"Pneumothorax": 0}),
    ("Clearing of the left basal consolidation.", {"Consolidation": 0}),
    ("Incomplete clearing of the left basal consolidation.", {"Consolidation": 1}),
    ("The feeding tube has been withdrawn.", {"Support Devices": 0}),
    ("The feeding tube has been withdrawn by 4 cm.", {"Support Devices": 1}),
    ("Status post chest tube removal.", {"Support Devices": 0}),
    ("A pneumothorax can no longer be seen.", {"Pneumothorax": 0}),
    ("An opacity seen in June is not visible today.", {"Lung Opacity": 0}),
    ("A mass not seen previously is present.", {"Lung Lesion": 1}),
    ("There was an effusion in June. Now there is none.", {"Pleural Effusion": 0}),
    ("There was an effusion; it has resolved, but there is edema.", {"Pleural Effusion": 0, "Edema": 1}),
    # Two statements in one sentence.
    ("No fracture, mild edema.", {"Fracture": 0, "Edema": 1}),
    ("No fracture, mild edema, or effusion.", {"Fracture": 0, "Edema": 0, "Pleural Effusion": 0}),
    ("No edema with a moderate left effusion.", {"Edema": 0, "Pleural Effusion": 1}),
    ("No edema, left chest tube in place.", {"Edema": 0, "Support Devices": 1}),
    ("No edema yet a right effusion.", {"Edema": 0, "Pleural Effusion": 1}),
    ("Negative for edema, positive for effusion.", {"Edema": 0, "Pleural Effusion": 1}),
    ("There is no doubt of an effusion.", {"Pleural Effusion": 1}),
    ("The film of June showed atelectasis, now resolved.", {"Atelectasis": 0}),
    ("No edema small left effusion.", {"Edema": 0, "Pleural Effusion": 1}),  # as cleaned texts have it
    ("No edema - right effusion - no fracture", {"Edema": 0, "Pleural Effusion": 1, "Fracture": 0}),
    ("No fracture; edema; or effusion.", {"Fracture": 0, "Edema": 0, "Pleural Effusion": 0}),
    ("Effusion - absent. Edema (none). Fracture: no.", {"Pleural Effusion": 0, "Edema": 0, "Fracture": 0}),
    ("TUBES AND LINES: None.", {"Support Devices": 0}),
    ("No pneumothorax after placement of a right PICC.", {"Pneumothorax": 0, "Support Devices": 1}),
    ("Moderate right but no left effusion.", {"Pleural Effusion": 1}),
    ("A left, but not a right, effusion.", {"Pleural Effusion": 1}),
    ("No left but a small right effusion.", {"Pleural Effusion": 1}),
    # Doubt.
    ("?Left pneumothorax.", {"Pneumothorax": -1}),
    ("Hazy right base, ? consolidation.", {"Lung Opacity": 1, "Consolidation": -1}),
    ("A fracture must be ruled out.", {"Fracture": -1}),
    ("This is thought to be atelectasis.", {"Atelectasis": -1}),
    ("The pattern suggests edema.", {"Edema": -1}),
    ("No finding to suggest edema.", {"Edema": 0}),
    ("This raises the possibility of a nodule.", {"Lung Lesion": -1}),
    ("A left effusion is doubtful.", {"Pleural Effusion": -1}),
    ("Edema is favored over infection.", {"Edema": -1, "Pneumonia": -1}),
    ("Infection could also look like this.", {"Pneumonia": -1}),
    ("Opacity: atelectasis, pneumonia, or both.", {"Lung Opacity": 1, "Atelectasis": -1, "Pneumonia": -1}),
    ("An acute or subacute fracture.", {"Fracture": 1}),
    ("It is not possible to exclude an effusion.", {"Pleural Effusion": -1}),
    ("A nodule is not well seen.", {"Lung Lesion": -1}),
    ("A small effusion, if any.", {"Pleural Effusion": -1}),
    # Spelling and abbreviations.
    ("Small pleural effusoin and pnuemonia.", {"Pleural Effusion": 1, "Pneumonia": 1}),
    ("Pneumonitis.", {}),
    ("ETT in place, no PTX.", {"Support Devices": 1, "Pneumothorax": 0}),
    ("w/o effusion", {"Pleural Effusion": 0}),
    # Words of other meanings.
    ("The fracture line is sharp.", {"Fracture": 1}),
    ("A pleural scar.", {"Pleural Other": 1}),
    ("History of pneumonia.", {"Pneumonia": 0}),  # as the CheXpert labeler
]


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES, ids=[sentence for sentence, _ in SENTENCES])
def test_sentence(sentence, expected):
    labels = label_report(sentence)
    assert {name: label for name, label in labels.items() if label is not None and name != "No Finding"} == expected


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("The lungs are clear. No effusion.", 1),
        ("A pacemaker is in place. The lungs are clear.", 1),  # devices are no finding
        ("Small effusion.", None),
        ("Possible effusion.", None),
        ("Old granuloma. Lungs otherwise clear.", None),  # findings outside the classes count
        ("No granuloma.", 1),
        ("Lungs are clear and hyperinflated.", 1),
        ("Free air under the diaphragm.", None),
        ("Peribronchial cuffing.", None),
        ("Possible aspiration.", None),
        ("Mild bronchitis.", None),
        ("The trachea is deviated.", None),
        (" \n", None),  # a blank report does not say that all is well
        ("..", None),
        ("nan", None),  # nor does what pandas writes for none
        ("None.", None),
        ("___", None),
    ],
)
def test_no_finding(report, expected):
    assert label_report(report)["No Finding"] == expected


def test_the_strongest_mention_of_a_report_wins():
    negative, uncertain, positive = "No effusion.", "Possible effusion.", "Small effusion."
    assert label_report(f"{uncertain} {negative}")["Pleural Effusion"] == -1
    assert label_report(f"{negative} {positive} {uncertain}")["Pleural Effusion"] == 1


def test_form_does_not_matter():
    plain = label_report("No pneumothorax. Small left effusion.")
    assert label_report("no pneumothorax . small left effusion .") == plain  # as the tokenisers of R2Gen write
    assert label_report("NO\n PNEUMOTHORAX.Small left\neffusion.") == plain
    assert tuple(plain) == CLASSES


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            "INDICATION:  Fever, rule out pneumonia or\n effusion.\n\nCOMPARISON: CT of the fracture.\n"
            "FINDINGS:  No pleural effusion or\npneumothorax.\n\nIMPRESSION:  Mild edema.",
            {"Pleural Effusion": 0, "Pneumothorax": 0, "Edema": 1},
        ),
        ("Indication: pneumonia. Findings: No edema.", {"Edema": 0}),
        ("Indication: pneumonia Findings: No edema.", {"Edema": 0}),
        ("No edema. Comparison: none. Small effusion.", {"Edema": 0, "Pleural Effusion": 1}),
        (
            "1. No pneumothorax\n2. Small effusion\n- Possible edema",
            {"Pneumothorax": 0, "Pleural Effusion": 1, "Edema": -1},
        ),
        ("Comparison shows a fracture.", {"Fracture": 1}),
        ("Chief complaint: pneumonia. Fever. Findings: No edema.", {"Edema": 0}),
        ("Reason for exam:\n\nQuestion of pneumonia\n\nThe effusion is gone.", {"Pleural Effusion": 0}),
        ("Comparison: film with effusion.\nThe lungs show mild edema.", {"Edema": 1}),
        ("71-year-old man with pneumonia. No edema.", {"Edema": 0}),
        ("Rule out pneumonia. No edema.", {"Edema": 0}),
        ("No fracture\nSmall effusion\nPICC in place", {"Fracture": 0, "Pleural Effusion": 1, "Support Devices": 1}),
        ("There is no pleural\neffusion or focal\nPneumonia", {"Pleural Effusion": 0, "Pneumonia": 0}),
        ("1) No fracture 2) Small effusion (3) Edema", {"Fracture": 0, "Pleural Effusion": 1, "Edema": 1}),
        ("a) No fracture b) Small effusion", {"Fracture": 0, "Pleural Effusion": 1}),
        ("\u2022 No fracture\u2022 Edema", {"Fracture": 0, "Edema": 1}),
        ("No frac-\nture.", {"Fracture": 0}),
        ("No fracture\u3002Small effusion\u2014stable.", {"Fracture": 0, "Pleural Effusion": 1}),
        (
            "No fracture,effusion ,or edema &amp; no mass.",
            {"Fracture": 0, "Pleural Effusion": 0, "Edema": 0, "Lung Lesion": 0},
        ),
    ],
)
def test_sections_and_lists(report, expected):
    labels = label_report(report)
    assert {name: label for name, label in labels.items() if label is not None and name != "No Finding"} == expected


def test_other_tables():
    labeler = RuleLabeler(SCOPE_END=r"\bwith\b")
    assert labeler.label_report("No fracture with edema.")["Edema"] == 1
    assert label_report("No fracture with edema.")["Edema"] == 0


def test_hierarchy_carries_findings_up():
    labels = label_report("Possible pneumonia. No consolidation. Mild cardiomegaly. Mediastinal contours are normal.")
    assert labels["Lung Opacity"] is None and labels["Enlarged Cardiomediastinum"] == 0
    carried = with_parents(labels)
    assert carried["Consolidation"] == carried["Lung Opacity"] == -1
    assert carried["Enlarged Cardiomediastinum"] == 1
    assert with_parents(label_report("No edema."))["Lung Opacity"] is None


def test_label_reports_gives_an_array_with_nan():
    labels = label_reports(["No edema.", "Possible edema."])
    assert labels.shape == (2, 14)
    column = CLASSES.index("Edema")
    assert labels[:, column].tolist() == [0, -1]
    others = np.delete(labels, column, axis=1)
    assert np.isnan(others[1]).all() and np.nansum(others[0]) == 1  # No Finding


def test_labeler_needs_the_standard_library_only():
    code = (
        "import sys; from modules.labels.labeler import label_report; label_report('Small effusion.');"
        "assert not {'numpy', 'pandas', 'torch', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def run_script(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "label_reports.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_label_reports_script(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text('\ufeffid,Findings,note\n7,"No effusion.\nPossible edema.",a\n8,,b\n', encoding="utf-8")
    done = run_script(source, "--out", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {target}: 2 reports, labelled by rules\n"
    with open(target, newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["id", "Findings", "note", *CLASSES]
    assert first[:3] == ["7", "No effusion.\nPossible edema.", "a"]
    labels = dict(zip(CLASSES, first[3:], strict=True))
    assert {name: label for name, label in labels.items() if label} == {"Pleural Effusion": "0", "Edema": "-1"}
    assert second[3:] == [""] * 14


def test_label_reports_script_reads_files_without_header(tmp_path):
    source, target = tmp_path / "res.csv", tmp_path / "out.csv"
    source.write_text("small effusion .\nno edema .\n")
    done = run_script(source, "--out", target)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(target.open()))
    assert [row["report"] for row in rows] == ["small effusion .", "no edema ."]
    assert (rows[0]["Pleural Effusion"], rows[1]["Edema"]) == ("1", "0")
    done = run_script(source, "--out", target, "--column", "text")
    assert done.returncode == 2 and "no column 'text'" in done.stderr and "effusion" not in done.stderr
    source.write_text("text\nsmall effusion .\n")
    assert run_script(source, "--out", target, "--column", "Text").stdout.startswith(f"wrote {target}: 1 reports")


def test_label_reports_script_replaces_old_labels(tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("Edema,report\n1,No edema.\n")
    done = run_script(source, "--out", target)
    assert "replaced" in done.stderr
    assert run_script(source, "--out", target).returncode == 0  # an output of an earlier run is replaced too
    assert target.read_text().splitlines()[0].split(",") == ["report", *CLASSES]
    assert list(csv.DictReader(target.open()))[0]["Edema"] == "0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,text\n1,x\n", "no column 'report'"),
        (b"", "is empty"),
        (b"report,id\nx\n", "row 1 has 1 cells where the header has 2"),
        (b"report\n\x81\n", "not UTF-8"),
        (b'report\n"x\n', "cannot be read as CSV"),
        (None, "no such file"),
    ],
)
def test_label_reports_script_errors(tmp_path, content, message):
    source = tmp_path / "in.csv"
    if content is not None:
        source.write_bytes(content)
    done = run_script(source, "--out", tmp_path / "out.csv")
    assert done.returncode == 2
    assert message in done.stderr and str(source) in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.skipif(not CHEXPERT.is_file(), reason="the CheXpert labeler's answers are not here")
def test_agrees_with_the_chexpert_labeler():
    with open(CHEXPERT, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    codes = {"1": 1.0, "0": 0.0, "-1": -1.0, "-": np.nan}
    truth = np.array([[codes[row[name]] for name in CLASSES] for row in rows])
    ours = label_reports([row["findings"] for row in rows])

    def f1(value, columns=slice(None)):
        there, here = truth[:, columns] == value, ours[:, columns] == value
        return 2 * (there & here).sum() / (there.sum() + here.sum())

    assert f1(1) > 0.98 and f1(0) > 0.9965 and f1(-1) > 0.93
    for column, name in enumerate(CLASSES):
        if (truth[:, column] == 1).sum() >= 20:
            assert f1(1, column) > 0.9, name


def test_long_texts_take_time_as_their_length():
    started = time.process_time()
    label_report("effusion " + "and " * 10_000 + "x it is gone")  # of 40,000 letters
    assert time.process_time() - started < 1
    assert max(map(len, split_sentences("effusion " * 1_000))) == 2_000
