"""Validation on fewer epochs and batches."""

import json

import pytest


@pytest.mark.thorough
def test_validation_on_the_first_batches_of_every_second_epoch(train, capsys):
    folder = train("--epochs", 3, "--eval_every", 2, "--eval_batches", 1, "--batch_size", 1)
    rows = json.loads((folder / "history.json").read_text())
    assert ["val_BLEU_4" in row for row in rows] == [True, False, True]
    assert "validation  nll" in (folder / "train.log").read_text()
    everything = json.loads((train("--epochs", 3, "--batch_size", 1) / "history.json").read_text())
    # In between the likelihood alone, of the same batches; --eval_every does not change what it is.
    each = json.loads((train("--epochs", 3, "--eval_batches", 1, "--batch_size", 1) / "history.json").read_text())
    assert [row["val_nll"] for row in rows] == [row["val_nll"] for row in each]
    assert rows[0]["train_nll"] == everything[0]["train_nll"] and rows[0]["val_nll"] != everything[0]["val_nll"]
    assert rows[2]["train_nll"] == everything[2]["train_nll"]  # validation draws nothing of training's
