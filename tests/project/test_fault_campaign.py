"""The campaign of faults, in small: its trials really disturb, and a promise that is broken is counted as broken."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fault_campaign import NUMBERS, TITLES, faults, table
from benchmarks.fault_readers import _distorted, _scrambled
from benchmarks.fault_runs import same
from benchmarks.fault_trials import Trial

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.thorough
def test_a_small_campaign(tmp_path):
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "fault_campaign.py",
            "--share",
            "0.002",
            "--out",
            out,
            "--only",
            "kills_in_writes",
            "bit_flips",
            "random_batches",
            "annotations",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["fault"]: row for row in json.loads(out.read_text())["faults"]}
    assert len(rows) == 4 and all(row["survived"] == row["trials"] > 0 for row in rows.values())
    killed = rows[TITLES["kills_in_writes"]]
    assert killed["identical"] == killed["resumed"] == 1
    assert "| 1 of 1 |" in done.stdout


def test_every_fault_has_a_number_a_title_and_trials():
    assert NUMBERS.keys() == TITLES.keys() == faults().keys()
    assert NUMBERS["kills"] + NUMBERS["kills_in_writes"] >= 100 and NUMBERS["kills_in_writes"] >= 30


def test_a_difference_of_one_bit_is_seen():
    import torch

    one = {"weights": torch.tensor([1.0, 2.0]), "history": [{"loss": 0.5, "seconds": 1.0}]}
    other = {"weights": torch.tensor([1.0, 2.0]), "history": [{"loss": 0.5, "seconds": 9.0}]}
    assert same(one, other)
    assert not same(one, other | {"weights": torch.tensor([1.0, 2.0000002])})
    assert not same(one, other | {"history": [{"loss": 0.5000001, "seconds": 1.0}]})
    assert not same(one, {"weights": one["weights"]})


def test_what_did_not_survive_stands_in_the_table():
    from benchmarks import fault_campaign

    trials = [Trial(True, lost=1, identical=True), Trial(False, lost=3, identical=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fault_campaign, "faults", lambda: {"kills": lambda *_: iter(trials)})
        row = fault_campaign.run("kills", 2, None, random.Random(0))
    assert (row["trials"], row["survived"], row["identical"], row["lost_mean"]) == (2, 1, 1, 2)
    assert "| 2 | 1 | 2.0 (3) | 1 of 2 |" in table([row])


def test_damage_damages():
    rng = random.Random(0)
    content = bytes(range(256)) * 4
    assert sum(_scrambled(content, rng) != content for _ in range(50)) > 45
    value = {"train": [{"id": "a", "report": "b"}]}
    assert sum(_distorted(value, rng) != value for _ in range(50)) > 45
