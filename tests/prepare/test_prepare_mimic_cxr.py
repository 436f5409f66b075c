"""scripts/prepare_mimic_cxr.py on a made-up tree in PhysioNet's layout, and section extraction on made-up reports."""

import csv
import gzip
import json
import os
import stat
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from modules.data.annotations import read_annotation
from modules.labels.study_labels import read_labels
from modules.prepare import mimic_cxr
from modules.prepare.mimic_cxr import extract_section
from modules.runtime.errors import InputError
from scripts import prepare_mimic_cxr

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___-year-old with cough

 COMPARISON:  None.

 FINDINGS:

 Study {study}. The lungs are clear.  There is no
 effusion.

 IMPRESSION:

 No acute process.
"""
CLASSES = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
# Subject, study, official split, views.
STUDIES = [
    (10000032, 50000001, "train", ("LATERAL", "PA", "PA")),
    (10000032, 50000002, "train", ("AP",)),
    (10000764, 50000003, "validate", ("AP", "LL")),
    (11000001, 50000004, "test", ("", "PA")),
    (11000001, 50000005, "test", ("PA",)),
]  # the last has no findings


def table(path, rows):
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


def identity(study, place):
    return f"{study:08x}-0000000{place}-aaaaaaaa-bbbbbbbb-cccccccc"


@pytest.fixture(scope="module")
def physionet(tmp_path_factory):
    """Folder with jpg/ (tables, files/), mimic-cxr-reports.zip and reports/ with the same as a tree."""
    root = tmp_path_factory.mktemp("physionet")
    tree = root / "jpg" / "files"
    images = [
        (identity(study, place), study, subject, split, view)
        for subject, study, split, views in STUDIES
        for place, view in enumerate(views)
    ]
    (root / "jpg").mkdir()
    table(
        root / "jpg/mimic-cxr-2.0.0-split.csv.gz",
        [["dicom_id", "study_id", "subject_id", "split"], *(row[:4] for row in images)],
    )
    table(
        root / "jpg/mimic-cxr-2.0.0-metadata.csv.gz",
        [
            ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"],
            *((row[0], row[2], row[1], "CHEST (PA AND LAT)", row[4], 2544) for row in images),
        ],
    )
    table(
        root / "jpg/mimic-cxr-2.0.0-chexpert.csv.gz",
        [
            ["subject_id", "study_id", *CLASSES],
            *((subject, study, "1.0", "0.0", "-1.0", *[""] * 11) for subject, study, _, _ in STUDIES),
        ],
    )
    for name, study, subject, _, _ in images:
        folder = tree / f"p{str(subject)[:2]}/p{subject}/s{study}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((80, 64), 128, np.uint8)).save(folder / f"{name}.jpg")
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as archive:
        for subject, study, _, _ in STUDIES:
            path = f"files/p{str(subject)[:2]}/p{subject}/s{study}.txt"
            text = " FINAL REPORT\n IMPRESSION:\n\n Normal.\n" if study == 50000005 else REPORT.format(study=study)
            archive.writestr(path, text)
            (root / "reports" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "reports" / path).write_text(text)
    return root


def prepare(monkeypatch, root, out, *flags, reports="mimic-cxr-reports.zip", images=True):
    given = [
        "--reports",
        root / reports,
        "--tables",
        root / "jpg",
        "--out",
        out,
        "--workers",
        1,
        *(["--images", root / "jpg"] if images else []),
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["prepare_mimic_cxr.py", *map(str, given)])
    prepare_mimic_cxr.main()
    return json.loads((out / "annotation.json").read_text())


def test_one_record_an_image(physionet, tmp_path, monkeypatch, capsys):
    found = prepare(monkeypatch, physionet, tmp_path, "--labels_out", tmp_path / "labels.csv")
    assert {split: len(records) for split, records in found.items()} == {"train": 4, "val": 2, "test": 2}
    name = identity(50000001, 0)
    assert found["train"][0].pop("sections")["impression"] == "No acute process."
    assert found["train"][0] == {
        "id": name,
        "study_id": 50000001,
        "subject_id": 10000032,
        "split": "train",
        "view": ["LATERAL"],
        "report": "Study 50000001. The lungs are clear. There is no effusion.",
        "image_path": [f"p10/p10000032/s50000001/{name}.jpg"],
    }
    annotation = read_annotation(tmp_path / "annotation.json")
    for split in annotation.splits.values():
        for study in split:
            assert (tmp_path / "images" / study.image_paths[0]).stat().st_nlink == 2  # hard links: no disk
        # Studies find their labels by study_id.
        assert read_labels(tmp_path / "labels.csv").of(split).sum() == 2 * len(split)
    assert stat.S_IMODE(os.stat(tmp_path / "annotation.json").st_mode) == 0o600
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["R2Gen's", "records", "270,790", "2,130", "3,858"] in lines
    assert ["images", "of", "the", "official", "split", "4", "2", "3"] in lines
    assert ["with", "findings", "4", "2", "2"] in lines and ["records", "written", "4", "2", "2"] in lines


def test_one_record_a_study_sections_and_views(physionet, tmp_path, monkeypatch):
    found = prepare(monkeypatch, physionet, tmp_path, "--records", "study", "--section", "impression", images=False)
    assert [len(found[split]) for split in ("train", "val", "test")] == [2, 1, 2]
    assert found["test"][1]["report"] == "Normal." and found["train"][0]["id"] == "s50000001"
    assert found["train"][0]["view"] == ["PA", "LATERAL", "PA"]  # what a two-view network reads comes first
    assert not (tmp_path / "images").exists()
    found = prepare(monkeypatch, physionet, tmp_path / "pa", "--section", "both", "--views", "PA", images=False)
    assert found["val"] == [] and {record["view"][0] for record in found["train"] + found["test"]} == {"PA"}
    assert found["train"][0]["report"].endswith("There is no effusion. No acute process.")
    with pytest.raises(InputError, match="--views SIDE: no image of this view; the metadata list AP, LATERAL, LL, PA"):
        prepare(monkeypatch, physionet, tmp_path, "--views", "SIDE")


def test_an_annotation_of_other_settings_stays(physionet, tmp_path, monkeypatch, capsys):
    command = (monkeypatch, physionet, tmp_path, "--labels_out", tmp_path / "labels.csv")
    for said in ("written: ", "unchanged: "):
        first = prepare(*command, "--records", "study", images=False)
        assert f"{said}{tmp_path / 'annotation.json'}" in capsys.readouterr().out
    monkeypatch.setattr(prepare_mimic_cxr, "place_images", lambda *_: pytest.fail("images are placed first"))
    for other in (("--section", "impression"), ("--records", "image")):
        with pytest.raises(
            InputError, match=r"annotation\.json: already exists with other content, .*name another --out"
        ):
            prepare(*command, *other)
        assert json.loads((tmp_path / "annotation.json").read_text()) == first
    (tmp_path / "labels.csv").write_text("study_id,edema\n1,1\n")
    with pytest.raises(InputError, match=r"--labels_out .*labels\.csv: already exists and is not a table of labels"):
        prepare(*command, "--records", "study", images=False)


def test_reports_as_a_tree_and_images_in_place(physionet, tmp_path, monkeypatch, capsys):
    expected = prepare(monkeypatch, physionet, tmp_path / "a", images=False)
    assert prepare(monkeypatch, physionet, tmp_path / "b", "--place", "none", reports="reports") == expected
    assert not (tmp_path / "b/images").exists()
    assert f"--image_dir {physionet / 'jpg/files'}" in capsys.readouterr().out
    # A tree that is not complete.
    (tmp_path / "part/files/p10/p10000032").mkdir(parents=True)
    (tmp_path / "part/files/p10/p10000032/s50000002.txt").write_text(REPORT)
    found = prepare(monkeypatch, physionet, tmp_path / "c", reports=tmp_path / "part")
    assert [record["study_id"] for records in found.values() for record in records] == [50000002]
    assert "4 of 5 reports are not in" in capsys.readouterr().err


def test_resizing_goes_on_and_leaves_unreadable_images_out(physionet, tmp_path, monkeypatch, capsys):
    tree = tmp_path / "jpg/files"
    for name in physionet.glob("jpg/files/*/*/*/*.jpg"):
        copy = tree / name.relative_to(physionet / "jpg/files")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(name.read_bytes())
    broken = tree / f"p10/p10000032/s50000002/{identity(50000002, 0)}.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(b"no image")
    (tree / f"p11/p11000001/s50000004/{identity(50000004, 0)}.jpg").unlink()
    flags = ("--images", tmp_path / "jpg", "--resize", 40, "--workers", 2)
    found = prepare(monkeypatch, physionet, tmp_path / "out", *flags)
    assert [len(records) for records in found.values()] == [3, 2, 1]
    assert "of 8 images left out: 1 unreadable, 1 missing; image " in capsys.readouterr().err
    small = tmp_path / "out/images" / found["train"][0]["image_path"][0]
    assert Image.open(small).size == (40, 50) and Image.open(small).format == "JPEG"
    assert not list((tmp_path / "out").rglob(".*.jpg"))
    time = small.stat().st_mtime_ns
    broken.write_bytes(whole)
    assert len(prepare(monkeypatch, physionet, tmp_path / "out", *flags)["train"]) == 4
    assert small.stat().st_mtime_ns == time
    with pytest.raises(InputError, match="an earlier run placed images otherwise"):
        prepare(monkeypatch, physionet, tmp_path / "out", "--images", tmp_path / "jpg", "--resize", 50)


def test_another_file_system(physionet, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match="another file system .* give --place copy"):
        prepare(monkeypatch, physionet, tmp_path / "out")
    assert prepare(monkeypatch, physionet, tmp_path / "copies", "--place", "copy")
    assert not list((tmp_path / "out").rglob(".*.jpg"))


COLUMNS = ["dicom_id", "study_id", "subject_id", "split"]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([["dicom_id", "study_id", "split"], ["a", "1", "train"]], "no column subject_id"),
        ([COLUMNS, ["../../x", "50000001", "10000032", "train"]], "an image"),
        ([COLUMNS, ["abcd", "50000001", "../10", "train"]], "expected an image"),
        ([COLUMNS, ["abcd", "50000001", "10000032", "val"]], "one of train, validate"),
        ([COLUMNS, ["abcd", "50000001"]], "row 1 does not have as many cells"),
        ([COLUMNS, *[["abcd", "50000001", "10000032", "train"]] * 2], "occurs twice"),
        ([COLUMNS], "has no rows"),
        (
            [COLUMNS, ["a" * 200_000, "50000001", "10000032", "train"]],
            r"split\.csv\.gz: cannot be read as CSV after row 0",
        ),
    ],
)
def test_wrong_tables(tmp_path, rows, error):
    table(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", rows)
    (tmp_path / "mimic-cxr-2.0.0-split.csv.old").write_text("set aside")
    table(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", [["dicom_id", "ViewPosition"]])
    with pytest.raises(InputError, match=error):
        mimic_cxr.read_images(tmp_path)


def test_what_is_not_there(physionet, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no mimic-cxr-2.0.0-split.csv.gz there \(it comes with MIMIC-CXR-JPG\)"):
        mimic_cxr.read_images(tmp_path)
    with pytest.raises(InputError, match="--images .*: no such folder"):
        prepare(monkeypatch, physionet, tmp_path / "out", "--images", tmp_path / "absent")
    with pytest.raises(InputError, match="not a tree of MIMIC-CXR"):
        prepare(monkeypatch, physionet, tmp_path / "out", "--images", tmp_path)
    with pytest.raises(InputError, match="absent.zip: no such file"):
        prepare(monkeypatch, physionet, tmp_path / "out", reports="absent.zip")
    (tmp_path / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"\x1f\x8b cut")
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,ViewPosition\n")
    with pytest.raises(InputError, match="cannot be read .*fetch it again"):
        mimic_cxr.read_images(tmp_path)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(mimic_cxr, "_MAX_TABLE", 100)
    with pytest.raises(InputError, match="unpacks to more than 100 bytes"):
        mimic_cxr.read_images(physionet / "jpg")


# ---- sections


@pytest.mark.parametrize(
    ("report", "findings", "impression"),
    [
        (REPORT, "Study {study}. The lungs are clear. There is no effusion.", "No acute process."),
        ("FINDINGS: Clear.\nIMPRESSION: Normal.", "Clear.", "Normal."),
        ("FINDINGS AND IMPRESSION: Clear.", "Clear.", "Clear."),
        ("IMPRESSION/FINDINGS:\n Clear.", "Clear.", "Clear."),
        ("INDICATION: Pain.\n\nCONCLUSION:\n\nNormal.", "", "Normal."),
        ("FINDINGS: Clear. IMPRESSION: Normal.", "Clear.", "Normal."),  # behind a sentence
        ("Findings:\nClear.\nImpression:\nNormal.", "Clear.", "Normal."),
        # Parts of the findings, times and wrapped lines are no headers.
        (
            "FINDINGS: LUNGS: Clear.\nHEART: Normal.\nat 10:30\nfindings: as above.\nIMPRESSION: Fine.",
            "LUNGS: Clear. HEART: Normal. at 10:30 findings: as above.",
            "Fine.",
        ),
        ("FINDINGS:\nClear.\nCOMPARISON:  ___.\nRECOMMENDATION(S):  None.", "Clear.", ""),
        ("FINDINGS: Clear.\nREASON FOR EXAMINATION: Pain.\nCLINICAL HISTORY: Pain.", "Clear.", ""),
        # A wet read and an addendum come before the final report.
        ("WET READ: ___ 7:37 PM\n FINDINGS: Early.\n______________\n FINAL REPORT\n FINDINGS: Late.", "Late.", ""),
        ("FINAL ADDENDUM\n ADDENDUM: Told.\n_________\n FINAL REPORT\n FINDINGS: No ___ now.", "No ___ now.", ""),
        # The view as a header stands for the findings, unless there are some.
        ("PA AND LATERAL VIEWS OF THE CHEST:  Clear.\n IMPRESSION: Normal.", "Clear.", "Normal."),
        ("CHEST, TWO VIEWS: PA and lateral.\n FINDINGS: Clear.", "Clear.", ""),
        ("FINDINGS: Right.\n\nFINDINGS: Left.", "Right. Left.", ""),
        ("FINDINGS:\n\nIMPRESSION: Normal.", "", "Normal."),
        ("FINDINGS:\r\nClear.\r\nIMPRESSION:\r\nNormal.\r\n", "Clear.", "Normal."),
        ("No header at all.", "", ""),
        ("", "", ""),
        ("FINDINGS: ___.\nIMPRESSION: Normal.", "", "Normal."),
        # Small letters, other marks than a colon, or none.
        ("findings: clear.\n\nimpression: normal.", "clear.", "normal."),
        ("Indication: Pain. Findings: Clear. Impression: Normal.", "Clear.", "Normal."),
        ("Findings and impression: Clear.", "Clear.", "Clear."),
        ("FINDINGS; Clear.\nIMPRESSION - Normal.", "Clear.", "Normal."),
        ("FINDINGS:Clear.\nIMPRESSION:1. Normal.", "Clear.", "1. Normal."),
        ("FINDINGS\n Clear.\n\n IMPRESSION\n Normal.", "Clear.", "Normal."),
        ("FINDINGS  Clear lungs.\n\n IMPRESSION Normal chest.", "Clear lungs.", "Normal chest."),
        # Names of sections inside a paragraph are text; at the start of a paragraph they are headers.
        (
            "FINDINGS: Clear. Study: rotated. History: surgery.\nExam: no change. Heart normal.\n\nIMPRESSION: Fine.",
            "Clear. Study: rotated. History: surgery. Exam: no change. Heart normal.",
            "Fine.",
        ),
        ("FINDINGS: Clear.\n\nComparison: film with effusion.\n\nIMPRESSION: Fine.", "Clear.", "Fine."),
        ("FINDINGS: Clear. TECHNIQUE: Two views.\n\nIMPRESSION: Fine.", "Clear.", "Fine."),
        ("FINDINGS: Clear.\n\nCHEST: Small heart.\n\nIMPRESSION: Fine.", "Clear. CHEST: Small heart.", "Fine."),
        # An addendum that calls itself a final report too.
        ("FINAL REPORT\nFINDINGS: Clear.\n\nIMPRESSION: Fine.\n\nFINAL REPORT\nADDENDUM  Told.", "Clear.", "Fine."),
        ("FINDINGS: Clear.\n\nIMPRESSION: Fine.\n\nFINAL ADDENDUM\nADDENDUM: Told.", "Clear.", "Fine."),
    ],
)
def test_sections(report, findings, impression):
    assert extract_section(report, "findings") == findings
    assert extract_section(report, "impression") == impression
    both = findings if findings == impression else " ".join(filter(None, (findings, impression)))
    assert extract_section(report, "both") == both


# Spellings of MIT-LCP's published section parser, and slips of the same kinds.
@pytest.mark.parametrize(
    ("section", "names"),
    [
        ("findings", "FINDING FINDINS FINDINDGS FINDGINGS FINDNGS FINDNINGS FINIDNGS FINDIGS FIDINGS INDINGS Fndings"),
        (
            "impression",
            "IMPRESSON IMPRRESSION IMPRESSOIN IMPRSSION IMPRESION IMPERSSION MPRESSION IMPESSION IMORESSION IMPRSESION",
        ),
        (
            "other",
            "NDICATION IDICATION INDICTION COMPARISION COMPARSION COMPARRISON COMPARISIONS COMAPRISON TECHNQUE HISTROY "
            "RECOMENDATIONS NOTIFCATION",
        ),
    ],
)
def test_misspelt_headers(section, names):
    for name in names.split():
        report = f"FINDINGS: Before.\n\n{name}: Text of it.\n\nTECHNIQUE: Two views."
        expected = {"findings": ("Before. Text of it.", ""), "impression": ("Before.", "Text of it.")}
        found = extract_section(report, "findings"), extract_section(report, "impression")
        assert found == expected.get(section, ("Before.", "")), name


@pytest.mark.parametrize(
    ("report", "findings", "impression"),
    [
        (REPORT, (), ()),
        ("CHEST, TWO VIEWS\n\nThe lungs are clear.", (mimic_cxr.NO_HEADER,), (mimic_cxr.NO_HEADER,)),
        ("COMPARISON: June.\n\nThe lungs are clear.\n\nIMPRESSION: Fine.", (mimic_cxr.NO_HEADER,), ()),
        ("FINDINGS: Clear. Comparison: none.\n\nIMPRESSION: Fine.", (mimic_cxr.INSIDE,), ()),
        ("FINAL REPORT\nFINDINGS: A.\nFINAL REPORT\nFINDINGS: B.", (mimic_cxr.SEVERAL,), (mimic_cxr.SEVERAL,)),
        ("TECHNIQUE AND FINDINGS: Two views. Clear.", (mimic_cxr.TECHNIQUE,), ()),
        ("INDICATION: Pain.\n\nIMPRESSION: Fine.", (), ()),
    ],
)
def test_undecidable_sections(report, findings, impression):
    sections = mimic_cxr.read_sections(report)
    assert sections.doubts_about("findings") == findings and sections.doubts_about("impression") == impression
    assert sections.doubts_about("both") == tuple(dict.fromkeys(findings + impression))


def test_undecidable_studies_are_listed(physionet, tmp_path, monkeypatch, capsys):
    for subject, study, _, _ in STUDIES:
        path = tmp_path / f"reports/files/p{str(subject)[:2]}/p{subject}/s{study}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"The lungs are clear at 37\xb0." if study == 50000002 else REPORT.encode())
    prepare(monkeypatch, physionet, tmp_path / "out", reports=tmp_path / "reports", images=False)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["undecidable"] == {mimic_cxr.NO_HEADER: {"studies": 1, "study_ids": ["50000002"]}}
    assert summary["counts"]["records written"] == {"train": 3, "val": 2, "test": 3}
    assert "1 studies, listed in" in capsys.readouterr().out


def test_a_long_line_takes_no_time():
    assert extract_section("A " * 200_000, "findings") == ""
    assert extract_section("FINDINGS: " + "A.  " * 50_000, "findings").startswith("A. A.")
    assert extract_section("a b " + "c" * 200_000, "findings") == ""
    assert extract_section("FINDINGS" + " " * 50_000 + "A" * 50_000, "findings") == ""


@pytest.mark.parametrize("date", ["21800102", "21800102.0", "2180-01-02", "last week"])
def test_sections_and_priors_are_kept(tmp_path, physionet, capsys, date):
    """The study before is the earlier one by date and time, whatever its number."""
    (tmp_path / "jpg").mkdir()
    for kind in ("split", "chexpert"):
        name = f"mimic-cxr-2.0.0-{kind}.csv.gz"
        (tmp_path / "jpg" / name).write_bytes((physionet / "jpg" / name).read_bytes())
    when = {50000001: (date, "80000.5"), 50000002: (date, "75959")}
    table(
        tmp_path / "jpg/mimic-cxr-2.0.0-metadata.csv.gz",
        [
            ["dicom_id", "ViewPosition", "StudyDate", "StudyTime"],
            *(
                (identity(study, place), view, *when.get(study, ("", "")))
                for _, study, _, views in STUDIES
                for place, view in enumerate(views)
            ),
        ],
    )
    images = prepare_mimic_cxr.read_images(tmp_path / "jpg")
    reports, named, _ = prepare_mimic_cxr.extract_reports(physionet / "mimic-cxr-reports.zip", images, "findings")
    images = [image for image in images if image.study_id in reports]
    records = prepare_mimic_cxr.build_records(images, reports, named, "study", ".jpg")["train"]
    found = {record["id"]: record for record in records}
    said = capsys.readouterr().err
    if date == "last week":
        assert "prior" not in found["s50000001"] and "values of StudyDate are not understood" in said
        return
    assert found["s50000001"]["prior"] == "s50000002" and "prior" not in found["s50000002"] and not said
    assert found["s50000001"]["sections"] == {
        "indication": "___-year-old with cough",
        "comparison": "None.",
        "impression": "No acute process.",
        "findings": "Study 50000001. The lungs are clear. There is no effusion.",
    }
    by_image = prepare_mimic_cxr.build_records(images, reports, named, "image", ".jpg")["train"]
    assert {record.get("prior") for record in by_image if record["study_id"] == 50000001} == {identity(50000002, 0)}
