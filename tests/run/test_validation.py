"""Validation on fewer epochs and batches."""

import json


def test_validation_on_the_first_batches_of_every_second_epoch(train, capsys):
    folder = train("--epochs", 3, "--eval_every", 2, "--eval_batches", 1, "--batch_size", 1)
    rows = json.loads((folder / "history.json").read_text())
    assert ["val_nll" in row for row in rows] == [True, False, True]
    everything = json.loads((train("--epochs", 3, "--batch_size", 1) / "history.json").read_text())
    assert rows[0]["train_nll"] == everything[0]["train_nll"] and rows[0]["val_nll"] != everything[0]["val_nll"]
    assert rows[2]["train_nll"] == everything[2]["train_nll"]  # validation draws nothing of training's
