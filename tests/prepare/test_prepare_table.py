"""scripts/prepare_table.py: made-up trees in the layout of each preset, and tables with columns of any name."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from modules.config import Config
from modules.data.annotations import read_annotation
from modules.data.dataset_specs import read_description
from modules.flags import settle_flags
from modules.prepare.priors import add_priors, moments
from modules.prepare.table_columns import preset_names
from modules.runtime.errors import InputError
from scripts import check_data, prepare_table
from tests.data.test_dicom import dicom

WORDS = "heart lungs effusion edema opacity line tube nodule".split()
COUNT = 24


def report(number):
    return f"The {WORDS[number % 8]} and the {WORDS[(number // 8 + 3) % 8]} are seen. No change of number {number % 5}."


def picture(path, number):
    """Noise of its own in every file; the third of each four has 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48))
    if path.suffix == ".png" and number % 4 == 2:
        Image.fromarray((pixels * 257).astype(np.uint16)).save(path)
    else:
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def pictures(folder, names):
    for number, name in enumerate(names):
        picture(folder / name, number)
    return list(names)


def split_word(number, third="test"):
    return "valid" if number % 6 == 4 else third if number % 6 == 5 else "train"


# ---- the layouts: each writes its tables and images into a folder, and returns the tables


def chexpert_plus(folder, images):
    names = pictures(images, [f"train/patient{n // 2:05}/study{n % 2 + 1}/view1_frontal.jpg" for n in range(COUNT)])
    rows = [
        {
            "path_to_image": name, "frontal_lateral": "Frontal", "deid_patient_id": f"patient{n // 2:05}",
            "patient_report_date_order": n % 2 + 1, "report": "all of it", "section_clinical_history": "Cough.",
            "section_history": "", "section_comparison": "", "section_technique": "",
            "section_findings": report(n), "section_impression": "Fine.", "split": split_word(n // 2, "train"),
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    return [write_csv(folder / "df_chexpert_plus_240401.csv", rows)]


def padchest(folder, images):
    names = pictures(images, [f"{n % 3}/{n}_abc.png" for n in range(COUNT)])
    rows = [
        {
            "": n, "ImageID": name.split("/")[1], "ImageDir": name.split("/")[0], "StudyDate_DICOM": 20140101 + n,
            "StudyID": f"s{n}", "PatientID": f"p{n // 2}", "Projection": "PA", "Report": report(n),
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    return [write_csv(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", rows)]


def padchest_gr(folder, images):
    names = pictures(images, [f"{n}.png" for n in range(COUNT)])
    rows = [
        {
            "StudyID": f"s{n}", "ImageID": name, "PatientID": f"p{n}", "split": split_word(n),
            "findings": [
                {"sentence_en": sentence + ".", "sentence_es": "", "abnormal": True, "boxes": [[0.1, 0.1, 0.5, 0.5]]}
                for sentence in report(n).rstrip(".").split(". ")
            ],
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    return [write_json(folder / "grounded_reports.json", rows)]


def rexgradient(folder, images):
    names = pictures(images, [f"deid_png/p{n // 2}/{n}_{view}.png" for n in range(COUNT) for view in (0, 1)])
    tables = []
    for word in ("train", "valid", "test"):
        rows = [
            {
                "id": f"r{n}", "StudyInstanceUid": f"1.2.{n}", "PatientID": f"p{n // 2}",
                "StudyDate": f"2020-01-{n + 1:02}", "Indication": "Cough.",
                "Comparison": "None.", "Findings": report(n), "Impression": "Fine.",
                "ImagePath": str(names[2 * n : 2 * n + 2]), "ImageViewPosition": "['PA', 'LATERAL']",
            }
            for n in range(COUNT)
            if split_word(n // 2) == word
        ]  # fmt: skip
        tables.append(write_csv(folder / f"{word}_metadata.csv", rows))
    return tables


def rocov2(folder, images):
    tables = []
    for word, places in (("train", range(16)), ("valid", range(16, 20)), ("test", range(20, COUNT))):
        for n in places:
            picture(images / f"{word}_images" / word / f"ROCOv2_2023_{word}_{n:06}.jpg", n)
        rows = [{"ID": f"ROCOv2_2023_{word}_{n:06}", "Caption": report(n)} for n in places]
        tables.append(write_csv(folder / f"{word}_captions.csv", rows))
    return tables


def casia_cxr(folder, images):
    names = pictures(images, [f"{n}.jpg" for n in range(COUNT)])
    rows = [
        {
            "Image": name,
            "PatientAge": 50,
            "PatientGender": "M",
            "Indication": "Toux.",
            "Findings": report(n),
            "Impression": "",
        }
        for n, name in enumerate(names)
    ]
    return [write_csv(folder / "CASIA-CXR_Mass_Reports.csv", rows, ";")]


def medpix2(folder, images):
    names = pictures(images, [f"MPX{n:04}_synpic{n}.png" for n in range(COUNT)])
    rows = [
        {
            "Type": "CT", "U_id": f"MPX{n:04}", "image": name.removesuffix(".png"),
            "Description": {"Caption": report(n), "Modality": "CT"}, "Location": "Thorax",
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    (folder / "Descriptions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [folder / "Descriptions.jsonl"]


def karpathy(folder, images):
    names = pictures(images, [f"{n}.jpg" for n in range(COUNT)])
    rows = [
        {
            "filename": name, "imgid": n, "split": split_word(n).replace("valid", "val"), "sentids": [],
            "sentences": [{"raw": report(n + k), "tokens": []} for k in range(2)],
        }
        for n, name in enumerate(names)
    ]  # fmt: skip
    return [write_json(folder / "dataset_flickr8k.json", {"images": rows, "dataset": "flickr8k"})]


def flickr_tokens(folder, images):
    names = pictures(images, [f"{n}.jpg" for n in range(COUNT)])
    lines = [f"{name}#{k}\t{report(n + k)}" for n, name in enumerate(names) for k in range(2)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    return [folder / "Flickr8k.token.txt"]


def rexrank(folder, images):
    names = pictures(images, [f"valid/patient{n}/study1/view1_frontal.png" for n in range(COUNT)])
    content = {
        f"patient{n}_study1": {
            "image_path": [name], "context": "Age:82.", "section_clinical_history": None,
            "section_findings": report(n), "section_impression": "Fine.",
        }
        for n, name in enumerate(names)
    }  # fmt: skip
    return [write_json(folder / "ReXRank_test.json".replace("test", "studies"), content)]


def vilmedic(folder, images):
    names = pictures(images, [f"{n}.jpg" for n in range(2 * COUNT)])
    tables = []
    for word, places in (("train", range(16)), ("validate", range(16, 20)), ("test", range(20, COUNT))):
        for kind, line in (("report", report), ("image", lambda n: f"{names[2 * n]},{names[2 * n + 1]}")):
            tables.append(folder / f"{word}.{kind}.tok")
            tables[-1].write_text("".join(f"{line(n)}\n" for n in places))
    return tables


LAYOUTS = {
    layout.__name__: layout
    for layout in (
        chexpert_plus, padchest, padchest_gr, rexgradient, rocov2, casia_cxr, medpix2, karpathy, flickr_tokens, rexrank,
        vilmedic,
    )
}  # fmt: skip
QUICK = ("chexpert_plus", "rexgradient", "karpathy")


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Runs the program on tables with flags; returns its output folder."""

    def run(tables, *flags, out="out"):
        argv = [*tables, "--out", tmp_path / out, "--workers", 1, *flags]
        monkeypatch.setattr(sys, "argv", ["prepare_table.py", *map(str, argv)])
        prepare_table.main()
        return tmp_path / out

    return run


def problems_of(out):
    flags = [
        "--ann_path",
        out / "annotation.json",
        "--image_dir",
        out / "images",
        "--image_size",
        32,
        "--num_workers",
        0,
    ]
    given = vars(check_data.build_arguments().parse_args(list(map(str, flags))))
    for name in check_data.OWN:
        given.pop(name)
    return check_data.check(check_data.resolve_config(settle_flags(given)[0]), True).problems


def test_every_preset_has_a_tree_here():
    assert sorted(LAYOUTS) == preset_names()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_checked_and_repeated(name, prepare, tmp_path, capsys):
    tables = LAYOUTS[name](tmp_path, tmp_path / "scans")
    out = prepare(tables, "--preset", name, "--images", tmp_path / "scans")
    shown = capsys.readouterr().out
    first = (out / "annotation.json").read_bytes()
    assert ("not verified" in shown) == (name in ("padchest_gr", "rexgradient", "rocov2", "casia_cxr", "medpix2"))
    annotation = read_annotation(out / "annotation.json")
    studies = [study for studies in annotation.splits.values() for study in studies]
    assert len(studies) == COUNT
    owners = {}
    for study in studies:
        assert owners.setdefault(study.subject_id or study.id, study.split) == study.split
        assert "are seen" in study.report
    assert not [problem for problem in problems_of(out) if problem.kind != "image is nearly blank"]
    assert read_description(out / "annotation.json")["dataset_name"] == name
    prepare(tables, "--preset", name, "--images", tmp_path / "scans")
    assert (out / "annotation.json").read_bytes() == first and "unchanged" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_layout_trains_an_epoch(name, prepare, tmp_path, train):
    tables = LAYOUTS[name](tmp_path, tmp_path / "scans")
    out = prepare(tables, "--preset", name, "--images", tmp_path / "scans", "--resize", 32)
    folder = train("--ann_path", out / "annotation.json", "--image_dir", out / "images", "--image_size", 64)
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["dataset_name"] == name and results["test"]["model"]["BLEU_1"] is not None


def test_what_the_layouts_bring(prepare, tmp_path):
    def records(name):
        folder = tmp_path / name
        folder.mkdir()
        out = prepare(LAYOUTS[name](folder, folder / "scans"), "--preset", name, out=f"out_{name}")
        content = json.loads((out / "annotation.json").read_text())
        return {record["id"]: record for split in content.values() for record in split}, read_description(out / "x")

    found, facts = records("chexpert_plus")
    second = found["patient00000/2"]
    assert second["sections"] == {"indication": "Cough.", "findings": report(1), "impression": "Fine."}
    assert second["prior"] == "patient00000/1" and "prior" not in found["patient00000/1"]
    assert {record["split"] for record in found.values()} == {"train", "val", "test"} and facts["language"] == "en"
    found, facts = records("rexgradient")
    assert found["1.2.3"]["view"] == ["PA", "LATERAL"] and len(found["1.2.3"]["image_path"]) == 2
    assert found["1.2.3"]["prior"] == "1.2.2" and facts["max_views"] == 2
    found, facts = records("padchest_gr")
    assert found["s0"]["findings"][0]["boxes"] == [[0.1, 0.1, 0.5, 0.5]] and found["s0"]["report"] == report(0)
    found, facts = records("padchest")
    assert (facts["language"], facts["cleaner"]) == ("es", "any") and found["s3"]["image_path"] == ["0/3_abc.png"]
    found, facts = records("flickr_tokens")
    assert facts["captions"] and len(found["0.jpg"]["captions"]) == 2
    assert Config(dataset_name="x", captions=True).captioning


# ---- tables of anybody


def own(folder, **changes):
    rows = [
        {"Image Path": f"{n}.png", "Patient-ID": f"p{n // 3}", "Text": report(n), "View": "AP"} | changes
        for n in range(COUNT)
    ]
    return write_csv(folder / "own.tsv", rows, "\t")


def test_patients_are_found_by_other_names_and_a_tables_own_name_is_no_image(prepare, tmp_path, capsys):
    rows = [{"image_file": f"{n}.png", "MRN": f"p{n // 3}", "text": report(n)} for n in range(COUNT)]
    prepare([write_csv(tmp_path / "own.tsv", rows, "\t")])
    shown = capsys.readouterr()
    assert "patient    MRN  (guessed)" in shown.out and "separated" not in shown.err + shown.out
    prepare([write_csv(tmp_path / "bare.csv", [{k: v for k, v in row.items() if k != "MRN"} for row in rows])], out="b")
    assert "7:1:2 by study, no patients being named, --seed 0" in capsys.readouterr().out
    with pytest.raises(InputError, match="no column for --image was found among 'scan', 'text': name it"):
        prepare([write_csv(tmp_path / "odd.csv", [{"scan": "0.png", "text": "clear"}])], out="c")


def test_columns_are_guessed_and_told(prepare, tmp_path, capsys):
    out = prepare([own(tmp_path)])
    shown = capsys.readouterr().out
    for role, column in (("image", "Image Path"), ("patient", "Patient-ID"), ("report", "Text"), ("view", "View")):
        assert f"{role:<10} {column}  (guessed)" in shown
    assert "7:1:2 by patient, --seed 0" in shown
    content = json.loads((out / "annotation.json").read_text())
    patients = [{record["subject_id"] for record in split} for split in content.values()]
    assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
    assert read_description(out / "x")["dataset_name"] == "out"
    other = json.loads((prepare([own(tmp_path)], "--seed", 1, out="other") / "annotation.json").read_text())
    assert [record["id"] for record in other["test"]] != [record["id"] for record in content["test"]]


def test_given_columns_are_joined_and_templates_filled(prepare, tmp_path):
    rows = [{"n": n, "a": "One.", "b": "" if n else "Two.", "who": n // 2} for n in range(COUNT)]
    table = write_json(tmp_path / "rows.json", rows)
    out = prepare([table], "--image", "scans/{n}.png", "--report", "a", "b", "--patient", "who", "--id", "n")
    record = next(
        r for split in json.loads((out / "annotation.json").read_text()).values() for r in split if r["id"] == "0"
    )
    assert record["report"] == "One. Two." and record["image_path"] == ["scans/0.png"]


@pytest.mark.parametrize(
    "changes, flags, reason",
    [
        ({}, ["--report", "Txet"], "--report: there is no column 'Txet'; did you mean Text?"),
        ({"Text": "nan"}, [], "no study has both an image and a report"),
        ({"Image Path": "scan.nii.gz"}, [], "'scan.nii.gz': volumes are not supported"),
        ({"Image Path": "../scan.png"}, [], "must be a path inside --images"),
        ({"split": "third"}, [], "split 'third' is none of train"),
        ({"split": "test"}, [], "no record is in split train"),
        ({"Patient-ID": "one"}, [], "1 patients are too few"),
        ({}, ["--preset", "chexpert"], "did you mean chexpert_plus?"),
        ({}, ["--preset", "padchest"], "--preset padchest: its id column; give --id: there is no column 'ImageID'"),
        ({}, ["--name", "a b"], "--name 'a b'"),
        ({" Text": ""}, [], "two columns are called 'Text'"),
    ],
)
def test_a_mistake_is_one_line(prepare, tmp_path, changes, flags, reason):
    with pytest.raises(InputError) as error:
        prepare([own(tmp_path, **changes)], *flags)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "annotation.json").exists()


def test_a_patient_in_two_splits_is_named(prepare, tmp_path):
    rows = [
        {"image": f"{n}.png", "patient": f"p{n // 2}", "report": report(n), "split": split_word(n)}
        for n in range(COUNT)
    ]
    with pytest.raises(InputError, match="patient 'p2' is in the splits val and test; --new_split"):
        prepare([write_csv(tmp_path / "rows.csv", rows)])
    prepare([tmp_path / "rows.csv"], "--new_split")


def test_pictures_of_every_kind_and_what_is_not_there(prepare, tmp_path, capsys):
    scans = tmp_path / "scans"
    names = pictures(scans, [f"{n}.{('png', 'jpg')[n % 2]}" for n in range(COUNT)])
    dicom(scans / "0.dcm")
    (scans / "1.jpg").write_bytes(b"no picture")
    (scans / "2.png").unlink()
    names[0] = "0.dcm"
    rows = [{"image": name, "report": report(n)} for n, name in enumerate(names)]
    out = prepare([write_csv(tmp_path / "rows.csv", rows)], "--images", scans, "--resize", 32)
    shown = capsys.readouterr()
    assert f"of {COUNT} images left out: 1 unreadable, 1 missing; " in shown.err
    assert "records without any image left: 2" in shown.out
    with Image.open(out / "images" / "0.dcm.png") as image:
        assert image.size == (32, 24) and image.mode == "L"
    assert not problems_of(out)


def test_a_second_run_takes_no_images_of_another_folder(prepare, tmp_path):
    rows = [{"image": f"{n}.{('jpg', 'JPEG', 'jpeg')[n % 3]}", "report": report(n)} for n in range(COUNT)]
    table = write_csv(tmp_path / "rows.csv", rows)
    for folder in ("a", "b"):
        pictures(tmp_path / folder, [row["image"] for row in rows])
    command = ([table], "--resize", 32, "--images")
    out = prepare(*command, tmp_path / "a")
    with pytest.raises(InputError, match="an earlier run placed images otherwise .*; give its --images"):
        prepare(*command, tmp_path / "b")
    (out / ".preparation.json").write_text('{"way": "link", "resize": 32}')  # as older versions wrote it
    prepare(*command, tmp_path / "a")
    tables = [Image.open(out / "images" / row["image"]).quantization for row in rows[:3]]
    assert tables[0] == tables[1] == tables[2]  # one quality, however the suffix is written


def test_priors_go_by_date_never_by_number():
    def study(number, patient="p", split="train", of=""):
        record = {"id": f"s{number}", "subject_id": patient, "split": split}
        return record | ({"study_id": of} if of else {})

    records = [study(9), study(1), study(5), study(2, "q"), study(3, split="test"), study(7), study(8, of="s7")]
    dates = {
        "s9": "2020-01-01",
        "s1": "2021-05-01T10:00",
        "s5": "2021-05-01T09:00",
        "s2": "2020-06-01",
        "s3": "2022-01-01",
    }
    dates["s7"] = "2021-05-01T10:00"
    when = dict(zip(dates, moments(list(dates.values())), strict=True)) | {"s8": None}
    assert add_priors(records, when) == 3
    assert {record["id"]: record.get("prior") for record in records} == {
        "s9": None, "s1": "s5", "s5": "s9", "s2": None, "s3": None, "s7": "s5", "s8": None,
    }  # fmt: skip
    first, second, none = moments(["20240131", "20240201", "last week"])
    assert first < second and none is None
