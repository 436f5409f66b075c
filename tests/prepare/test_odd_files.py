"""Split files, tables and reports as other programs write them: encodings, separators, numbers with decimals."""

import json

import pytest

from modules.prepare.mimic_cxr import MimicImage, extract_section, read_reports
from modules.prepare.openi import read_openi
from modules.prepare.splits import read_split
from modules.runtime.errors import InputError
from tests.prepare.test_odd_tables import records_of
from tests.prepare.test_prepare_iu_xray import kaggle
from tests.prepare.test_prepare_iu_xray import prepare as prepare_iu_xray
from tests.prepare.test_prepare_table import COUNT, prepare, report, write_csv

__all__ = ["prepare"]  # the fixture

ROWS = [("a", "train"), ("b", "validate"), ("c", "test")]


@pytest.mark.parametrize(
    ("name", "header", "separator", "encoding"),
    [
        ("s.csv", ("id", "split"), ",", "utf-8"),
        ("s.csv", ("study_id", " Split"), ";", "utf-8-sig"),
        ("s.csv", ("Id", "split"), ", ", "utf-16"),
        ("s.tsv", ("uid", "split"), "\t", "utf-8"),
    ],
)
def test_split_files_are_tables_of_any_writing(tmp_path, name, header, separator, encoding):
    (tmp_path / name).write_text("\n".join(map(separator.join, [header, *ROWS])), encoding=encoding)
    assert read_split(tmp_path / name) == {"a": "train", "b": "val", "c": "test"}


def test_a_split_file_says_each_thing_once(tmp_path):
    (tmp_path / "s.json").write_text('{"train": ["a"], "train": ["d"], "val": ["b"], "test": ["c"]}')
    with pytest.raises(InputError, match="--split .*s.json: not valid JSON: the key 'train' occurs twice"):
        read_split(tmp_path / "s.json")
    (tmp_path / "s.csv").write_text("id,part\na,train\n")
    with pytest.raises(InputError, match="--split .*expected the columns id and split, .*'id', 'part'"):
        read_split(tmp_path / "s.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "utf-8-sig"])
def test_json_tables_of_any_encoding(prepare, tmp_path, encoding):
    rows = [{"image": f"{n}.png", "report": f"Größe {report(n)}"} for n in range(COUNT)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
    assert records_of(prepare([tmp_path / "rows.json"]))["1"]["report"] == f"Größe {report(1)}"


@pytest.mark.parametrize("path", ["https://host/a.png", "C:\\scans\\a.png", "s3://bucket/a.png"])
def test_images_of_elsewhere_are_refused(prepare, tmp_path, path):
    rows = [{"image": path, "report": report(n), "id": n} for n in range(COUNT)]
    with pytest.raises(InputError, match=f"must be a path inside --images DIR{'; fetch' if '://' in path else '$'}"):
        prepare([write_csv(tmp_path / "rows.csv", rows)])


def test_one_number_in_two_tables_of_kaggle(tmp_path, monkeypatch, capsys):
    findings = {f"00{n}": f"Clear {n}." for n in range(1, 9)}
    rows = [
        (f"{n}.0", f"{n}_IM-0001-{view}001.dcm.png", side)
        for n in range(1, 8)
        for view, side in ((1, "Frontal"), (2, "Lateral"))
    ]
    folder = kaggle(tmp_path / "kaggle", findings, rows)
    assert [len(study.images) for study in read_openi(folder)] == [2] * 7 + [0]
    (tmp_path / "s.csv").write_text("id,split\n1,train\n2,val\n3,test\n")
    prepare_iu_xray(monkeypatch, "--reports", folder, "--split", tmp_path / "s.csv", "--out", tmp_path)
    assert "0 without findings, 1 with findings and fewer than two images" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_reports_of_mimic_cxr_in_any_encoding(tmp_path, encoding):
    study = MimicImage("a", "50000001", "10000032", "train", "PA")
    path = tmp_path / f"{study.folder}.txt"
    path.parent.mkdir(parents=True)
    path.write_text("FINDINGS: At 37° clear.\n\nIMPRESSION: Fine.", encoding=encoding)
    [(_, text)] = read_reports(tmp_path, [study])
    assert extract_section(text, "findings") == "At 37° clear."


def test_headers_with_a_view_or_two_colons():
    text = "FINDINGS (PA and lateral): Clear.\n\nIMPRESSION::  Fine."
    assert (extract_section(text, "findings"), extract_section(text, "impression")) == ("Clear.", "Fine.")
