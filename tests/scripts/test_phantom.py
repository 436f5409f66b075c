"""The phantom benchmark: coding and report decide what is drawn, the same seed draws the same bytes, and nuisance
variation does not touch the demo's drawings."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modules.data.annotations import read_annotation
from modules.runtime.errors import InputError
from scripts.synthetic.anatomy import DEMO, PHANTOM, Variation
from scripts.synthetic.findings import OTHER, Finding, complete
from scripts.synthetic.phantom import phantom_findings, read_coding
from scripts.synthetic.render import render_study

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("Cardiomegaly/borderline", Finding("Cardiomegaly", severity="mild")),
        ("Cardiac Shadow/enlarged/severe", Finding("Cardiomegaly", severity="severe")),
        ("Opacity/lung/base/left", Finding("Lung Opacity", "patchy", side="left", zone="lower")),
        ("Opacity/lung/bilateral/interstitial/diffuse", Finding("Lung Opacity", "interstitial", side="bilateral")),
        ("Density/round/small/lung/upper lobe/right", Finding("Lung Lesion", "nodule", "right", "upper", "small")),
        ("Pulmonary Atelectasis/middle lobe/right", Finding("Atelectasis", "", "right", "mid")),
        ("Pleural Effusion/left/large", Finding("Pleural Effusion", side="left", size="large")),
        ("Costophrenic Angle/right/blunted", Finding("Pleural Effusion", side="right", size="small")),
        ("Thickening/pleura/apex/right", Finding("Pleural Other", "thickening", "right", "upper")),
        ("Fractures, Bone/ribs/left/healed", Finding("Fracture", "rib", side="left")),
        ("Catheters, Indwelling/right", Finding("Support Devices", "central line", side="right")),
        ("Calcified Granuloma/lung/lower lobe/left", Finding(OTHER, "granuloma", "left", "lower")),
        ("Lung/hypoinflation", Finding(OTHER, "low lung volumes")),
        ("Aorta/tortuous/mild", Finding(OTHER, "tortuous aorta")),
    ],
)
def test_a_term_is_drawn_with_its_site_side_and_severity(term, expected):
    assert phantom_findings([term], "") == (expected,)


@pytest.mark.parametrize("term", ["normal", "No Indexing", "Fractures, Bone/humerus/left", "Kyphosis", "Stents"])
def test_a_term_without_a_drawing_draws_nothing(term):
    assert phantom_findings([term], "") == ()


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("There is a small left pleural effusion.", (Finding("Pleural Effusion", side="left", size="small"),)),
        ("No pleural effusion or pneumothorax. The heart is normal in size.", ()),
        ("Possible left lower lobe pneumonia.", ()),  # uncertain mentions are not drawn
        ("Right chest port. Clear lungs.", (Finding("Support Devices", "port", side="right"),)),
        (
            "The thoracic aorta is tortuous. Degenerative changes of the spine.",
            (Finding(OTHER, "tortuous aorta"), Finding(OTHER, "degenerative spine")),
        ),
        ("No degenerative changes.", ()),
    ],
)
def test_the_report_speaks_where_the_coding_is_silent(report, expected):
    assert phantom_findings([], report) == expected


def test_the_coding_wins_and_is_not_repeated():
    found = phantom_findings(["Pleural Effusion/right/small"], "Moderate left pleural effusion. Cardiomegaly.")
    assert found == (Finding("Pleural Effusion", side="right", size="small"), Finding("Cardiomegaly"))
    twice = phantom_findings(["Opacity/lung/base/left", "Infiltrate/lung/base/left", "Opacity/lung/apex/left"], "")
    assert [finding.zone for finding in twice] == ["lower", "upper"]
    # The word opacity for what is coded as atelectasis is no second shadow.
    assert len(phantom_findings(["Pulmonary Atelectasis/base/left"], "Opacity in the left base.")) == 1
    assert len(phantom_findings(["Lung/hypoinflation", "Emphysema"], "")) == 1


def test_a_normal_study_stays_normal_whatever_the_labeler_makes_of_its_report():
    convention = (
        "The heart size and mediastinal contours appear within normal limits. Stable mediastinal contours. "
        "No focal airspace consolidations."
    )
    assert phantom_findings(["normal"], convention) == phantom_findings([], convention) == ()
    assert phantom_findings(["normal"], "Mild degenerative changes.") == (Finding(OTHER, "degenerative spine"),)


def test_whatever_is_asked_for_can_be_drawn():
    terms = [
        "Opacity/lung/base/left",
        "Scoliosis/thoracic vertebrae/mild",
        "Diaphragm/elevated/bilateral",
        "Implanted Medical Device/left",
        "Hydropneumothorax/right",
        "Mass/lung/hilum/right",
    ]
    for finding in phantom_findings(terms, "Clavicle fracture on the left."):
        completed = complete(finding, np.random.default_rng(0))
        films = render_study((completed,), (3, 1), 64, PHANTOM)
        plain = render_study((), (3, 1), 64, PHANTOM)
        assert np.abs(films["frontal"].astype(int) - plain["frontal"]).max() > 8, finding


def test_nuisance_varies_what_no_report_mentions():
    def spread(variation):
        films = [render_study((), (seed, 0), 64, variation)["frontal"].astype(float) for seed in range(8)]
        return np.std(films, axis=0).mean()

    assert spread(PHANTOM) > 1.3 * spread(DEMO)


def test_a_faint_finding_is_the_same_finding_less_strongly_in_both_views():
    nodule = complete(Finding("Lung Lesion", "mass", "right", "mid", "large"), np.random.default_rng(0))
    for view in ("frontal", "lateral"):
        plain, full, faint = (
            render_study(findings, (3, 0), 64, Variation(faintest=faintest))[view].astype(int)
            for findings, faintest in (((), 1), ((nodule,), 1), ((nodule,), 0.1))
        )
        assert 0 < np.abs(faint - plain).sum() < np.abs(full - plain).sum()


def xml(number: int, *terms: str) -> str:
    mesh = "".join(f"<major>{term}</major>" for term in terms)
    return (
        f'<eCitation><uId id="CXR{number}"/><MeSH>{mesh}</MeSH><AbstractText Label="FINDINGS">Clear.</AbstractText>'
        f'<parentImage id="CXR{number}_IM-000{number}-1001"/></eCitation>'
    )


def test_coding_from_open_is_files_and_from_a_table(tmp_path):
    folder = tmp_path / "xml"
    folder.mkdir()
    (folder / "1.xml").write_text(xml(1, "normal"))
    (folder / "2.xml").write_text(xml(2, "Cardiomegaly/mild", "Opacity/lung/base/left"))
    expected = {"CXR1_IM-0001": ("normal",), "CXR2_IM-0002": ("Cardiomegaly/mild", "Opacity/lung/base/left")}
    assert read_coding(folder) == expected
    table = tmp_path / "coding.csv"
    table.write_text(
        "mesh_major,images\nnormal,CXR1_IM-0001-1001;CXR1_IM-0001-2001\n"
        "Cardiomegaly/mild;Opacity/lung/base/left,CXR2_IM-0002-1001\nnormal,\n"
    )
    assert read_coding(table) == expected
    (tmp_path / "other.csv").write_text("id,labels\n1,2\n")
    with pytest.raises(InputError, match="no column mesh_major, images"):
        read_coding(tmp_path / "other.csv")


def make_phantom(annotation: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    command = ["scripts/research/make_phantom.py", "--annotation", annotation, "--out", out, "--size", "64", *more]
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_the_benchmark_keeps_reports_and_splits_and_repeats_itself(tmp_path):
    studies = [
        ("CXR1_IM-0001", "train", "The heart is enlarged."),
        ("CXR2_IM-0002", "val", "Clear lungs."),
        ("CXR3_IM-0003", "test", "Left pleural effusion."),
    ]
    annotation = {
        split: [{"id": name, "report": report, "image_path": ["a.png"], "split": split}]
        for name, split, report in studies
    }
    (tmp_path / "annotation.json").write_text(json.dumps(annotation))
    (tmp_path / "coding.csv").write_text("mesh_major,images\nCardiomegaly/severe,CXR1_IM-0001-1001\n")

    def make(out: str, *more: str) -> dict[str, str]:
        coding = ("--coding", str(tmp_path / "coding.csv"))
        done = make_phantom(tmp_path / "annotation.json", tmp_path / out, *coding, *more)
        assert done.returncode == 0, done.stderr
        files = [path for path in (tmp_path / out).rglob("*") if path.is_file()]
        return {str(path.relative_to(tmp_path / out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    first = make("a", "--workers", "1")
    assert make("b", "--workers", "2") == first and len(first) == 4 + 6
    assert make("c", "--seed", "1") != first
    drawn = read_annotation(tmp_path / "a" / "annotation.json")
    assert [(study.id, study.split, study.report) for split in drawn.splits.values() for study in split] == studies
    assert drawn.synthetic and "PHANTOM" in (tmp_path / "a" / "README.txt").read_text().splitlines()[0]
    rows = (tmp_path / "a" / "findings.csv").read_text().splitlines()
    assert rows[1] == "CXR1_IM-0001,Cardiomegaly,,,,,severe" and rows[3].startswith("CXR3_IM-0003,Pleural Effusion")


def test_an_empty_annotation_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "empty.json").write_text('{"train": [], "val": [], "test": []}')
    refused = make_phantom(tmp_path / "empty.json", tmp_path / "none")
    assert refused.returncode == 2 and "empty.json: split train would be empty" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_patients_stay_known(demo, tmp_path):
    """Folds of the phantom keep patients whole, as those of the annotation would."""
    content = json.loads((demo / "annotation.json").read_text())
    for records in content.values():
        for number, record in enumerate(records):
            record["subject_id"] = f"p{number // 2}-{record['split']}"
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    done = make_phantom(tmp_path / "annotation.json", tmp_path / "phantom")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "phantom" / "annotation.json").read_text())
    for split, records in content.items():
        assert {r["id"]: r["subject_id"] for r in made[split]} == {r["id"]: r["subject_id"] for r in records}
