"""Files of reports in every shape that people have: what is read from which field, joined how, refused why."""

import json

import pytest

from modules.data.report_files import align, read_reports, text_column
from modules.data.report_tables import Table
from modules.runtime.errors import InputError

REFERENCES = ["The heart is normal, no effusion.", "Mild edema.", "Clear lungs."]
GENERATED = ["heart is normal .", "edema .", "lungs are clear ."]
IDS = ["s1", "s2", "s3"]
BY_ID = dict(zip(IDS, REFERENCES, strict=True))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def records(field, texts, key="id", order=(2, 0, 1)):
    return [{key: IDS[row], field: texts[row]} for row in order]


# (name of the file, content, whether it has ids) of GENERATED, shuffled where it has.
GENERATED_FILES = {
    "bare csv": ("r.csv", "\n".join(GENERATED), False),
    "csv with header": ("r.csv", "report\n" + "\n".join(GENERATED), False),
    "csv with ids": ("r.csv", "id,report\ns3,lungs are clear .\ns1,heart is normal .\ns2,edema .\n", True),
    "csv with ids, no header": ("r.csv", "s3,lungs are clear .\ns1,heart is normal .\ns2,edema .\n", True),
    "csv, other names": (
        "r.csv",
        "ID,Model_Prediction\ns3,lungs are clear .\ns1,heart is normal .\ns2,edema .\n",
        True,
    ),
    "tsv": ("r.tsv", "id\treport\ns3\tlungs are clear .\ns1\theart is normal .\ns2\tedema .\n", True),
    "json list of texts": ("r.json", json.dumps(GENERATED), False),
    "json list of objects": ("r.json", json.dumps(records("report", GENERATED)), True),
    "this project's reports.json": (
        "reports.json",
        json.dumps([row | {"reference": "x"} for row in records("report", GENERATED)]),
        True,
    ),
    "json object of texts": ("r.json", json.dumps({IDS[row]: GENERATED[row] for row in (1, 2, 0)}), True),
    "json object of lists": ("r.json", json.dumps({IDS[row]: [GENERATED[row]] for row in (1, 2, 0)}), True),
    "rexrank": (
        "r.json",
        json.dumps(
            {
                IDS[row]: {"model_prediction": GENERATED[row], "report": "x", "image_path": ["a.png", "b.png"]}
                for row in (2, 1, 0)
            }
        ),
        True,
    ),
    "wrapped list": ("r.json", json.dumps({"predictions": records("prediction", GENERATED)}), True),
    "captions.json": ("captions.json", json.dumps(records("caption", GENERATED, key="image_id")), True),
    "json lines": ("r.jsonl", lines(records("generated_report", GENERATED)), True),
    "json lines of texts": ("r.jsonl", lines(GENERATED), False),
    "json without a suffix": ("r", json.dumps(GENERATED), False),
    "byte order mark": ("r.json", "\ufeff" + json.dumps(GENERATED), False),
    "numbers as ids": ("r.json", json.dumps([{"study_id": 1, "report": text} for text in GENERATED]), False),
}


@pytest.mark.parametrize("kind", GENERATED_FILES)
def test_generated_reports(tmp_path, kind):
    name, content, has_ids = GENERATED_FILES[kind]
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "gts.json").write_text(json.dumps(BY_ID))
    found = read_reports(tmp_path / name, "res")
    assert [len(texts) for texts in found.texts] == [1, 1, 1]
    if has_ids:
        found = align(read_reports(tmp_path / "gts.json", "gts"), found)
    assert [text for [text] in found.texts] == GENERATED


@pytest.mark.parametrize(
    "content",
    [
        records("reference", REFERENCES),
        {key: {"section_findings": text, "model_prediction": "x"} for key, text in BY_ID.items()},
        {"train": [], "test": records("report", REFERENCES, order=(0, 1, 2))},
        {
            "images": [{"id": 7}],
            "annotations": [{"id": n, "image_id": key, "caption": text} for n, (key, text) in enumerate(BY_ID.items())],
        },
    ],
    ids=["list", "rexrank", "annotation", "coco"],
)
def test_references(tmp_path, content):
    (tmp_path / "g.json").write_text(json.dumps(content))
    found = read_reports(tmp_path / "g.json", "gts")
    assert sorted(zip(found.ids, [text for [text] in found.texts], strict=True)) == sorted(BY_ID.items())


def test_studies_and_patients_are_read(tmp_path):
    (tmp_path / "g.csv").write_text("dicom_id,study_id,subject_id,report\na,1,7,Edema.\nb,1,7,Edema.\nc,2,,Clear.\n")
    found = read_reports(tmp_path / "g.csv", "gts")
    assert (found.ids, found.studies, found.subjects) == (["a", "b", "c"], ["1", "1", "2"], ["7", "7", ""])
    (tmp_path / "h.csv").write_text("report\nEdema.\n")
    assert read_reports(tmp_path / "h.csv", "gts").studies == []


def test_priors_are_read_where_any_record_has_one(tmp_path):
    records = [
        {"id": "a", "report": "x", "prior": "z"},
        {"id": "b", "report": "y"},
        {"id": "c", "report": "", "prior": None},
    ]
    (tmp_path / "g.json").write_text(json.dumps({"test": records, "train": []}))
    assert read_reports(tmp_path / "g.json", "gts").with_prior == [True, False, False]
    (tmp_path / "h.json").write_text(json.dumps(records[1:]))
    assert read_reports(tmp_path / "h.json", "gts").with_prior is None


def test_words_of_pandas_for_a_missing_text_are_empty_reports(tmp_path, capsys):
    (tmp_path / "r.csv").write_text("id,report\na,nan\nb,Edema.\nc,None\n")
    assert read_reports(tmp_path / "r.csv", "res").texts == [[""], ["Edema."], [""]]
    assert "the report of a is 'nan'; 2 such count as empty reports" in capsys.readouterr().err


def test_of_a_list_of_all_splits_one_is_read(tmp_path, capsys):
    listed = [
        {"id": str(n), "report": f"r{n}", "split": split} for n, split in enumerate(["train", "test", "test", "val"])
    ]
    for name, content in (("g.json", json.dumps(listed)), ("g.jsonl", lines(listed))):
        (tmp_path / name).write_text(content)
        assert read_reports(tmp_path / name, "gts").texts == [["r1"], ["r2"]]
        assert read_reports(tmp_path / name, "gts", split="train").texts == [["r0"]]
    assert "2 of 4 records are of split test" in capsys.readouterr().err


def test_a_folder_of_a_run(tmp_path):
    (tmp_path / "gts.csv").write_text("Edema.\n")
    (tmp_path / "res.csv").write_text("edema .\n")
    assert read_reports(tmp_path, "gts").texts == [["Edema."]] and read_reports(tmp_path, "res").texts == [["edema ."]]


def test_several_captions_are_for_captions(tmp_path):
    captions = [
        {"image_id": key, "id": n, "caption": text} for n, (key, text) in enumerate([(1, "a"), (2, "b"), (1, "c")])
    ]
    for content in ({"annotations": captions, "images": []}, {"1": ["a", "c"], "2": ["b"]}):
        (tmp_path / "g.json").write_text(json.dumps(content))
        found = read_reports(tmp_path / "g.json", "gts", captions=True)
        assert (found.ids, found.texts) == (["1", "2"], [["a", "c"], ["b"]])
    with pytest.raises(InputError, match="id 1 has several texts .*--cleaner coco"):
        read_reports(tmp_path / "g.json", "gts")
    (tmp_path / "gts.csv").write_text("a,c\nb,\n")
    assert read_reports(tmp_path / "gts.csv", "gts", captions=True).texts == [["a", "c"], ["b"]]


def test_the_field_is_said_where_there_are_several_and_can_be_named(tmp_path, capsys):
    (tmp_path / "r.csv").write_text("id,report,findings\n1,whole,part\n")
    assert read_reports(tmp_path / "r.csv", "res").texts == [["whole"]]
    assert "'report' is read as the reports; it has findings too" in capsys.readouterr().err
    assert read_reports(tmp_path / "r.csv", "res", column="Findings").texts == [["part"]]
    (tmp_path / "r.json").write_text('[{"id": 1, "mine": "x", "report": "y"}]')
    assert read_reports(tmp_path / "r.json", "res", column="mine").texts == [["x"]]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("r.json", '{"a": "x", "a": "y"}', "id or key a is there twice"),
        ("r.json", '[{"id": "a", "report": null}]', "id a: its report is null"),
        ("r.json", '{"a": 3}', "id a: its report is not a text"),
        ("r.json", '[{"id": "a", "words": "x"}]', "id a has none of the fields .*it has id, words.*--res_column"),
        ("r.json", "[]", "holds no reports"),
        ("r.json", "3", "neither a list nor an object"),
        ("r.json", '[{"id": 1', "not valid JSON"),
        ("r.jsonl", '{"id": 1, "report": "x"}\n{"id"\n', "line 2 is not valid JSON"),
        ("r.json", "[" * 100_000, "nested too deeply"),
        ("r.json", '{"train": [], "val": []}', "has no split 'test'; it has train, val"),
        ("r.csv", "id,words\n1,x\n", "no column such as 'report'; its columns are id, words"),
        ("r.csv", "report,Report\nx,y\n", "two columns are called 'report'"),
        ("none.json", None, "there is no such file"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_cause(tmp_path, name, content, cause):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=cause):
        read_reports(tmp_path / name, "res")


@pytest.mark.parametrize(
    ("generated", "cause"),
    [
        ({"s1": "x", "s2": "y"}, r"no row with id s3 \(1 are missing\)"),
        ({"s1": "x", "s2": "y", "s3": "z", "s4": "q"}, r"g.json: no row with id s4 \(1 are missing\)"),
        ([{"id": key, "report": "x"} for key in ("s1", "s2", "s2", "s3")], "id s2 is in 2 rows"),
        (["x", "y"], "has 3 rows and .* 2"),
    ],
)
def test_ids_that_do_not_agree_are_named(tmp_path, generated, cause):
    (tmp_path / "g.json").write_text(json.dumps(BY_ID))
    (tmp_path / "r.json").write_text(json.dumps(generated))
    with pytest.raises(InputError, match=cause):
        align(read_reports(tmp_path / "g.json", "gts"), read_reports(tmp_path / "r.json", "res"))


def test_a_line_separator_inside_a_text_ends_no_json_line(tmp_path):
    content = '{"id": "a", "report": "one\u2028line"}\r\n{"id": "b", "report": "x"}\n'
    (tmp_path / "r.jsonl").write_text(content, encoding="utf-8", newline="")
    found = read_reports(tmp_path / "r.jsonl", "res")
    assert found.ids == ["a", "b"] and found.texts[0] == ["one\u2028line"]


@pytest.mark.parametrize("key", ["uid", "image", "filename", "case_id", "id", "image_path"])
def test_records_are_joined_by_any_field_of_ids(tmp_path, key):
    for name, order in (("g", (0, 1, 2)), ("r", (2, 0, 1))):
        ids = {"id": [1.0, 2.0, 3.0], "image_path": [["1.png", "a.png"], ["2.png"], ["3.png"]]}.get(key, IDS)
        rows = [{key: ids[row], "report": GENERATED[row]} for row in order]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = align(read_reports(tmp_path / "g.json", "gts"), read_reports(tmp_path / "r.json", "res"))
    assert [text for [text] in found.texts] == GENERATED
    if key == "id":
        assert found.ids == ["1", "2", "3"]


def test_an_id_inside_a_record_counts_and_not_the_row_number_of_pandas(tmp_path):
    for name, order in (("g", (0, 1, 2)), ("r", (2, 0, 1))):
        rows = {str(n): {"id": IDS[row], "report": GENERATED[row]} for n, row in enumerate(order)}
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    references = read_reports(tmp_path / "g.json", "gts")
    assert [text for [text] in align(references, read_reports(tmp_path / "r.json", "res")).texts] == GENERATED
    # And where the key is the study's and the id inside counts rows, the other file tells.
    (tmp_path / "h.json").write_text(json.dumps({f"s{n}": {"id": n, "report": GENERATED[n - 1]} for n in (3, 1, 2)}))
    (tmp_path / "t.json").write_text(json.dumps(BY_ID))
    found = align(read_reports(tmp_path / "t.json", "gts"), read_reports(tmp_path / "h.json", "res"))
    assert [text for [text] in found.texts] == GENERATED


@pytest.mark.parametrize("name", ["pred", "preds", "predictions", "generated_text", "candidate", "hyp", "model_output"])
def test_generated_reports_are_found_beside_a_copy_of_the_references(tmp_path, name):
    table = Table("r.csv", ["id", "report", name], [["a", "Edema.", "No edema."]])
    assert (text_column(table, "res"), text_column(table, "gts")) == (2, 1)
    assert text_column(Table("r.csv", table.columns, [["a", "Edema.", "1"]]), "res") == 1  # a label and no report
    assert text_column(Table("r.csv", table.columns, [["a", "Edema.", ""]]), "res") == 2  # a system without words
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "report": "Edema.", name: "No edema."}]))
    assert read_reports(tmp_path / "r.json", "res").texts == [["No edema."]]
    (tmp_path / "r.json").write_text(json.dumps([{"id": "a", "report": "Edema.", name: 1}]))
    assert read_reports(tmp_path / "r.json", "res").texts == [["Edema."]]


def test_references_are_not_scored_against_themselves(tmp_path):
    (tmp_path / "g.csv").write_text("id,report\na,Mild edema.\nb,Clear.\n")
    (tmp_path / "r.csv").write_text("id,report,mine\na,Mild edema.,No edema is seen.\nb,Clear.,Lungs are clear.\n")
    references = read_reports(tmp_path / "g.csv", "gts")
    with pytest.raises(InputError, match="are the references in every row, and its column 'mine' .* --res_column"):
        align(references, read_reports(tmp_path / "r.csv", "res"))
    assert align(references, read_reports(tmp_path / "r.csv", "res", column="mine")).texts[0] == ["No edema is seen."]
    assert align(references, read_reports(tmp_path / "r.csv", "res", column="report")).texts == references.texts
    assert align(references, read_reports(tmp_path / "g.csv", "res")).texts == references.texts  # a perfect system


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_one_record_is_no_object_of_texts_by_id(tmp_path, name):
    (tmp_path / name).write_text('{"id": "a", "report": "Mild edema."}\n')
    found = read_reports(tmp_path / name, "res")
    assert (found.ids, found.texts) == (["a"], [["Mild edema."]])


def test_words_of_pandas_are_no_patient_and_no_prior(tmp_path):
    (tmp_path / "g.csv").write_text("id,subject_id,prior,report\na,nan,nan,x\nb,7,a,y\n")
    found = read_reports(tmp_path / "g.csv", "gts")
    assert (found.subjects, found.with_prior) == (["", "7"], [False, True])
    rows = [{"id": "a", "subject_id": 7.0, "report": "x"}, {"id": "b", "subject_id": None, "report": "y"}]
    (tmp_path / "g.json").write_text(json.dumps(rows))
    assert read_reports(tmp_path / "g.json", "gts").subjects == ["7", ""]


@pytest.mark.parametrize("form", ["csv", "list", "object", "annotation"])
def test_of_all_splits_one_is_read_whatever_it_is_called(tmp_path, capsys, form):
    rows = [{"id": str(n), "split": word, "report": f"r{n}"} for n, word in enumerate(["training", "test", "valid"])]
    path = tmp_path / f"g.{'csv' if form == 'csv' else 'json'}"
    content = {
        "csv": "\n".join(["id,split,report", *(",".join(row.values()) for row in rows)]),
        "list": json.dumps(rows),
        "object": json.dumps({row["id"]: row for row in rows}),
        "annotation": json.dumps({row["split"]: [row] for row in rows}),
    }
    path.write_text(content[form])
    for split, text in (("train", "r0"), ("test", "r1"), ("val", "r2")):
        assert read_reports(path, "gts", split=split).texts == [[text]]
    assert form == "annotation" or capsys.readouterr().err.count("1 of 3 records are of split") == 3


def test_held_out_reports_are_no_training_reports(tmp_path):
    (tmp_path / "g.csv").write_text("id,split,report\na,test,x\n")
    assert read_reports(tmp_path / "g.csv", "gts", split="val").texts == [["x"]]  # to be scored by choice
    with pytest.raises(InputError, match="has no rows of split 'train'; it has test"):
        read_reports(tmp_path / "g.csv", "gts", split="train")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({"images": [{"id": "a", "report": "x"}], "info": "v"}, "is an object with images, info, where ids"),
        ({"columns": ["id", "report"], "index": [0], "data": [["a", "x"]]}, "orient='records'"),
        ({"id": {"0": "a"}, "report": {"0": "x"}}, "orient='records'"),
        ([["a", "x"], ["b", "y"]], "an id and its text are written {id: text}"),
    ],
)
def test_other_shapes_of_json_are_named(tmp_path, content, cause):
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=cause):
        read_reports(tmp_path / "r.json", "res")
