"""Records that other people's scripts can read, that no second run destroys, and that only their owner can open."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.records import append_record, private_folder, write_private, write_report_tables, write_results

REPOSITORY = Path(__file__).resolve().parents[2]
VAL = {"BLEU_1": 0.5, "BLEU_4": 0.125, "METEOR": None}
TEST = {"BLEU_1": 0.4, "BLEU_4": 0.0625, "METEOR": None}


def mode(path):
    return os.stat(path).st_mode & 0o777


@pytest.fixture(autouse=True)
def open_umask():
    """The modes must come from the code, not from a careful user's umask."""
    previous = os.umask(0)
    yield
    os.umask(previous)


def test_new_folders_are_the_owners_alone_and_old_ones_stay_as_they_are(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o775)
    private_folder(shared / "results" / "iu")
    assert [mode(shared), mode(shared / "results"), mode(shared / "results" / "iu")] == [0o775, 0o700, 0o700]
    private_folder(shared)
    assert mode(shared) == 0o775


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*cannot be made: File exists"):
        private_folder(tmp_path / "file" / "results")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_private(path, "old")
    assert mode(path) == 0o600

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="results.json.*No space left"):
        write_private(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_results_are_json_for_every_reader(tmp_path):
    path = tmp_path / "run" / "results.json"
    write_results(
        path,
        {
            "BLEU_4": np.float32(0.5),
            "METEOR": None,
            "nll": math.nan,
            "lr": [math.inf, 1e-9],
            "epoch": 3,
            "resumed": True,
            "folder": tmp_path,
            "text": "né \ud800",
        },
    )

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found == {
        "BLEU_4": 0.5,
        "METEOR": None,
        "nll": None,
        "lr": [None, 1e-9],
        "epoch": 3,
        "resumed": True,
        "folder": str(tmp_path),
        "text": "né ?",
    }


def test_report_tables_come_back_row_by_row_as_r2gens_scripts_read_them(tmp_path):
    generated = ['a "quoted" report , with commas', "two\nlines", "", "plain"]
    references = ["one", "two", "three", "four"]
    write_report_tables(tmp_path / "run", generated, references)
    for name, reports in (("res.csv", generated), ("gts.csv", references)):
        table = pd.read_csv(tmp_path / "run" / name, header=None, keep_default_na=False)
        assert table[0].tolist() == reports
        assert mode(tmp_path / "run" / name) == 0o600


def test_a_run_is_one_row_with_r2gens_columns(tmp_path):
    folder = tmp_path / "records"
    path = append_record(folder, "iu_xray", epoch=7, seed=9233, val=VAL, test=TEST, extra={"exp_name": "a"})
    assert path == folder / "iu_xray.csv"
    append_record(folder, "iu_xray", epoch=9, seed=1, val=VAL, test=TEST)
    with open(path, newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == [
        "epoch",
        "val_BLEU_1",
        "val_BLEU_4",
        "val_METEOR",
        "test_BLEU_1",
        "test_BLEU_4",
        "test_METEOR",
        "time",
        "seed",
        "best_model_from",
        "exp_name",
    ]
    assert (first["epoch"], first["seed"], first["test_BLEU_4"], first["val_METEOR"]) == ("7", "9233", "0.0625", "")
    assert (second["epoch"], second["exp_name"], second["best_model_from"]) == ("9", "", "val")


def test_r2gens_own_record_is_continued_not_lost(tmp_path):
    path = tmp_path / "mimic_cxr.csv"
    path.write_text('epoch,test_BLEU_4,best_model_from,note\n30,0.103,test,"kept, as it was"\n')
    append_record(tmp_path, "mimic_cxr", epoch=5, seed=1, val=VAL, test=TEST)
    table = pd.read_csv(path)
    assert table["note"].tolist()[0] == "kept, as it was"
    assert table["test_BLEU_4"].tolist() == [0.103, 0.0625]
    assert table["best_model_from"].tolist() == ["test", "val"]


def test_runs_that_end_at_the_same_moment_both_leave_their_row(tmp_path):
    program = (
        "import sys\nfrom modules.runtime.records import append_record\n"
        "for i in range(25):\n"
        "    append_record(sys.argv[1], 'demo', epoch=i, seed=int(sys.argv[2]), val={}, test={})"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(seed)], cwd=REPOSITORY) for seed in range(4)
    ]
    assert [run.wait() for run in runs] == [0] * 4
    assert len(pd.read_csv(tmp_path / "demo.csv")) == 100


@pytest.mark.parametrize("failure", [InputError("wrong"), KeyboardInterrupt(), RuntimeError("a bug"), 2, None, 0])
def test_a_program_that_fails_leaves_no_empty_folders(failure, tmp_path):
    (tmp_path / "earlier").mkdir()

    def main():
        for name in ("earlier", "earlier/new", "a/b/c", "full/deep"):
            private_folder(tmp_path / name)
        write_private(tmp_path / "full" / "x", "content")
        if isinstance(failure, BaseException):
            raise failure
        return failure

    with pytest.raises((SystemExit, RuntimeError)):
        run_entry_point(main)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    everything = {"earlier", "earlier/new", "a", "a/b", "a/b/c", "full", "full/deep", "full/x"}
    assert left == (everything if not failure else {"earlier", "full", "full/x"})
