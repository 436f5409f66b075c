"""Label files: columns by name, pickles that can do no harm, lookup of studies."""

import os
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.data.annotations import Study
from modules.labels.array_pickle import read_pickled_arrays
from modules.labels.rules import CLASSES
from modules.labels.study_labels import NO_FINDING, ORDERS, class_order, read_labels
from modules.labels.tables import write_table
from modules.runtime.errors import InputError
from scripts import label_reports

IDS = ["CXR1_IM-0001", "CXR2_IM-0652"]
# One row per id, by class name.
POSITIVE = [{"Edema", "Pneumonia"}, {NO_FINDING}]


def study(record_id, study_id=None):
    return Study(record_id, "text .", ("0.png",), "train", study_id or record_id, ("",))


def csv_file(path, classes, cells=("1", "0"), ids=IDS, id_column="id"):
    yes, no = cells
    rows = [
        [key, *(yes if name in positive else no for name in classes)]
        for key, positive in zip(ids, POSITIVE, strict=True)
    ]
    write_table(path, [id_column, *classes], rows)
    return path


def pickle_file(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def arrays(order, dtype=np.float64):
    return {
        key: np.array([name in positive for name in ORDERS[order]], dtype)
        for key, positive in zip(IDS, POSITIVE, strict=True)
    }


def named(row, order):
    return {name for name, value in zip(ORDERS[order], row, strict=True) if value}


@pytest.mark.parametrize("order", list(ORDERS))
def test_csv_columns_are_read_by_name(tmp_path, order):
    shuffled = CLASSES[::2] + CLASSES[1::2]
    path = csv_file(tmp_path / "labels.csv", shuffled)
    found = read_labels(path, ORDERS[order]).of([study(key) for key in IDS])
    assert found.dtype == np.float32 and found.shape == (2, 14)
    assert [named(row, order) for row in found] == POSITIVE


def test_default_order_is_that_of_the_classes(tmp_path):
    path = csv_file(tmp_path / "labels.csv", CLASSES[::-1])
    assert [named(row, "chexpert") for row in read_labels(path).of([study(key) for key in IDS])] == POSITIVE


@pytest.mark.parametrize("cells", [("-1", ""), ("1.0", "-"), ("-1.0", "0.0")])
def test_uncertain_is_positive_and_unmentioned_negative(tmp_path, cells):
    path = csv_file(tmp_path / "labels.csv", CLASSES, cells)
    assert [named(row, "chexpert") for row in read_labels(path).of([study(key) for key in IDS])] == POSITIVE


@pytest.mark.parametrize(
    ("columns", "order"), [("chexbert", "chexbert"), ("mimic_cxr", "chexbert"), ("chexbert", "chexpert")]
)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_is_arranged_by_the_names_given_for_it(tmp_path, columns, order, protocol):
    content = arrays(columns)
    if protocol == 2:  # bytes have no opcode of their own there, so arrays cannot be told from calls of codecs
        content = {key: values.tolist() for key, values in content.items()}
    found = read_labels(pickle_file(tmp_path / "labels.pickle", content, protocol), ORDERS[order], columns)
    assert [named(row, order) for row in found.of([study(key) for key in IDS])] == POSITIVE


def test_pickle_without_names_is_refused(tmp_path):
    path = pickle_file(tmp_path / "labels.pickle", arrays("chexbert"))
    with pytest.raises(InputError, match="no names; say them with --label_columns chexbert"):
        read_labels(path)


def test_a_study_is_looked_up_by_the_column_that_was_read(tmp_path):
    crossed = [study("1", "2"), study("2", "1")]  # a record whose id is another's study_id
    by_id = read_labels(csv_file(tmp_path / "id.csv", CLASSES, ids=["1", "2"]))
    by_study = read_labels(csv_file(tmp_path / "study.csv", CLASSES, ids=["1", "2"], id_column="Study_ID"))
    assert [named(row, "chexpert") for row in by_id.of(crossed)] == POSITIVE
    assert [named(row, "chexpert") for row in by_study.of(crossed)] == POSITIVE[::-1]
    caption = replace(study("1#0", "9"), record_id="1")
    assert named(by_id.find(caption), "chexpert") == POSITIVE[0] and by_id.find(study("1-a-b", "2")) is None
    with pytest.raises(InputError, match=r"no labels for study '8' of split 'train' \(nor for 1 others.*column id$"):
        by_id.of([study("1"), study("8"), study("9")])


def test_pickles_are_looked_up_as_xpronet_does_by_the_id_or_its_first_two_pieces(tmp_path):
    table = read_labels(pickle_file(tmp_path / "labels.pickle", arrays("chexbert")), columns="chexbert")
    same = table.of([study(IDS[0]), study(f"{IDS[0]}-1001"), study(f"{IDS[0]}-4001-2", IDS[1])])
    assert (same == same[0]).all() and named(same[0], "chexpert") == POSITIVE[0]
    assert table.find(study("view 7", IDS[0])) is None


@pytest.mark.parametrize(
    ("text", "expected"), [("chexbert", ORDERS["chexbert"]), (", ".join(CLASSES[::-1]).upper(), CLASSES[::-1])]
)
def test_class_order(text, expected):
    assert class_order(text, "cluster_order") == expected
    assert sorted(expected) == sorted(CLASSES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("edema", "1 of the 14 classes are named"),
        ("chexbart", "no class is called 'chexbart'"),
        (",".join([*CLASSES[:-1], CLASSES[0]]), "13 of the 14"),
    ],
)
def test_class_order_names_the_mistake(text, reason):
    with pytest.raises(InputError, match=f"--cluster_order: {reason}"):
        class_order(text, "cluster_order")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("id,", "name,", 1), "no column id, dicom_id, study_id"),
        (lambda text: text.replace("Edema", "Oedema", 1), "no label column Edema"),
        (lambda text: text.replace(",1,", ",2,", 1), "row 1: Edema is '2'"),
        (lambda text: text.replace(IDS[1], IDS[0]), "row 2: id 'CXR1_IM-0001' appears twice"),
    ],
)
def test_csv_mistakes_are_named(tmp_path, change, reason):
    path = csv_file(tmp_path / "labels.csv", CLASSES)
    path.write_text(change(path.read_text()))
    with pytest.raises(InputError, match=reason):
        read_labels(path)


def test_missing_file_says_what_makes_one(tmp_path):
    with pytest.raises(InputError, match=r"scripts/label_reports.py makes one"):
        read_labels(tmp_path / "labels.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": np.zeros(13)}, r"'a' has an array of shape \(13,\)"),
        ({"a": np.full(14, 2.0)}, "'a' has a label other than"),
        ({"a": "text"}, "'a' is neither a numpy array"),
        ([np.zeros(14)], "holds a list"),
        ({"a": np.array(["x"] * 14)}, "refused, it holds an array of 'U1'"),
        ({"a": np.array([None] * 14)}, "refused, it holds an array of 'O8'"),
        ({"a": np.zeros(14, "f8,i4")}, "refused, it holds an array of 'V12'"),
        ({("a", "b"): np.zeros(14)}, "refused, it holds a key that is a tuple"),
        ({"a": os.system}, "refused, it holds (posix|nt).system"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, reason):
    with pytest.raises(InputError, match=reason):
        read_labels(pickle_file(tmp_path / "labels.pickle", content), columns="chexbert")


class Harmful:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, ("touch harmed",)),
        (eval, ("open('harmed', 'w')",)),
        (np.load, ("harmed",)),
        (getattr, (np.dtype, "newbyteorder")),
        (np.fromfile, ("harmed",)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_call_is_made(tmp_path, monkeypatch, call, protocol):
    monkeypatch.chdir(tmp_path)
    path = pickle_file(tmp_path / "labels.pickle", {"a": Harmful(*call)}, protocol)
    with pytest.raises(InputError, match="refused"):
        read_pickled_arrays(path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "u1", "?", ">i4"])
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_arrive_as_they_were(tmp_path, dtype, protocol):
    content = {
        "rows": np.arange(6).reshape(2, 3).astype(dtype),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype)),
        7: np.arange(2).astype(dtype),
    }
    found = read_pickled_arrays(pickle_file(tmp_path / "arrays.pickle", content, protocol))
    assert list(found) == ["rows", "columns", "7"]
    for key, values in content.items():
        np.testing.assert_array_equal(found[str(key)], values)


def test_arrays_of_numpy_1_are_read(tmp_path):
    written = pickle.dumps(arrays("chexbert"), protocol=2 + 1)
    old = written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "labels.pickle").write_bytes(old)
    found = read_pickled_arrays(tmp_path / "labels.pickle")
    np.testing.assert_array_equal(found[IDS[0]], arrays("chexbert")[IDS[0]])


@given(cut=st.integers(0, 400), position=st.integers(0, 400), byte=st.integers(0, 255))
def test_damaged_pickles_are_refused_or_read_in_full(tmp_path_factory, cut, position, byte):
    written = bytearray(pickle.dumps(arrays("chexbert"), protocol=4))
    written[position % len(written)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.pickle"
    path.write_bytes(written[: len(written) - cut])
    try:
        found = read_pickled_arrays(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(values, np.ndarray) and values.dtype.kind in "biuf" for values in found.values())


def test_labels_with_another_programs_record_stay(tmp_path, monkeypatch):
    for name, content in (("in.csv", "report\nEdema.\n"), ("out.csv", "mine\n")):
        (tmp_path / name).write_text(content)
    monkeypatch.setattr("sys.argv", ["label_reports.py", str(tmp_path / "in.csv"), "--out", str(tmp_path / "out.csv")])
    for record in ("{}", "[]"):
        (tmp_path / "out.provenance.json").write_text(record)
        with pytest.raises(InputError, match="already exists and is not an unchanged output of this program"):
            label_reports.main()


def test_a_declared_size_costs_nothing(tmp_path):
    # One array that says it has 2^40 elements and brings 8 bytes.
    written = pickle.dumps({"a": np.zeros(1)}, protocol=3)
    huge = written.replace(b"K\x01\x85", b"\x8a\x06" + struct.pack("<Q", 2**40)[:6] + b"\x85")
    assert huge != written
    path = tmp_path / "huge.pickle"
    path.write_bytes(huge)
    with pytest.raises(InputError, match="damaged"):
        read_pickled_arrays(path)


@pytest.mark.parametrize("end", [b"K\x01s.", b"cnumpy\ndtype\n1\x85R."])  # as a key, as a type
@pytest.mark.parametrize("levels", [b"2\x86", b"\x94h%c\x86"])  # two of itself: copied, fetched
def test_nested_tuples_cost_nothing(tmp_path, levels, end):
    nested = b"".join(levels % number if b"%" in levels else levels for number in range(60))
    path = tmp_path / "nested.pickle"
    path.write_bytes(b"\x80\x04}" + b"K\x01" + nested + end)
    with pytest.raises(InputError, match="refused|damaged"):
        read_pickled_arrays(path)
