"""Exports as the scripts that take them read them."""

import json
import os

import numpy as np
import pandas as pd

from modules.labels.labeler import CLASSES, label_reports
from modules.pages.exports import write_exports, write_labelled

IDS = ["50051329", "7"]
GENERATED = ['no "focal" opacity , heart normal .', ""]
REFERENCES = ["Heart size is normal.\nNo effusion.", "Mild edema, né."]


def test_every_form_brings_all_reports_back(tmp_path):
    write_exports(tmp_path / "exports", IDS, GENERATED, REFERENCES)
    folder = tmp_path / "exports"
    assert all(os.stat(folder / name).st_mode & 0o777 == 0o600 for name in os.listdir(folder))
    for name, reports in (("predicted_reports.csv", GENERATED), ("gt_reports.csv", REFERENCES)):
        table = pd.read_csv(folder / name, dtype={"study_id": str}, keep_default_na=False)
        assert list(table.columns) == ["study_id", "report"]
        assert table["study_id"].tolist() == IDS and table["report"].tolist() == reports
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("reports", "rexrank", "captions")}
    assert read["reports"] == [
        {"id": key, "report": report, "reference": reference}
        for key, report, reference in zip(IDS, GENERATED, REFERENCES, strict=True)
    ]
    assert [
        (key, entry["model_prediction"], entry["section_findings"], entry["section_impression"])
        for key, entry in read["rexrank"].items()
    ] == [*zip(IDS, GENERATED, REFERENCES, [""] * 2, strict=True)]  # ReXrank spells None out: "Impression: None"
    assert read["captions"] == [
        {"image_id": int(key), "caption": report} for key, report in zip(IDS, GENERATED, strict=True)
    ]


def test_labelled_files_give_the_labels_as_r2gens_script_takes_them(tmp_path):
    labels = label_reports(REFERENCES)
    write_labelled(tmp_path, GENERATED, REFERENCES, label_reports(GENERATED), labels)
    table = pd.read_csv(tmp_path / "gts_labeled.csv")
    names = table.columns[1:].tolist()  # the first column is the report
    assert names == list(CLASSES)
    assert np.array_equal(table[names].fillna(0).to_numpy() == 1, labels == 1)
    assert table.loc[1, "Edema"] == 1 and pd.isna(table.loc[1, "Fracture"]) and table.loc[0, "Pleural Effusion"] == 0
    assert len(pd.read_csv(tmp_path / "res_labeled.csv")) == 2
