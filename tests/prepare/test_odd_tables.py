"""scripts/prepare_table.py on tables as people have them: cells of several images, Parquet, dates of any form."""

import itertools
import json
import sys

import numpy as np
import pytest

from modules.prepare.priors import moments
from modules.prepare.table_columns import Preset, joined_tables
from modules.prepare.user_tables import read_pairs, read_user_table
from modules.runtime.errors import InputError
from tests.prepare.test_prepare_table import COUNT, pictures, prepare, report, write_csv

__all__ = ["prepare"]  # the fixture


THREE = [["0.png", "1.png", "2.png"], ["3.png", "4.png", "5.png"]]


@pytest.mark.parametrize(
    "written",
    ["|".join, "; ".join, ", ".join, "\n".join, json.dumps, str],
    ids=["|", ";", ",", "lines", "JSON", "Python"],
)
def test_several_images_in_one_cell(prepare, tmp_path, written):
    rows = [
        {"images": written([f"{3 * n + k}.png" for k in range(3)]), "report": report(n), "view": "PA, LATERAL, AP"}
        for n in range(COUNT)
    ]
    content = json.loads((prepare([write_csv(tmp_path / "rows.csv", rows)]) / "annotation.json").read_text())
    record = next(record for own in content.values() for record in own if record["id"] == "0")
    assert record["image_path"] == THREE[0] and record["view"] == ["PA", "LATERAL", "AP"]


def test_tables_as_they_come(prepare, tmp_path):
    """A byte order mark, semicolons, spaces in the header, quoted line ends, and one report for the rows of a study."""
    lines = ["Bild ; Fall;Wer;Befund"]
    for n in range(COUNT):
        lines += [
            f'{2 * n}.png;s{n};{n};"Größer.\nZweite ""Zeile""; {report(n)}"',
            f"{tmp_path}/scans/{2 * n + 1}.png;s{n};;",
        ]
    (tmp_path / "rows.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    pictures(tmp_path / "scans", [f"{n}.png" for n in range(2 * COUNT)])
    flags = ["--image", "Bild", "--study", "Fall", "--patient", "Wer", "--report", "Befund"]
    out = prepare([tmp_path / "rows.csv"], *flags, "--images", tmp_path / "scans")
    content = json.loads((out / "annotation.json").read_text())
    record = next(record for own in content.values() for record in own if record["id"] == "s1")
    assert record["report"] == f'Größer. Zweite "Zeile"; {report(1)}' and record["subject_id"] == "1"
    assert record["image_path"] == ["2.png", "3.png"] and sum(map(len, content.values())) == COUNT


def test_parquet(prepare, tmp_path, monkeypatch):
    import pandas

    rows = {
        "image": [[f"{n}.png", f"{n}b.png"] for n in range(COUNT)],
        "patient": [None if n == 3 else n // 2 for n in range(COUNT)],  # whole numbers that pandas keeps as floats
        "report": [report(n) for n in range(COUNT)],
        "date": pandas.date_range("2020-01-01", periods=COUNT),
    }
    table = tmp_path / "rows.parquet"
    pandas.DataFrame(rows).to_parquet(table)
    content = json.loads((prepare([table]) / "annotation.json").read_text())
    found = {record["id"]: record for own in content.values() for record in own}
    assert found["0"]["image_path"] == ["0.png", "0b.png"] and found["4"]["subject_id"] == "2"
    assert found["5"]["prior"] == "4" and "prior" not in found["2"] and "subject_id" not in found["3"]

    pandas.DataFrame(rows | {"image": [{"bytes": b"x", "path": "0.png"}] * COUNT}).to_parquet(tmp_path / "hub.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    for name, reason in (
        ("hub", "holds pictures themselves"),
        ("broken", "cannot be read as Parquet"),
        ("x", "no such"),
    ):
        with pytest.raises(InputError, match=reason):
            prepare([tmp_path / f"{name}.parquet"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install -r requirements/parquet.txt"):
        prepare([table])


def test_dates_of_one_column_are_read_together():
    written = ["2020-01-31", "20200201", "02.02.2020 10:30", "2020/02/03 10:30:00", "20200204103000", "05/02/2020", ""]
    found = moments([*written, "13/02/2020"])
    assert found[6] is None and all(a < b for a, b in itertools.pairwise([*found[:6], found[7]]))
    american = moments(["02/05/2020", "02/13/2020"])
    assert american[0] < american[1]
    for ambiguous in (["01/02/2020", "02/02/2020"], ["13/02/2020", "02/13/2020"]):
        assert moments(ambiguous) == [None, None]
    assert moments(["3", "20", "nan"]) == [3.0, 20.0, None]
    assert moments(["3", "2020-01-31"])[0] is None  # a running number says nothing beside dates


def records_of(out) -> dict[str, dict]:
    return {
        record["id"]: record for own in json.loads((out / "annotation.json").read_text()).values() for record in own
    }


def test_images_of_one_name_in_several_folders_are_several_records(prepare, tmp_path, capsys):
    """Without a column of ids: CheXpert's p00/view1.png and p01/view1.png are two patients'."""
    rows = [{"image": f"p{n:02}/view{n % 4}.png", "report": "No acute disease."} for n in range(12)]
    rows += [{"image": "p00/view0.jpg", "report": report(1)}]
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", rows)]))
    assert len(found) == 13 and all(len(record["image_path"]) == 1 for record in found.values())
    assert {"p00/view0", "p00/view0.jpg", "p11/view3"} <= set(found)


def test_an_image_listed_twice_is_one_record_where_each_image_is_one(prepare, tmp_path, capsys):
    rows = [{"image": f"{n}.png", "report": report(n)} for n in range(COUNT)]
    again = [{"image": "0.png", "report": report(0)}, {"image": "1.png", "report": "Another text."}]
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", [*rows, *again])], "--records", "image"))
    said = capsys.readouterr().out
    assert len(found) == COUNT and found["1"]["report"] == report(1)
    assert "images listed twice, taken once: 1\n" in said
    assert "images listed twice, taken once with the first row's report, which differs: 1\n" in said


def test_images_in_two_splits_are_counted(prepare, tmp_path, capsys):
    splits = ["train"] * 8 + ["val", "test"] * 2
    rows = [{"id": f"s{n}", "image": f"{n % 11}.png", "report": report(n), "split": splits[n]} for n in range(12)]
    prepare([write_csv(tmp_path / "rows.csv", rows)])
    assert "images that are in two splits (name a column of patients or studies): 1\n" in capsys.readouterr().out


def test_a_split_file_that_names_other_records_is_told(prepare, tmp_path, capsys):
    rows = [{"id": f"s{n}", "image": f"{n}.png", "report": report(n)} for n in range(COUNT)]
    table, file = write_csv(tmp_path / "rows.csv", rows), tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["s0", "s1"], "val": ["s2"], "test": ["s3", "S4", "S5"]}))
    assert set(records_of(prepare([table], "--split_file", file))) == {"s0", "s1", "s2", "s3"}
    said = capsys.readouterr().out
    assert f"records that --split_file does not name, left out: {COUNT - 4}\n" in said
    assert "ids of --split_file that the table lacks, e.g. 'S4': 2\n" in said
    file.write_text(json.dumps({"train": ["S0"], "val": ["S2"], "test": ["S3"]}))
    with pytest.raises(InputError, match="--split_file: none of its ids, e.g. 'S0', is an id or a study of the table"):
        prepare([table], "--split_file", file)


@pytest.mark.parametrize(
    ("cells", "language"),
    [(["en"], "en"), (["English", "EN-us", "eng"], "en"), (["es"], "es"), (["pt-BR"], "pt-br"), (["en", "es"], None)],
)
def test_languages_are_codes(prepare, tmp_path, capsys, cells, language):
    rows = [
        {"image": f"{n}.png", "report": report(n), "meta": json.dumps({"lang": cells[n % len(cells)]})}
        for n in range(COUNT)
    ]
    (tmp_path / "rows.json").write_text(json.dumps([row | {"meta": json.loads(row["meta"])} for row in rows]))
    out = prepare([tmp_path / "rows.json"], "--language", "meta.lang")
    assert json.loads((out / "dataset.json").read_text()).get("language") == language
    assert ("languages en, es" in capsys.readouterr().out) == (language is None)


def test_a_language_that_is_no_code_is_refused(prepare, tmp_path):
    rows = [{"image": f"{n}.png", "report": report(n), "language": "Spanish"} for n in range(COUNT)]
    with pytest.raises(InputError, match="--language language: 'spanish' is no language code such as en"):
        prepare([write_csv(tmp_path / "rows.csv", rows)])


def test_several_columns_are_joined(prepare, tmp_path):
    rows = [
        {
            **{"MRN": f"p{n // 2}", "visit": n % 2, "image": f"{n}.png", "report": report(n)},
            **{"day": f"2024-01-{n + 1:02}", "time": "10:00"},
        }
        for n in range(COUNT)
    ]
    flags = ["--id", "MRN", "visit", "--patient", "MRN", "--date", "day", "time"]
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", rows)], *flags))
    assert set(found) == {f"p{n // 2}_{n % 2}" for n in range(COUNT)}
    assert found["p0_1"]["prior"] == "p0_0"


def test_a_split_file_may_have_numbers_for_ids(prepare, tmp_path):
    rows = [{"id": str(n), "image": f"{n}.png", "report": report(n)} for n in range(6)]
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, {"id": 1}, 2, 3], "val": [4], "test": [5]}))
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", rows)], "--split_file", tmp_path / "split.json"))
    assert found["4"]["split"] == "val" and len(found) == 6


def test_a_split_file_of_studies_names_no_records(prepare, tmp_path):
    """Record 1 is of study 0, as is record 0: the file's 1 is study 1, whatever the record of that id."""
    rows = [
        {"id": n, "study": n // 2, "patient": f"p{n // 2}", "image": f"{n}.png", "report": report(n)} for n in range(8)
    ]
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 2], "val": [1], "test": [3]}))
    flags = ("--id", "id", "--study", "study", "--records", "image", "--split_file", tmp_path / "split.json")
    table = write_csv(tmp_path / "rows.csv", [{**row, "id": row["id"] + 1} for row in rows])
    found = records_of(prepare([table], *flags))
    assert {record["split"] for record in found.values()} == {"train", "val", "test"} and len(found) == 8
    (tmp_path / "split.json").write_text(json.dumps({"train": [1, 2], "val": [3], "test": []}))
    with pytest.raises(InputError, match="which is the id of one record and the study of another"):
        prepare([table], *flags)


@pytest.mark.parametrize("as_text", [False, True])
def test_an_unknown_view_keeps_its_place(prepare, tmp_path, as_text):
    views = [None, "PA", "LATERAL"]
    rows = [
        {
            "image": [f"{n}a.png", f"{n}b.png", f"{n}c.png"],
            "view": ";".join(view or "" for view in views) if as_text else views,
            "report": report(n),
            "id": str(n),
        }
        for n in range(COUNT)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = records_of(prepare([tmp_path / "rows.json"]))
    assert found["0"]["view"] == ["", "PA", "LATERAL"]


# ---- patients in one split


def of_patients(folder, name, column, patients, first=0):
    rows = [{column: who, "image": f"{first + n}.png", "report": report(first + n)} for n, who in enumerate(patients)]
    return write_csv(folder / name, rows)


def test_columns_of_several_tables_may_differ_in_case(prepare, tmp_path, capsys):
    tables = [
        of_patients(tmp_path, "train.csv", "patient_id", ["P0", "P1"]),
        of_patients(tmp_path, "val.csv", "patient_id", ["P2"], 2),
        of_patients(tmp_path, "test.csv", "Patient ID", ["P0"], 3),
    ]
    with pytest.raises(InputError, match="patient 'P0' is in the splits train and test"):
        prepare(tables)
    tables[2] = of_patients(tmp_path, "test.csv", "patient_id", ["P3", "", ""], 3)
    prepare(tables)
    told = "records that name no patient, of which each study counts as a patient of its own: 2\n"
    assert told in capsys.readouterr().out
    rows = joined_tables([[{"影像": "a"}], [{"报告": "b"}], [{"x y": 1, "X_Y": 2}], [{"Xy": 3}]])
    assert rows == [{"影像": "a"}, {"报告": "b"}, {"x y": 1, "X_Y": 2}, {"X_Y": 3}]


def test_one_number_written_in_two_ways_is_refused(prepare, tmp_path):
    tables = [
        of_patients(tmp_path, "train.csv", "patient", ["0", "1"]),
        of_patients(tmp_path, "val.csv", "patient", ["2"], 2),
        of_patients(tmp_path, "test.csv", "patient", ["0.0"], 3),
    ]
    with pytest.raises(InputError, match=r"ids '0' and '0\.0' are one number, written in two ways; export ids as text"):
        prepare(tables)


def test_a_study_is_of_the_patient_that_one_of_its_rows_names(prepare, tmp_path):
    rows = [
        {"study": f"s{n}", "patient": "" if view else f"p{n // 2}", "image": f"{n}{view}.png", "report": report(n)}
        for n in range(COUNT)
        for view in (0, 1)
    ]
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", rows)], "--records", "image"))
    homes = {(record["subject_id"], record["split"]) for record in found.values()}
    assert len(found) == 2 * COUNT and len(homes) == COUNT // 2
    rows[2]["study"] = "s0"  # p0 as well
    rows[4]["study"] = "s0"  # p1
    with pytest.raises(
        InputError, match="study 's0': its rows name the patients 'p0' and 'p1', and one row names none"
    ):
        prepare([write_csv(tmp_path / "rows.csv", rows)], "--records", "image", out="other")


# ---- what cells and files of others hold


def test_words_for_a_missing_cell(prepare, tmp_path):
    """R's write.csv writes NA."""
    rows = [
        {"study": "NA" if n < 4 else f"s{n}", "image": f"{n}.png", "report": "NA" if n == 9 else report(n)}
        for n in range(COUNT)
    ]
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", rows)]))
    assert len(found) == COUNT - 1 and {"0", "3", "s4"} <= set(found) and "s9" not in found


def test_captions_in_one_cell(prepare, tmp_path):
    two = [["A dog, running.", "Two cats."], ["[sic] one."]]
    cells = [json.dumps(two[0]), str(two[0]), "[sic] one.", str(np.array(two[0])), str(tuple(two[0]))]
    rows = [{"image": f"{n}.png", "captions": cells[n % 5]} for n in range(COUNT)]
    found = records_of(prepare([write_csv(tmp_path / "rows.csv", rows)]))
    assert [found[name]["captions"] for name in "01234"] == [two[0], two[0], two[1], two[0], two[0]]


def test_lists_of_sentences_and_of_images_in_one_cell(prepare, tmp_path):
    """As pandas writes lists, tuples and numpy's arrays into CSV."""
    writings = (list, tuple, np.array)
    rows = [
        {
            "id": n,
            "image": str(writings[n % 3]([f"{n}.png", f"{n}b.png"])),
            "report": str(writings[n % 3](["Heart is normal.", "The lungs' bases are clear."])),
        }
        for n in range(COUNT)
    ]
    for record in records_of(prepare([write_csv(tmp_path / "rows.csv", rows)])).values():
        assert record["report"] == "Heart is normal. The lungs' bases are clear."
        assert record["image_path"] == [f"{record['id']}.png", f"{record['id']}b.png"]


def test_one_id_of_two_reports_and_images_is_no_study(prepare, tmp_path):
    """Two hospitals that both count from 0: the images of the one do not belong to the reports of the other."""
    rows = [{"id": n, "image": f"{n}.png", "report": report(n)} for n in range(COUNT)]
    other = [{"id": n, "image": f"b/{n}.png", "report": "No change."} for n in range(2)]
    tables = [write_csv(tmp_path / "a.csv", rows), write_csv(tmp_path / "b.csv", other)]
    with pytest.raises(InputError, match=rf"row {COUNT + 1} \(image 'b/0.png'\): id '0' is .*unique.*--study"):
        prepare(tables)
    record = records_of(prepare(tables, "--study", "id"))["0"]
    assert record["image_path"] == ["0.png", "b/0.png"]


def test_binary_columns_and_dates_of_parquet(prepare, tmp_path, monkeypatch):
    import pandas

    columns = {
        "image": [f"{n}.png".encode() for n in range(COUNT)],
        "report": [report(n).encode() for n in range(COUNT)],
        "kept": pandas.date_range("2020-01-01", periods=COUNT),
    }
    pandas.DataFrame(columns).to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr("scripts.prepare_table.read_preset", lambda _: Preset(extra=("kept",)))
    record = records_of(prepare([tmp_path / "rows.parquet"]))["1"]
    assert (record["report"], record["image_path"], record["kept"]) == (report(1), ["1.png"], "2020-01-02 00:00:00")
    pandas.DataFrame(columns | {"report": [b"\xff"] * COUNT}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="--report report: holds bytes, not text"):
        prepare([tmp_path / "other.parquet"], out="other")


def test_a_date_beyond_the_calendar_is_told(prepare, tmp_path):
    import pyarrow
    from pyarrow import parquet

    dates = pyarrow.array([2**60] * 3, pyarrow.int64()).cast(pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"date": dates}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="rows.parquet: cannot be read as Parquet"):
        prepare([tmp_path / "rows.parquet"])


@pytest.mark.parametrize("role", ["image", "report", "patient"])
def test_cells_that_are_objects_are_named(prepare, tmp_path, role):
    rows = [
        {"image": f"{n}.png", "report": report(n), "patient": f"p{n}"} | {role: {"a": "x", "b": "y"}} for n in range(9)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=f"--{role} {role}: its cells are objects, .*: {role}.a, {role}.b"):
        prepare([tmp_path / "rows.json"])


def test_a_split_that_loses_all_its_images_is_told(prepare, tmp_path):
    rows = [
        {"id": n, "image": f"{n}.png", "report": report(n), "split": ("train", "train", "val", "test")[n]}
        for n in range(4)
    ]
    pictures(tmp_path / "scans", ["0.png", "1.png", "3.png"])
    with pytest.raises(InputError, match=r"no record is left for split val \(train 2, val 0, test 1\)"):
        prepare([write_csv(tmp_path / "rows.csv", rows)], "--images", tmp_path / "scans")
    assert not (tmp_path / "out" / "annotation.json").exists()


def test_resized_images_do_not_take_the_name_of_another(prepare, tmp_path):
    names = pictures(tmp_path / "scans", ["a.bmp", "a.bmp.png", *(f"{n}.png" for n in range(9))])
    rows = [{"id": n, "image": name, "report": report(n)} for n, name in enumerate(names)]
    out = prepare([write_csv(tmp_path / "rows.csv", rows)], "--images", tmp_path / "scans", "--resize", 32)
    found = records_of(out)
    assert (found["0"]["image_path"], found["1"]["image_path"]) == (["a.bmp.png.png"], ["a.bmp.png"])
    first, second = ((out / "images" / found[name]["image_path"][0]).read_bytes() for name in "01")
    assert first != second


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"a": {"image": "a.png", "report": "r"}, "a": {"image": "b.png", "report": "s"}}',
            "the key 'a' occurs twice",
        ),
        ('{"test": [{"image": "a.png", "report": "r", "split": "train"}]}', "a row under 'test' says split 'train'"),
        ('{"train": [{"image": "a.png", "report": "r"}, ["b.png", "s"]]}', "expected a list of objects"),
    ],
)
def test_json_that_says_two_things_is_refused(prepare, tmp_path, content, reason):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        prepare([tmp_path / "rows.json"])


def test_json_that_says_a_split_twice_alike_is_read(prepare, tmp_path):
    words = {"train": "training", "val": "", "test": "test"}
    rows = {split: [{"image": f"{split}.png", "report": "r", "split": word}] for split, word in words.items()}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert {name: record["split"] for name, record in records_of(prepare([tmp_path / "rows.json"])).items()} == {
        split: split for split in words
    }


def test_a_template_takes_columns_only(prepare, tmp_path):
    table = write_csv(tmp_path / "rows.csv", [{"num": n, "report": report(n)} for n in range(COUNT)])
    with pytest.raises(InputError, match="--image: there is no column 'num:05d'; the columns are 'num', 'report'"):
        prepare([table], "--image", "{num:05d}.png")
    with pytest.raises(InputError, match="not a template of columns in braces"):
        prepare([table], "--image", "{{num}}.png")


def test_a_line_ends_where_an_editor_ends_it(tmp_path):
    for name, text in (("train.report.tok", "one\x85line\r\ntwo\u2028lines\n"), ("train.image.tok", "1.png\n2.png\n")):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    rows = read_pairs([tmp_path / "train.report.tok", tmp_path / "train.image.tok"])
    assert [row["report"] for row in rows] == ["one\x85line", "two\u2028lines"]
    (tmp_path / "f.token").write_text("1.jpg#0\ta\u2028dog\n1.jpg#1\ta dog\n", encoding="utf-8")
    assert read_user_table(tmp_path / "f.token")[0]["caption"] == ["a\u2028dog", "a dog"]
