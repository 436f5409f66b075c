"""The synthetic data set: the same seed gives the same bytes, every finding shows where it should, reports say what
was drawn, and mistakes in the command end in one line."""

import csv
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.data.annotations import read_annotation
from modules.labels.labeler import label_report
from modules.runtime.errors import InputError
from scripts import make_demo_data
from scripts.synthetic.dataset import plan_studies
from scripts.synthetic.findings import OTHER, RULES, Finding, class_labels, complete, sample_findings
from scripts.synthetic.findings_csv import read_findings, write_findings
from scripts.synthetic.phrases import PHRASES
from scripts.synthetic.render import render_study
from scripts.synthetic.reports import slots, write_report
from scripts.synthetic.styles import STYLES

ROOT = Path(__file__).resolve().parents[2]
KINDS = [(name, kind) for name, kinds in RULES.items() for kind in kinds]


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/make_demo_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def some(name: str, kind: str, **given: str) -> Finding:
    return complete(Finding(name, kind, **given), np.random.default_rng(0))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    done = run("--out", out, "--studies", 12, "--seed", 5, "--size", 64, "--workers", 1, "--normal_fraction", 0.3)
    assert done.returncode == 0, done.stderr
    return out


def test_layout_is_r2gens_and_says_synthetic(demo):
    annotation = read_annotation(demo / "annotation.json")
    assert {split: len(studies) for split, studies in annotation.splits.items()} == {"train": 9, "val": 1, "test": 2}
    assert annotation.synthetic
    for studies in annotation.splits.values():
        for study in studies:
            assert study.views == ("frontal", "lateral")
            for name in study.image_paths:
                with Image.open(demo / "images" / name) as image:
                    assert (image.mode, image.size) == ("L", (64, 64))
    assert "SYNTHETIC" in (demo / "README.txt").read_text().splitlines()[0]


def test_labels_are_those_of_the_findings(demo):
    truth = read_findings(demo / "findings.csv")
    with open(demo / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("id") for row in rows] == list(truth)
    assert [{name: int(value) for name, value in row.items()} for row in rows] == [*map(class_labels, truth.values())]
    assert any(truth.values()) and not all(truth.values())


def test_no_finding_tolerates_devices_and_incidental_findings():
    assert class_labels([])["No Finding"] == 1
    device, spine = some("Support Devices", "port"), some(OTHER, "degenerative spine")
    assert class_labels([device, spine]) == {**class_labels([]), "Support Devices": 1}
    assert class_labels([device, some("Edema", "")])["No Finding"] == 0


def test_same_seed_same_bytes_with_more_workers_and_from_its_own_findings(demo, tmp_path):
    first = content(demo)
    again = run(
        "--out", tmp_path / "a", "--studies", 12, "--seed", 5, "--size", 64, "--workers", 2, "--normal_fraction", 0.3
    )
    assert again.returncode == 0, again.stderr
    assert content(tmp_path / "a") == first
    redrawn = run(
        "--out", tmp_path / "b", "--findings", demo / "findings.csv", "--seed", 5, "--size", 64, "--workers", 1
    )
    assert redrawn.returncode == 0, redrawn.stderr
    assert {**content(tmp_path / "b"), "README.txt": b""} == {**first, "README.txt": b""}
    readme = " ".join((demo / "README.txt").read_text().split())
    assert "copy findings.csv to another place, edit the copy, and give it by --findings with another --out" in readme


def test_other_seed_other_patients():
    images = [render_study((), (seed, 0), 64)["frontal"] for seed in (1, 2)]
    assert np.abs(images[0].astype(int) - images[1]).mean() > 2


def test_films_show_the_department_whose_radiologist_dictates():
    plain, places = render_study((), (1, 0), 64), set()
    for department in range(len(STYLES)):
        films = render_study((), (1, 0), 64, department=department)
        for view, film in films.items():
            rows, columns = (film != plain[view]).nonzero()
            assert np.ptp(rows) <= 8 and np.ptp(columns) <= 14 and film[rows, columns].max() >= 215
            places.add((view, round(rows.mean() / 8), round(columns.mean() / 8)))
    assert len(places) == 2 * len(STYLES)
    studies = plan_studies(seed=3, number=80, departments=True)
    assert [study.report for study in studies] == [study.report for study in plan_studies(seed=3, number=80)]
    assert all(study.department == 2 for study in studies if "Specifically, no evidence" in study.report)
    assert {study.department for study in studies} == set(range(len(STYLES)))
    assert {study.department for study in plan_studies(seed=3, number=9)} == {None}


def test_earlier_data_set_is_replaced_and_anything_else_is_left_alone(demo, tmp_path):
    out = tmp_path / "out"
    for number in (5, 3):
        assert run("--out", out, "--studies", number, "--size", 64, "--workers", 1).returncode == 0
    assert sorted(path.name for path in (out / "images").iterdir()) == ["SYN0001", "SYN0002", "SYN0003"]
    (out / "images" / "mine.png").write_bytes(b"x")
    refused = run("--out", out, "--studies", 3, "--size", 64)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "mine.png" in refused.stderr
    assert (out / "images" / "SYN0003" / "0.png").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    refused = run("--out", other, "--studies", 3)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "not a synthetic data set" in refused.stderr
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--studies", 2), "--studies 2"),
        (("--normal_fraction", 1.5), "--normal_fraction 1.5"),
        (("--seed", -1), "--seed -1"),
        (("--size", 8), "--size 8"),
        (("--workers", 0), "--workers 0"),
        (("--reports", "r.csv"), "--reports needs --findings"),
        (("--findings", "absent.csv"), "absent.csv: cannot be read"),
        (("--findings", "f.csv", "--studies", 5), "--studies does not go with --findings"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(arguments, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", "--out", str(tmp_path / "out"), *map(str, arguments)])
    with pytest.raises(InputError, match=re.escape(problem)):
        make_demo_data.main()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", "--out", "/proc/demo", "--studies", "3"])
    with pytest.raises(InputError, match="--out /proc/demo: cannot be written"):
        make_demo_data.main()


# ---- findings CSV


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("id,finding\n", "no rows"),
        ("study,finding\na,Edema\n", "columns"),
        ("id,finding,colour\na,Edema,red\n", "columns"),
        ("id,finding\na,Gout\n", "line 2: unknown finding 'Gout'"),
        ("id,finding\n../a,Edema\n", "cannot name a folder"),
        ("id,finding\n,Edema\n", "cannot name a folder"),
        (
            "id,finding,side\na,Pneumothorax,both\n",
            "side 'both' does not go with Pneumothorax; use left, right, bilateral",
        ),
        ("id,finding,side\na,Cardiomegaly,left\n", "side 'left' does not go with Cardiomegaly; leave it empty"),
        ("id,finding,size\na,Pleural Effusion,huge\n", "size 'huge'"),
        ("id,finding,kind\na,Support Devices,toaster\n", "unknown kind 'toaster'"),
        ("id,finding,kind\na,Edema,wet\n", "unknown kind 'wet' of Edema"),
        (
            "id,finding,zone,severity\na,Lung Opacity,upper,mild\n",
            "no kind of Lung Opacity has zone and severity together",
        ),
        ("id,finding,side\na,No Finding,left\n", "No Finding has no side"),
        ("id,finding\na,Edema\na,No Finding\n", "both No Finding and a finding"),
        ("id,finding\na,Edema,x\n", "more cells"),
    ],
)
def test_wrong_findings_are_named_with_their_line(text, problem, tmp_path):
    path = tmp_path / "findings.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(problem)) as caught:
        read_findings(path)
    assert "findings.csv" in str(caught.value)


def test_findings_survive_the_csv(tmp_path):
    studies = {study.id: study.findings for study in plan_studies(seed=2, number=60, normal_fraction=0.2)}
    write_findings(tmp_path / "findings.csv", studies)
    assert read_findings(tmp_path / "findings.csv") == studies


def test_what_the_csv_leaves_open_is_drawn_at_random_within_what_it_says(tmp_path):
    path = tmp_path / "findings.csv"
    path.write_text("\ufeffid,finding,side,zone\n" + "".join(f"p{i},lung opacity,LEFT,upper\n" for i in range(20)))
    findings = [study.findings[0] for study in plan_studies(seed=1, findings=read_findings(path))]
    assert {(one.kind, one.side, one.zone) for one in findings} == {("patchy", "left", "upper")}
    assert {one.size for one in findings} == {"small", "moderate", "large"}


def test_given_reports_replace_the_grammars(demo, tmp_path):
    annotation = json.loads((demo / "annotation.json").read_text())
    for records in annotation.values():
        for record in records:
            record["report"] = f"Real words about {record['id']}."
    (tmp_path / "real.json").write_text(json.dumps(annotation))
    base = ("--findings", demo / "findings.csv", "--size", 64, "--workers", 1, "--out", tmp_path / "out")
    done = run(*base, "--reports", tmp_path / "real.json", "--seed", 77)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "annotation.json").read_text())
    assert written == annotation  # words and splits
    lines = ["id,report,split", *(f"{row['id']},Words.," for rows in annotation.values() for row in rows)]
    (tmp_path / "short.csv").write_text("\n".join(lines[:-1]) + "\n")
    refused = run(*base, "--reports", tmp_path / "short.csv")
    assert refused.returncode == 2 and "no report for id" in refused.stderr
    (tmp_path / "long.csv").write_text("\n".join([*lines, "stranger,Words.,"]) + "\n")
    refused = run(*base, "--reports", tmp_path / "long.csv")
    assert refused.returncode == 2 and "'stranger' is not in --findings" in refused.stderr


@pytest.mark.parametrize(
    ("ids", "reports", "problem"),
    [
        ((), "", "its columns are none; expected id and finding"),
        (("id,finding", "a,No Finding", "b,No Finding"), "", "findings.csv: split val would be empty, of 2 studies"),
        (
            ("id,finding", "a,Edema", "b,Edema", "c,Edema"),
            "id,report,split\na,x,train\nb,x,train\nc,x,train\n",
            "reports.csv: split val would be empty, of 3 studies",
        ),
    ],
)
def test_what_could_not_be_trained_on_is_not_drawn(tmp_path, ids, reports, problem):
    (tmp_path / "findings.csv").write_text("".join(f"{line}\n" for line in ids))
    (tmp_path / "reports.csv").write_text(reports)
    refused = run(
        "--findings",
        tmp_path / "findings.csv",
        "--out",
        tmp_path / "out",
        *(["--reports", tmp_path / "reports.csv"] if reports else []),
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and problem in refused.stderr
    assert not (tmp_path / "out").exists()


# ---- drawings


@cache
def films(findings: tuple[Finding, ...], size: int) -> dict[str, np.ndarray]:
    return render_study(findings, (3, 0), size)


def difference(finding: Finding, view: str = "frontal", size: int = 128) -> np.ndarray:
    """What the finding changes in the film of one patient, (size, size)."""
    return np.abs(films((finding,), size)[view].astype(np.float32) - films((), size)[view])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_finding_shows(name, kind):
    frontal = difference(some(name, kind))
    assert np.sort(frontal.ravel())[-40:].mean() > 25  # grey levels, over 40 of 16,384 pixels at least


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, kind in KINDS
        if "side" in RULES[name][kind][1] and kind not in ("scoliosis", "central line")
    ],
)
def test_sides_show_on_their_side(name, kind):
    for side in ("left", "right"):
        changed = difference(some(name, kind, side=side))
        right_of_patient, left_of_patient = changed[:, :64].sum(), changed[:, 64:].sum()
        own, other = (left_of_patient, right_of_patient) if side == "left" else (right_of_patient, left_of_patient)
        assert own > 1.5 * other


def test_zones_show_at_their_height():
    heights = []
    for zone in ("upper", "mid", "lower"):
        changed = difference(some("Consolidation", "", side="right", zone=zone, size="moderate"))
        heights.append((changed.sum(axis=1) * np.arange(128)).sum() / changed.sum())
    assert heights[0] < heights[1] - 10 < heights[2] - 20


@pytest.mark.parametrize(
    ("name", "kind", "attribute"),
    [
        ("Cardiomegaly", "", "severity"),
        ("Enlarged Cardiomediastinum", "", "severity"),
        ("Edema", "", "severity"),
        ("Lung Opacity", "interstitial", "severity"),
        ("Pleural Effusion", "", "size"),
        ("Pneumothorax", "", "size"),
        ("Lung Opacity", "patchy", "size"),
        ("Consolidation", "", "size"),
        ("Pneumonia", "", "size"),
        ("Atelectasis", "", "size"),
        ("Lung Lesion", "nodule", "size"),
        ("Lung Lesion", "mass", "size"),
    ],
)
@pytest.mark.parametrize("view", ["frontal", "lateral"])
def test_more_of_it_changes_more(name, kind, attribute, view):
    _, allowed = RULES[name][kind]
    fixed = {key: "right" if key == "side" else "lower" for key in allowed if key in ("side", "zone")}
    amounts = [difference(some(name, kind, **{attribute: value}, **fixed), view).sum() for value in allowed[attribute]]
    assert all(more > 1.15 * less for less, more in zip(amounts, amounts[1:], strict=False))


# ---- reports


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_wordings_carry_the_label_of_their_class_and_no_other(name, kind):
    expected = {name} - {OTHER}
    for wordings in PHRASES[name, kind]:
        for wording in wordings:
            for side in ("left", "bilateral"):
                finding = some(name, kind)
                if side in RULES[name][kind][1].get("side", ()):
                    finding = some(name, kind, side=side)
                text = wording.format(**slots(finding))
                labels = label_report(text[0].upper() + text[1:])
                assert {key for key, value in labels.items() if value == 1} - {"No Finding"} == expected, text


def test_reports_say_what_is_there_and_deny_only_what_is_not():
    for index in range(400):
        findings = sample_findings(np.random.default_rng([8, index]), normal_fraction=0.3)
        report = write_report(findings, np.random.default_rng([9, index]))
        labels = label_report(report)
        said = {name for name, value in labels.items() if value == 1} - {"No Finding"}
        present = {finding.finding for finding in findings} - {OTHER}
        assert said == present, report
        for sentence in report.split(". "):
            assert not present & {name for name, value in label_report(sentence).items() if value == 0}, report
        assert "  " not in report and "{" not in report and report.endswith(".")


def test_shares_are_those_of_iu_xray():
    studies = plan_studies(seed=0, number=600)
    reports = [study.report for study in studies]
    words = [re.findall(r"[a-z0-9-]+", report.lower()) for report in reports]
    assert 0.54 < sum(not study.findings for study in studies) / 600 < 0.66
    assert {split: sum(study.split == split for study in studies) for split in ("train", "val", "test")} == {
        "train": 420,
        "val": 60,
        "test": 120,
    }
    assert 230 < len({word for report in words for word in report}) < 450
    assert 20 < np.mean([len(report) for report in words]) < 40
    commonest = max(reports.count(report) for report in set(reports))
    assert 0.02 < commonest / 600 < 0.10
    assert 300 < len(set(reports)) < 500
