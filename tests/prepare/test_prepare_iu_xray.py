"""scripts/prepare_iu_xray.py on made-up studies in the layouts of Open-i and Kaggle, and on hostile archives."""

import csv
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.data.annotations import read_annotation
from modules.prepare.archives import read_files
from modules.prepare.openi import parse_report, read_openi
from modules.prepare.splits import read_split, seeded_split
from modules.runtime.errors import InputError
from scripts import prepare_iu_xray

ROOT = Path(__file__).resolve().parents[2]
REPORTS, IMAGES = "NLMCXR_reports.tgz", "NLMCXR_png.tgz"
REAL = os.environ.get("OPENI_DIR")  # a folder with NLMCXR_reports.tgz and R2Gen's annotation.json


def images_of(number):
    """File names as Open-i has them; every fifth study has three images, every seventh one."""
    first = f"CXR{number}_{'1_' if number == 1 else ''}IM-{number + 500:04d}"
    endings = ("1001",) if number % 7 == 0 else ("1001", "2001", "3001") if number % 5 == 0 else ("1001", "2001")
    return [f"{first}-{ending}" for ending in endings]


def findings_of(number):
    return "" if number % 11 == 0 else f"Heart size  is {number} &amp; normal. "


def xml_of(number, images=None):
    panels = "".join(
        f'<parentImage id="{image}"><caption>PA and lateral</caption></parentImage>'
        for image in (images_of(number) if images is None else images)
    )
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/><uId id="CXR{number}"/>'
        '<MedlineCitation><Article><Abstract><AbstractText Label="INDICATION">Cough</AbstractText>'
        f'<AbstractText Label="FINDINGS">{findings_of(number)}</AbstractText>'
        '<AbstractText Label="IMPRESSION">None.</AbstractText></Abstract></Article></MedlineCitation>'
        f"{panels}</eCitation>"
    ).encode()


def tgz(path, files):
    """A tar.gz of (name or TarInfo, bytes)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(shade, size=(40, 30)):
    content = io.BytesIO()
    Image.fromarray(np.full(size[::-1], shade, np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def openi(tmp_path_factory):
    """Folder with 30 studies in both layouts: NLMCXR_reports.tgz, NLMCXR_png.tgz, and kaggle/."""
    folder = tmp_path_factory.mktemp("openi")
    numbers = range(1, 31)
    tgz(folder / "NLMCXR_reports.tgz", [(f"ecgen-radiology/{number}.xml", xml_of(number)) for number in numbers])
    pictures = [(image, png(number * 8 + place)) for number in numbers for place, image in enumerate(images_of(number))]
    tgz(folder / "NLMCXR_png.tgz", [(f"{image}.png", content) for image, content in pictures])
    normalised = folder / "kaggle" / "images" / "images_normalized"
    normalised.mkdir(parents=True)
    with (
        open(folder / "kaggle" / "indiana_reports.csv", "w", newline="") as reports,
        open(folder / "kaggle" / "indiana_projections.csv", "w", newline="") as projections,
    ):
        csv.writer(reports).writerows(
            [["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"]]
            + [
                [number, "normal", "normal", "x", "", "", findings_of(number).replace("&amp;", "&"), ""]
                for number in numbers
            ]
        )
        csv.writer(projections).writerows(
            [["uid", "filename", "projection"]]
            + [
                # Written lateral first: neither file says an order, the names do.
                [number, kaggle_file(number, image), "Lateral" if image.endswith("1001") else "Frontal"]
                for number in numbers
                for image in reversed(images_of(number))
            ]
        )
    for number in numbers:
        for image, content in pictures:
            if image in images_of(number):
                (normalised / kaggle_file(number, image)).write_bytes(content)
    return folder


def kaggle_file(number, image):
    return f"{number}_{image[image.index('IM-') :]}.dcm.png"


def prepare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_iu_xray.py", *map(str, arguments)])
    prepare_iu_xray.main()


def written(out):
    return json.loads((out / "annotation.json").read_text())


USABLE = [number for number in range(1, 31) if number % 7 and number % 11]


def test_openi_archives_become_r2gens_layout(openi, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, "--reports", openi / REPORTS, "--images", openi / IMAGES, "--out", tmp_path)
    annotation = read_annotation(tmp_path / "annotation.json")
    studies = {study.id: study for split in annotation.splits.values() for study in split}
    assert sorted(studies) == sorted(images_of(number)[0].rpartition("-")[0] for number in USABLE)
    assert studies["CXR2_IM-0502"].report == "Heart size  is 2 & normal. "  # as it stands, spaces and all
    assert studies["CXR1_1_IM-0501"].image_paths == ("CXR1_1_IM-0501/0.png", "CXR1_1_IM-0501/1.png")
    # All images of a study are there, in the report's order; the annotation names two.
    for place in range(3):
        assert np.asarray(Image.open(tmp_path / f"images/CXR5_IM-0505/{place}.png")).max() == 5 * 8 + place
    assert stat.S_IMODE(os.stat(tmp_path / "annotation.json").st_mode) == 0o600
    assert "name no patients" in capsys.readouterr().out


def test_kaggle_gives_the_same_studies_and_the_views(openi, tmp_path, monkeypatch):
    prepare(monkeypatch, "--reports", openi / REPORTS, "--out", tmp_path / "a")
    split = tmp_path / "a" / "annotation.json"
    prepare(
        monkeypatch,
        "--reports",
        openi / "kaggle",
        "--images",
        openi / "kaggle/images/images_normalized",
        "--split",
        split,
        "--workers",
        2,
        "--out",
        tmp_path / "b",
    )
    expected, found = written(tmp_path / "a"), written(tmp_path / "b")
    assert {record.pop("view")[0] for records in found.values() for record in records} == {"lateral"}
    assert found == expected
    assert os.stat(tmp_path / "b/images/CXR1_1_IM-0501/1.png").st_nlink == 2  # a hard link: no disk
    prepare(
        monkeypatch,
        "--reports",
        openi / REPORTS,
        "--frontal_first",
        "--images",
        openi / IMAGES,
        "--projections",
        openi / "kaggle/indiana_projections.csv",
        "--out",
        tmp_path / "c",
    )
    (record,) = (record for records in written(tmp_path / "c").values() for record in records if "0505" in record["id"])
    assert record["view"] == ["frontal", "lateral"]
    shades = [np.asarray(Image.open(tmp_path / f"c/images/CXR5_IM-0505/{place}.png")).max() for place in range(3)]
    assert shades == [41, 40, 42]


def test_resized_images(openi, tmp_path, monkeypatch):
    kaggle = ("--reports", openi / "kaggle", "--images", openi / "kaggle/images", "--out", tmp_path / "b")
    prepare(monkeypatch, *kaggle, "--resize", 32, "--workers", 1)
    assert Image.open(tmp_path / "b/images/CXR2_IM-0502/0.png").size == (40, 30)  # nothing is made larger
    with pytest.raises(InputError, match="--resize 8: must lie"):
        prepare(monkeypatch, "--reports", openi / "kaggle", "--resize", 8, "--out", tmp_path)
    with pytest.raises(InputError, match="an earlier run placed images otherwise"):
        prepare(monkeypatch, *kaggle)


def test_a_second_run_goes_on_and_missing_images_leave_their_study_out(openi, tmp_path, monkeypatch, capsys):
    images = tmp_path / "png"
    images.mkdir()
    for number in USABLE[:-1]:
        for image in images_of(number):
            (images / f"{image}.png").write_bytes(png(9))
    command = (
        "--reports",
        openi / REPORTS,
        "--images",
        images,
        "--place",
        "copy",
        "--workers",
        1,
        "--out",
        tmp_path / "out",
    )
    prepare(monkeypatch, *command)
    assert f"warning: {len(images_of(USABLE[-1]))} of" in capsys.readouterr().err
    assert sum(map(len, written(tmp_path / "out").values())) == len(USABLE) - 1
    kept = tmp_path / "out/images/CXR2_IM-0502/0.png"
    kept.write_bytes(b"from the first run")
    (tmp_path / "out/images/CXR2_IM-0502/1.png").unlink()
    (images / f"{images_of(USABLE[-1])[0]}.png").write_bytes(png(9))
    (images / f"{images_of(USABLE[-1])[1]}.png").write_bytes(png(9))
    prepare(monkeypatch, *command)
    assert kept.read_bytes() == b"from the first run" and kept.with_name("1.png").read_bytes() == png(9)
    assert sum(map(len, written(tmp_path / "out").values())) == len(USABLE)


def test_a_published_split_is_kept_with_its_order(openi, tmp_path, monkeypatch, capsys):
    ids = {"train": ["CXR9_IM-0509", "CXR2_IM-0502"], "val": ["CXR3"], "test": ["CXR4_IM-0504", "CXR999_IM-0001"]}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    prepare(monkeypatch, "--reports", openi / REPORTS, "--split", tmp_path / "ids.json", "--out", tmp_path)
    found = {split: [record["id"] for record in records] for split, records in written(tmp_path).items()}
    assert found == ids | {"test": ["CXR4_IM-0504"]}
    assert "1 of the 5 studies of ids.json" in capsys.readouterr().err
    (tmp_path / "ids.csv").write_text("id,split\nCXR3,val\nCXR2_IM-0502,train\n")
    assert read_split(tmp_path / "ids.csv") == {"CXR3": "val", "CXR2_IM-0502": "train"}


def test_ids_of_a_split_file_name_one_folder_and_one_report_each(openi, tmp_path, monkeypatch, capsys):
    ids = {"train": ["CXR2_IM-0502", "CXR3_/../../../../escaped", "CXR4_/5"], "val": ["CXR9_IM-0509"], "test": ["5"]}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    given = ("--reports", openi / REPORTS, "--split", tmp_path / "ids.json", "--out", tmp_path / "a/b")
    prepare(monkeypatch, *given)
    assert [records[0]["id"] for records in written(tmp_path / "a/b").values()] == ["CXR2_IM-0502", "CXR9_IM-0509", "5"]
    assert "2 of the 5 studies" in capsys.readouterr().err
    for split in ("test", "train"):  # in one split the second would leave the first without its images
        twice = {"train": ["CXR2_IM-0502"], "val": ["CXR9"], "test": ["CXR3"]}
        twice[split].append("CXR2_IM-0502-2001")
        (tmp_path / "ids.json").write_text(json.dumps(twice))
        with pytest.raises(InputError, match=rf"'CXR2_IM-0502' \(train\) and 'CXR2_IM-0502-2001' \({split}\) are both"):
            prepare(monkeypatch, *given)


def test_r2gens_annotation_is_not_replaced(openi, tmp_path, monkeypatch, capsys):
    prepare(monkeypatch, "--reports", openi / REPORTS, "--seed", 7, "--out", tmp_path / "r2gen")
    path = tmp_path / "out" / "annotation.json"
    path.parent.mkdir()
    path.write_text(json.dumps(written(tmp_path / "r2gen"), indent=3))  # as others write it
    before = path.read_bytes()
    command = ("--reports", openi / REPORTS, "--images", openi / IMAGES, "--workers", 1, "--out", path.parent)
    for given in (command, command[:2] + command[4:]):  # with images and without
        with pytest.raises(
            InputError,
            match=r"annotation\.json: already exists with other content, .*another --out, or move "
            r".*; --split FILE, .* keeps its split: R2Gen's",
        ):
            prepare(monkeypatch, *given)
        assert os.listdir(path.parent) == ["annotation.json"] and path.read_bytes() == before
    capsys.readouterr()
    prepare(monkeypatch, *command, "--split", path)  # with its own split it says the same
    assert path.read_bytes() == before and f"unchanged: {path}" in capsys.readouterr().out
    assert (path.parent / "images" / "CXR2_IM-0502" / "0.png").is_file()


def test_missing_images_take_no_record_away(openi, tmp_path, monkeypatch):
    prepare(monkeypatch, "--reports", openi / REPORTS, "--out", tmp_path)
    before = (tmp_path / "annotation.json").read_bytes()
    few = tgz(tmp_path / "few.tgz", [(f"{image}.png", png(9)) for image in images_of(2)])
    with pytest.raises(InputError, match="already exists with other content"):
        prepare(monkeypatch, "--reports", openi / REPORTS, "--images", few, "--out", tmp_path)
    assert (tmp_path / "annotation.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"train": [], "val": []}', "lists under train, val, test"),
        ("{", "not valid JSON"),
        ('{"train": ["a", "a"], "val": [], "test": []}', "'a' is listed twice"),
        ('{"train": [{"report": "x"}], "val": [], "test": []}', "an entry without an id"),
        ('{"train": [], "val": [], "test": []}', "names no study"),
    ],
)
def test_wrong_splits(tmp_path, content, error):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(InputError, match=error):
        read_split(tmp_path / "split.json")
    for row, reason in (("a,third", "not 'third'"), ("a" * 200_000 + ",train", "as CSV, .*: field larger")):
        (tmp_path / "split.csv").write_text(f"id,split\n{row}\n")
        with pytest.raises(InputError, match=reason):
            read_split(tmp_path / "split.csv")


def test_seeded_split_keeps_patients_whole():
    patients = [f"p{index // 3}" for index in range(900)]
    found = seeded_split(patients, 1)
    assert len({(patient, split) for patient, split in zip(patients, found, strict=True)}) == 300
    assert abs(found.count("train") - 630) <= 3 and abs(found.count("test") - 180) <= 3
    assert seeded_split(patients[::-1], 1) == found[::-1] and seeded_split(patients, 2) != found
    assert seeded_split(["a", "b", "c"], 0) != ["train"] * 3


# ---- what others packed is not trusted


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_an_archive_are_refused(tmp_path, kind):
    archive = tgz(tmp_path / "x.tgz", [("1.xml", xml_of(1)), (link("a.xml", "/etc/passwd", kind), b"")])
    with pytest.raises(InputError, match="'a.xml' is a link or a device"):
        read_openi(archive)


def test_names_of_an_archive_lead_nowhere(tmp_path):
    """A member is read into memory, whatever path it names."""
    (tmp_path / "in").mkdir()
    archive = tgz(tmp_path / "in" / "x.tgz", [("../1.xml", xml_of(1)), (str(tmp_path / "2.xml"), xml_of(2))])
    assert [study.number for study in read_openi(archive)] == ["1", "2"]
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.tgz"]


def test_large_and_damaged_archives_are_refused(tmp_path, monkeypatch):
    bomb = tgz(tmp_path / "bomb.tgz", [("1.xml", b" " * (2**20 + 1))])
    with pytest.raises(InputError, match="more than the 1048576 accepted"):
        read_openi(bomb)
    whole = tgz(tmp_path / "cut.tgz", [(f"{n}.xml", xml_of(n)) for n in range(1, 9)])
    monkeypatch.setattr("modules.prepare.openi.MAX_ALL_XML", 4000)
    with pytest.raises(InputError, match="more than the 4000 bytes accepted in all"):
        read_openi(whole)
    whole.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(InputError, match="damaged, or not of the kind its name says"):
        read_openi(whole)


def test_zip_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("ecgen-radiology/2.xml", xml_of(2))
        archive.writestr("__MACOSX/._2.xml", b"\0")
    assert [study.id for study in read_openi(tmp_path / "x.zip")] == ["CXR2_IM-0502"]
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        entry = zipfile.ZipInfo("a.xml")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        list(read_files(tmp_path / "y.zip", ".xml", 99))


def test_xml_entities_are_refused():
    bomb = (
        b'<!DOCTYPE x [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;">]><eCitation><uId id="CXR1"/>'
        b'<AbstractText Label="FINDINGS">&b;</AbstractText></eCitation>'
    )
    for content in (bomb, bomb.decode().encode("utf-16")):
        with pytest.raises(InputError, match="a.xml: refused, it has a document type"):
            parse_report(content, "a.xml")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"<eCitation>", "not well-formed"),
        (b"<html/>", "not an Open-i report"),
        (xml_of(3, ["../../x"]), "is not an image name of Open-i's"),
        (xml_of(3).replace(b"CXR3", b"CXRx"), "not an Open-i"),
        (xml_of(3).replace(b'"CXR3"', b'"CXR' + b"3" * 5000 + b'"'), "not an Open-i"),
    ],
)
def test_wrong_reports(content, error):
    with pytest.raises(InputError, match=f"a.xml: .*{error}"):
        parse_report(content, "a.xml")


def test_wrong_sources(openi, tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("no archive")
    for source, error in (("absent", "no such file"), ("x.txt", "neither a folder nor"), (".", "holds neither")):
        with pytest.raises(InputError, match=error):
            read_openi(tmp_path / source)
    with pytest.raises(InputError, match="report CXR1 is there twice"):
        read_openi(tgz(tmp_path / "x.tgz", [("1.xml", xml_of(1)), ("a/1.xml", xml_of(1))]))
    (tmp_path / "indiana_reports.csv").write_text("uid,text\n1,a\n")
    with pytest.raises(InputError, match="no column findings"):
        read_openi(tmp_path)
    with pytest.raises(InputError, match="none of the .* images could be read"):
        prepare(monkeypatch, "--reports", openi / REPORTS, "--images", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="give --projections"):
        prepare(monkeypatch, "--reports", openi / REPORTS, "--frontal_first", "--out", tmp_path / "out")


def test_one_line_for_the_user(tmp_path):
    script = ROOT / "scripts" / "prepare_iu_xray.py"
    done = subprocess.run(
        [sys.executable, script, "--reports", tmp_path / "no.tgz", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.tgz: no such file" in done.stderr


def kaggle(folder, findings, projections):
    """Kaggle's tables with given findings by uid and (uid, file name, projection) rows; returns the folder."""
    folder.mkdir(exist_ok=True)
    for name, rows in (
        ("indiana_reports.csv", [["uid", "findings"], *findings.items()]),
        ("indiana_projections.csv", [["uid", "filename", "projection"], *projections]),
    ):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def test_missing_findings_are_no_reports_and_an_image_is_one_view(tmp_path, monkeypatch, capsys):
    words = dict(enumerate(("Clear.", "nan", "NaN", "None", "", " ", "N/A", "Effusion.", "Edema."), start=1))
    pair = [
        (uid, f"{uid}_IM-0001-{view}001.dcm.png", side)
        for uid in words
        for view, side in ((1, "Frontal"), (2, "Lateral"))
    ]
    rows = [row for row in pair if row[:2] != (8, "8_IM-0001-2001.dcm.png")]  # the eighth has one image, twice
    rows += [row for row in rows if row[0] in (1, 8)]
    folder = kaggle(tmp_path / "kaggle", words, rows)
    studies = {study.number: study for study in read_openi(folder)}
    assert len(studies["1"].images) == 2 and len(studies["8"].images) == 1
    prepare(monkeypatch, "--reports", folder, "--out", tmp_path)
    assert sorted(record["report"] for own in written(tmp_path).values() for record in own) == ["Clear.", "Edema."]
    said = capsys.readouterr()
    assert "left out: 6 without findings, 1 with findings and fewer than two images" in said.out
    assert "no study for test; training needs all three splits" in said.err
    twice = parse_report(xml_of(2, images_of(2) + images_of(2)), "2.xml")
    assert list(twice.images) == images_of(2)
    with pytest.raises(InputError, match="image 1_IM-0001-1001 is listed twice, with another uid or projection"):
        read_openi(kaggle(folder, words, [*rows, (1, "1_IM-0001-1001.dcm.png", "Lateral")]))


@pytest.mark.parametrize("encoding", ["utf-7", "shift_jis", "klingon", "idna", "zlib"])
def test_encodings_that_are_not_for_xml_get_one_line(encoding):
    with pytest.raises(InputError, match="a.xml: not well-formed XML"):
        parse_report(xml_of(3).replace(b"utf-8", encoding.encode()), "a.xml")


@pytest.mark.skipif(REAL is None, reason="OPENI_DIR names no folder with Open-i's files and R2Gen's annotation")
def test_r2gens_annotation_comes_out(tmp_path, monkeypatch):
    published = json.loads(Path(REAL, "annotation.json").read_text())
    ids = {split: [record["id"] for record in records] for split, records in published.items()}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    prepare(monkeypatch, "--reports", Path(REAL, REPORTS), "--split", tmp_path / "ids.json", "--out", tmp_path)
    assert written(tmp_path) == published
