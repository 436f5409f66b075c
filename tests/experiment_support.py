"""A small table, data set and results for the tests of run_experiments.py."""

import dataclasses
import hashlib
import json
from pathlib import Path

from modules.flags import parse_flags, resolve_config
from scripts.experiments.files import choose, read_datasets, read_table
from scripts.experiments.plan import plan

BASE = {"name": "base", "label": "Base_1", "flags": "--ithn off"}
ITHN = {"name": "ithn", "label": "+ ITHN", "flags": "--ithn on --strategy ithn", "baseline": "base"}
TABLE = {"seeds": [1, 2], "columns": ["BLEU_4"], "rows": [BASE, ITHN | {"published": {"BLEU_4": 0.5}}]}


def write_table(folder, rows=None, **others):
    """rows.json with these rows (names and flags, or whole entries)."""
    rows = [{"name": row, "flags": flags} for row, flags in rows.items()] if isinstance(rows, dict) else rows
    (folder / "rows.json").write_text(json.dumps(TABLE | ({"rows": rows} if rows else {}) | others))


def write_files(folder):
    """A table, and a data set called tiny whose annotation is any file."""
    write_table(folder)
    (folder / "annotation.json").write_text("{}")
    tiny = {"title": "tiny data", "flags": f"--ann_path {folder / 'annotation.json'} --epochs 2"}
    (folder / "datasets.json").write_text(json.dumps({"tiny": tiny, "iu_xray": {"title": "IU X-Ray"}}))
    return folder


def planned(files, overrides=()):
    table = choose(read_table(files / "rows.json"), dataset="tiny")
    return plan(table, read_datasets(files / "datasets.json"), files / "out", overrides=overrides)


def by_name(runs):
    return {run.name: run for run in runs}


def finish(run, score=0.1, checkpoint_sha256="", **config):
    """Leave in the run's folder what main_train.py would."""
    run.folder.mkdir(parents=True, exist_ok=True)
    given, _ = parse_flags(run.flags, "", "")
    resolved = dataclasses.asdict(resolve_config(given)) | config
    sha256 = hashlib.sha256(Path(resolved["ann_path"]).read_bytes()).hexdigest()
    results = {
        "test": {"model": {"BLEU_4": score, "METEOR": None}, "nearest training image": {"BLEU_4": 0.02}},
        "config": resolved,
        "variety": {"model": {"diversity": 0.5}},
        "provenance": {"annotation_sha256": sha256, "checkpoint_sha256": checkpoint_sha256},
        "synthetic": True,
    }
    (run.folder / "results.json").write_text(json.dumps(results))
    (run.folder / "model_best.pth").touch()
