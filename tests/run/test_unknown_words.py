"""A model that writes <unk> does not look good: its share is told, and no epoch is chosen for it."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch

from modules.config import Config
from modules.data.tokenizers import UNKNOWN
from modules.evaluation.tester import Predictions
from modules.flags import parse_flags
from modules.run.scoring import Scoring
from modules.run.testing import run_testing

REFERENCES = ["<unk> <unk> <unk> <unk> heart .", "<unk> <unk> <unk> <unk> lungs ."]


def validated(generated, monitored="BLEU_4"):
    with Scoring(Config(meteor=False, monitor_metric=monitored), torch.device("cpu")) as scoring:
        return scoring.validation(Predictions(generated=generated, references=REFERENCES))


def test_an_epoch_that_writes_unknown_words_is_judged_without_their_hits(caplog):
    with caplog.at_level(logging.WARNING, logger="ithn"):
        scores = validated(["<unk> <unk> <unk> <unk> .", "<unk> <unk> <unk> <unk> ."])
    assert scores["BLEU_4"] > 0.3 and 0 <= scores["selection"] < 0.01
    assert "80.0 % of the generated words are <unk>" in caplog.text and "--suppress_unk" in caplog.text
    assert validated(["<unk> . . . .", "heart"], "BLEU_1")["selection"] == pytest.approx(
        validated(["nothing . . . .", "heart"], "BLEU_1")["BLEU_1"]
    )
    assert "selection" not in validated(["the heart .", "lungs ."])


@pytest.mark.thorough
def test_from_training_to_the_page_and_without_them(train, demo, tmp_path):
    # So high a threshold leaves hardly another word.
    folder = train("--threshold", 40, "--suppress_unk", "false", "--lr_ed", 3e-2, "--lr_ve", 0, "--epochs", 3)
    results = json.loads((folder / "results.json").read_text())
    share = results["variety"]["model"]["unk_share"]
    assert share >= 0.5 and results["variety"]["references"]["unk_share"] >= 0.5
    [line] = [line for line in results["warnings"] if "references' words" in line]
    assert "--suppress_unk" in line and "--threshold" in line
    page, log = (folder / "report.html").read_text(), (folder / "train.log").read_text()
    assert line.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in page and line in log
    assert f"<unk> are {100 * share:.1f} % of the generated words" in log
    # The suppression is part of decoding: the same weights write no <unk>.
    argv = ["--load", folder / "model_best.pth", "--suppress_unk", "true", "--save_dir", tmp_path / "again"]
    run_testing(*parse_flags(list(map(str, argv)), "main_test.py", ""))
    with open(tmp_path / "again" / "res.csv", newline="") as file:
        assert not any(UNKNOWN in row[0].split() for row in csv.reader(file) if row)
    assert json.loads((tmp_path / "again" / "results.json").read_text())["variety"]["model"]["unk_share"] == 0


def test_suppression_is_the_default_of_training_and_not_of_published_checkpoints(monkeypatch):
    assert Config().suppress_unk

    class Reached(Exception):
        pass

    def resolve(given, settings):
        raise Reached(given.get("suppress_unk"))

    monkeypatch.setattr("modules.run.testing.load_trained", lambda path: ({"state_dict": {}}, Path(path)))
    monkeypatch.setattr("modules.run.testing.resolve_config", resolve)
    for given, expected in (({}, False), ({"suppress_unk": True}, True)):
        with pytest.raises(Reached, match=str(expected)):
            run_testing({"load": "published.pth", **given}, [])
