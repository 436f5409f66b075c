"""make_folds.py: each study tested once, patients kept together, the same folds from the same seed."""

import json
import sys

import pytest

from modules.data.annotations import SPLITS, read_annotation
from modules.runtime.errors import InputError
from modules.runtime.records import write_private
from scripts.research import make_folds


def write(path, count=40, images_of_a_study=1, **fields):
    splits = {split: [] for split in SPLITS}
    for number in range(count):
        split = SPLITS[number % 3]
        splits[split].append(
            {
                "id": f"s{number}",
                "report": f"report {number} .",
                "image_path": ["x.png"],
                "study_id": number // images_of_a_study,
                "split": split,
                "kept": number,
            }
            | fields
        )
    path.write_text(json.dumps(splits))
    return path


def folded(monkeypatch, path, out, *flags):
    monkeypatch.setattr(sys, "argv", ["make_folds.py", "--ann_path", str(path), "--out", str(out), *flags])
    make_folds.main()
    return [read_annotation(path / "annotation.json") for path in sorted(out.glob("fold?"))]


def test_each_study_is_tested_once_and_every_split_is_a_partition(tmp_path, monkeypatch):
    folds = folded(monkeypatch, write(tmp_path / "a.json"), tmp_path / "out", "--folds", "5")
    everything = sorted(f"s{number}" for number in range(40))
    assert sorted(study.id for fold in folds for study in fold.splits["test"]) == everything
    for fold in folds:
        assert [len(fold.splits[split]) for split in SPLITS] == [28, 4, 8]
        assert sorted(study.id for split in SPLITS for study in fold.splits[split]) == everything
    assert len({tuple(study.id for study in fold.splits["val"]) for fold in folds}) == 5


def test_records_are_otherwise_as_they_were(tmp_path, monkeypatch):
    folded(monkeypatch, write(tmp_path / "a.json"), tmp_path / "out")
    path = tmp_path / "out" / "fold2" / "annotation.json"
    records = {record["id"]: (split, record) for split, own in json.loads(path.read_text()).items() for record in own}
    for number in range(40):
        split, record = records[f"s{number}"]
        assert record == {
            "id": f"s{number}",
            "report": f"report {number} .",
            "image_path": ["x.png"],
            "study_id": number,
            "split": split,
            "kept": number,
        }
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("fields", "images_of_a_study", "group"),
    [({}, 4, lambda number: number // 4), ({"study_id": "same", "subject_id": None}, 1, None)],
)
def test_a_study_or_patient_is_in_one_split(tmp_path, monkeypatch, fields, images_of_a_study, group):
    path = write(tmp_path / "a.json", 60, images_of_a_study, **fields)
    if group is None:  # five records of each patient, with a study each
        content = json.loads(path.read_text())
        for own in content.values():
            for record in own:
                record |= {"study_id": record["kept"], "subject_id": f"p{record['kept'] % 12}"}
        path.write_text(json.dumps(content))
        group = lambda number: number % 12  # noqa: E731
    for fold in folded(monkeypatch, path, tmp_path / "out", "--folds", "3"):
        found = [{group(int(study.id[1:])) for study in fold.splits[split]} for split in SPLITS]
        assert all(found) and sum(map(len, found)) == len(set.union(*found))


def test_the_seed_decides(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    found = [
        folded(monkeypatch, path, tmp_path / name, "--seed", seed)[0].sha256
        for name, seed in (("one", "1"), ("again", "1"), ("other", "2"))
    ]
    assert found[0] == found[1] != found[2]


def test_a_study_of_which_one_record_alone_names_the_patient_is_in_one_split(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", 40, images_of_a_study=2)
    content = json.loads(path.read_text())
    for own in content.values():
        for record in own:
            if record["kept"] % 2:
                record["subject_id"] = f"p{record['kept'] // 4}"  # two studies of each patient
    path.write_text(json.dumps(content))
    for fold in folded(monkeypatch, path, tmp_path / "out", "--folds", "4"):
        found = [{int(study.id[1:]) // 4 for study in fold.splits[split]} for split in SPLITS]
        assert all(found) and sum(map(len, found)) == 10


def test_a_study_of_two_patients_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json", study_id="one")
    content = json.loads(path.read_text())
    for split, own in content.items():
        for record in own:
            record["subject_id"] = split
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="study_id 'one' has two subject_ids"):
        folded(monkeypatch, path, tmp_path / "out")


def test_folds_have_as_many_records_each_though_patients_differ():
    patients = [[f"p{number}r{record}" for record in range(1 + number % 7)] for number in range(100)]
    total = sum(map(len, patients))
    sizes = [sum(map(len, own)) for own in make_folds.deal(patients, 5, 0)]
    assert sum(sizes) == total and all(abs(size - total / 5) <= 7 for size in sizes)


def test_the_share_of_validation_is_as_asked(tmp_path, monkeypatch):
    for fold in folded(monkeypatch, write(tmp_path / "a.json"), tmp_path / "out", "--folds", "4", "--val_share", "0.3"):
        assert [len(fold.splits[split]) for split in SPLITS] == [18, 12, 10]


def test_what_the_folds_were_made_from_stands_beside_them(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    folded(monkeypatch, path, tmp_path / "out", "--folds", "3", "--seed", "5")
    assert json.loads((tmp_path / "out" / "folds.json").read_text()) == {
        "annotation_sha256": read_annotation(path).sha256,
        "folds": 3,
        "val_share": 0.1,
        "seed": 5,
    }


def test_an_interrupted_one_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(path, *_):
        if "fold2" in str(path):
            raise KeyboardInterrupt
        write_private(path, "{}")

    monkeypatch.setattr(make_folds, "_write", interrupt)
    path = write(tmp_path / "a.json")
    with pytest.raises(KeyboardInterrupt):
        folded(monkeypatch, path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_very_unequal_folds_are_told(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.json", 10)
    content = json.loads(path.read_text())
    folded(monkeypatch, path, tmp_path / "even", "--folds", "3")
    assert not capsys.readouterr().err
    for own in content.values():
        for record in own:
            record["subject_id"] = f"p{max(record['kept'] - 7, 0)}"  # p0 has eight of the ten records
    path.write_text(json.dumps(content))
    folded(monkeypatch, path, tmp_path / "out", "--folds", "3")
    line = capsys.readouterr().err
    assert line.startswith("warning: the folds are very unequal, with 1 to 8 train records") and line.count("\n") == 1


def test_an_annotation_without_records_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="a.json: holds no records"):
        folded(monkeypatch, write(tmp_path / "a.json", 0), tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "fields", "part"),
    [
        (["--folds", "1"], {}, "--folds 1: must be at least 2"),
        (["--folds", "2", "--val_share", "0.5"], {}, "--val_share 0.5: .* below 0.5 with --folds 2"),
        (["--val_share", "nan"], {}, "--val_share nan"),
        (["--seed", "-1"], {}, "--seed -1"),
        (["--folds", "100000000000"], {}, "--folds 100000000000: there are 40 patients"),
        (["--folds", "3"], {"subject_id": "p"}, "--folds 3: there are 1 patients"),
        (
            ["--folds", "2", "--val_share", "0.499"],
            {},
            "fold 1 would have no train records; there are 40, of 40 patients",
        ),
        (["--val_share", "0.01"], {}, "fold 1 would have no val records"),
        ([], {"neg_report": "x", "neg_image_path": "y.png"}, r"carry negatives \(neg_report\)"),
    ],
)
def test_wrong_input_gets_one_line_and_nothing_is_written(tmp_path, monkeypatch, flags, fields, part):
    with pytest.raises(InputError, match=part) as error:
        folded(monkeypatch, write(tmp_path / "a.json", **fields), tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    folded(monkeypatch, path, tmp_path / "out")
    with pytest.raises(InputError, match="is not empty"):
        folded(monkeypatch, path, tmp_path / "out")
