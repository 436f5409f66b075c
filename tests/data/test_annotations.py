"""annotation.json: what is read from good files, and the one line that every bad file gets."""

import copy
import hashlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.data.annotations import read_annotation
from modules.runtime.errors import InputError

GOOD = {
    "train": [
        {"id": "a", "report": "Clear lungs.", "image_path": ["a/0.png", "a/1.png"], "split": "train"},
        {"id": "b", "report": "Small effusion.", "image_path": ["b/0.png"], "split": "train"},
    ],
    "val": [{"id": "c", "report": "Normal.", "image_path": ["c/0.png"], "split": "val"}],
    "test": [{"id": "d", "report": "Normal.", "image_path": ["d/0.png"], "split": "test"}],
}


def write(tmp_path, data):
    path = tmp_path / "annotation.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def edited(part="train", row=1, drop=None, **fields):
    data = copy.deepcopy(GOOD)
    data[part][row].update(fields)
    if drop:
        del data[part][row][drop]
    return data


def test_records_keep_their_order_and_fields(tmp_path):
    path = write(tmp_path, GOOD)
    annotation = read_annotation(path)
    assert [study.id for study in annotation.splits["train"]] == ["a", "b"]
    study = annotation.splits["train"][0]
    assert (study.report, study.image_paths, study.split) == ("Clear lungs.", ("a/0.png", "a/1.png"), "train")
    assert (study.study_id, study.views) == ("a", ("", ""))
    assert (study.negative_report, study.negative_image_paths) == (None, ())
    assert annotation.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    pairs = json.dumps([["a", "Clear lungs."], ["b", "Small effusion."]])
    assert annotation.train_sha256 == hashlib.sha256(pairs.encode()).hexdigest()


def test_train_hash_follows_train_reports_only(tmp_path):
    before = read_annotation(write(tmp_path, GOOD)).train_sha256
    assert read_annotation(write(tmp_path, edited("test", 0, report="Other."))).train_sha256 == before
    assert read_annotation(write(tmp_path, edited(image_path=["x.png"]))).train_sha256 == before
    assert read_annotation(write(tmp_path, edited(report="Other."))).train_sha256 != before


def test_optional_fields_of_the_data_sets(tmp_path):
    data = edited(row=0, study_id=50414267, view=["PA"], neg_report=["Effusion.", "Not used."])
    data["train"][0]["neg_image_path"] = "b/0.png"
    study = read_annotation(write(tmp_path, data)).splits["train"][0]
    assert (study.study_id, study.views) == ("50414267", ("PA", ""))
    assert (study.negative_report, study.negative_image_paths) == ("Effusion.", ("b/0.png",))


def test_released_ithn_record_is_named_by_its_image(tmp_path):
    record = {"id": "a/0.png", "report": "Clear.", "neg_image_path": ["b/1.png"], "neg_report": ["Effusion."]}
    study = read_annotation(write(tmp_path, {"train": [record]}), required_splits=("train",)).splits["train"][0]
    assert study.image_paths == ("a/0.png",)


def test_byte_order_mark_is_accepted(tmp_path):
    assert read_annotation(write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode())).splits["val"][0].id == "c"


def test_splits_that_are_not_required_may_be_absent(tmp_path):
    annotation = read_annotation(write(tmp_path, {"test": GOOD["test"]}), required_splits=("test",))
    assert list(annotation.splits) == ["test"]


MISTAKES = {
    "not UTF-8": (b'{"train": "\xff"}', ["not UTF-8 (byte 11)"]),
    "not JSON": (b'{"train": [', ["not valid JSON", "line 1 column 12"]),
    "empty file": (b"", ["not valid JSON"]),
    "deep nesting": (b"[" * 200_000, ["nested too deeply"]),
    "a key twice": (b'{"train": [], "val": [], "train": []}', ["not valid JSON", "'train' occurs twice"]),
    "a list": (b"[]", ["holds nothing", "train, val, test"]),
    "missing split": ({"train": GOOD["train"], "val": GOOD["val"]}, ["split 'test' is missing"]),
    "split of wrong type": ({**GOOD, "val": {"a": 1}}, ["split 'val' is an object", "list of records"]),
    "empty split": ({**GOOD, "val": []}, ["split 'val' is empty"]),
    "record of wrong type": ({**GOOD, "val": ["x"]}, ["split 'val', record 0", "is a string"]),
    "missing id": (edited(drop="id"), ["split 'train', record 1", "field 'id' is missing"]),
    "boolean id": (edited(id=True), ["record 1", "field 'id' is a boolean"]),
    "missing report": (edited(drop="report"), ["split 'train', record 1, id 'b'", "field 'report' is missing"]),
    "null report": (edited(report=None), ["id 'b'", "field 'report' is null"]),
    "empty report": (edited(report=""), ["id 'b'", "field 'report' is empty"]),
    "blank report": (edited(report=" \n"), ["id 'b'", "field 'report' is empty"]),
    "report of wrong type": (edited(report=["Clear."]), ["id 'b'", "field 'report' is a list"]),
    "half a surrogate pair": (edited(report="a\ud800"), ["id 'b'", "'report' has a lone surrogate at 1"]),
    "missing image_path": (edited(drop="image_path"), ["id 'b'", "field 'image_path' is missing"]),
    "empty image_path": (edited(image_path=[]), ["id 'b'", "field 'image_path' is empty"]),
    "null image": (edited(image_path=[None]), ["id 'b'", "field 'image_path' holds null"]),
    "image_path of wrong type": (edited(image_path=3), ["id 'b'", "field 'image_path' holds a number"]),
    "empty image name": (edited(image_path=[""]), ["id 'b'", "image path ''"]),
    "absolute path": (edited(image_path=["/etc/passwd"]), ["id 'b'", "'/etc/passwd' must name a file"]),
    "parent path": (edited(image_path=["a/../../b.png"]), ["id 'b'", "must name a file inside image_dir"]),
    "negative's parent path": (edited(neg_image_path=["../b.png"]), ["id 'b'", "must name a file inside image_dir"]),
    "NUL in a path": (edited(image_path=["a\0.png"]), ["id 'b'", r"'a\x00.png' must name"]),
    "negative without image": (edited(neg_report="Effusion."), ["id 'b'", "neg_image_path", "needs both"]),
    "negative without report": (edited(neg_image_path=["b.png"]), ["id 'b'", "neg_report", "needs both"]),
    "blank neg_report": (edited(neg_report=" ", neg_image_path=["b.png"]), ["id 'b'", "field 'neg_report' is empty"]),
    "neg_report of wrong type": (edited(neg_report=[1]), ["id 'b'", "field 'neg_report' holds a number"]),
    "more views than images": (edited(view=["PA", "L"]), ["id 'b'", "'view' has 2 entries for 1 image"]),
    "study_id of wrong type": (edited(study_id=[]), ["id 'b'", "field 'study_id' is empty"]),
    "duplicate id": (edited(id="a"), ["split 'train', id 'a' appears twice"]),
    "id in two splits": (edited("test", 0, id="a"), ["split 'test', id 'a' is in split 'train' too"]),
    "contradicting split in capitals": (edited(split="TEST "), ["id 'b'", "says 'TEST '", "is in 'train'"]),
    "contradicting split": (edited(split="test"), ["id 'b'", "says 'test'", "is in 'train'"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_gets_one_line_that_names_it(tmp_path, name):
    data, parts = MISTAKES[name]
    path = write(tmp_path, data)
    with pytest.raises(InputError) as caught:
        read_annotation(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for part in parts:
        assert part in message


def test_all_mistakes_are_noted_where_that_is_asked_for(tmp_path):
    data = copy.deepcopy(GOOD)
    data["train"][1] = {"id": "b", "report": " ", "image_path": ["../b.png", "/c.png"], "split": "test", "view": [1]}
    data["train"] += ["text", {"report": "Clear."}, {"id": "a", "report": "Clear.", "image_path": ["a.png"]}]
    data["val"] = {}
    data["test"][0]["neg_report"] = "x"
    found = []
    annotation = read_annotation(write(tmp_path, data), on_problem=found.append)
    assert [(problem.split, problem.id, problem.field, problem.kind) for problem in found] == [
        ("train", "b", "split", "split contradicts its list"),
        ("train", "b", "image_path", "image path leaves image_dir"),
        ("train", "b", "image_path", "image path leaves image_dir"),
        ("train", "b", "view", "view holds a number"),
        ("train", "b", "report", "report is empty"),
        ("train", "", "", "record is not an object"),
        ("train", "", "id", "id is missing"),
        ("train", "", "image_path", "image_path is missing"),
        ("train", "a", "id", "id appears twice"),
        ("val", "", "", "split is not a list"),
        ("test", "d", "neg_report", "half a negative"),
    ]
    assert {split: [study.id for study in studies] for split, studies in annotation.splits.items()} == {
        "train": ["a"],
        "val": [],
        "test": [],
    }


@pytest.mark.timeout(20)
def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "annotation.json")
    for path in (tmp_path / "annotation.json", "/dev/zero"):
        with pytest.raises(InputError, match="cannot read the annotation: Not a regular file"):
            read_annotation(path)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(InputError, match="nothing.json: no such file; data/README.md"):
        read_annotation(tmp_path / "nothing.json")
    with pytest.raises(InputError, match="cannot read the annotation: Is a directory"):
        read_annotation(tmp_path)


def test_long_ids_and_line_breaks_do_not_flood_the_message(tmp_path):
    with pytest.raises(InputError) as caught:
        read_annotation(write(tmp_path, edited(id="x\n" * 5000, report=None)))
    assert len(str(caught.value)) < len(str(tmp_path)) + 300 and "\n" not in str(caught.value)


TEXT = st.text("ab./ \n\0\ud800", max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("id", "report", "image_path", "split", "study_id", "view", "neg_report", "neg_image_path")


@given(record=st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_record_is_read_or_refused_in_one_line(tmp_path_factory, record):
    path = write(tmp_path_factory.getbasetemp(), {"train": [GOOD["train"][0] | record]})
    try:
        study = read_annotation(path, required_splits=("train",)).splits["train"][0]
    except InputError as error:
        assert "\n" not in str(error) and "split 'train', record 0" in str(error)
    else:
        assert study.report.strip() and study.image_paths and len(study.views) == len(study.image_paths)
