"""A small table, data set and results for the tests of run_experiments.py."""

import dataclasses
import hashlib
import json
from pathlib import Path

from modules.flags import parse_flags, resolve_config
from scripts.experiments.files import choose, read_datasets, read_table
from scripts.experiments.plan import plan

MODELS = ("r2gen", "r2gencmn", "xpronet")
CSV = """name,label,flags,seeds,baseline,BLEU_4
base,Base_1,--ithn off,1 2,,
ithn,"+ ITHN","--ithn on --strategy ithn",1 2,base,0.5
gpt,GPT,--model_name gpt,1,,
"""


def write_files(folder):
    """A table, a data set called tiny whose annotation is any file, and an empty output folder."""
    (folder / "rows.csv").write_text(CSV)
    (folder / "annotation.json").write_text("{}")
    (folder / "datasets.json").write_text(
        json.dumps(
            {
                "tiny": {"title": "tiny data", "flags": f"--ann_path {folder / 'annotation.json'} --epochs 2"},
                "iu_xray": {"title": "IU X-Ray"},
            }
        )
    )
    return folder


def planned(files, overrides=()):
    table = choose(read_table(files / "rows.csv"), dataset="tiny", seeds=())
    return plan(
        table,
        read_datasets(files / "datasets.json"),
        files / "out",
        overrides=overrides,
        text_encoder="",
        models=MODELS,
    )


def by_name(runs):
    return {run.name: run for run in runs}


def finish(run, score=0.1, folder=None, checkpoint_sha256="", **config):
    """Leave in the run's folder what main_train.py would."""
    folder = folder or run.folder
    folder.mkdir(parents=True, exist_ok=True)
    given, _ = parse_flags(run.flags, "", "")
    resolved = dataclasses.asdict(resolve_config(given)) | config
    sha256 = hashlib.sha256(Path(resolved["ann_path"]).read_bytes()).hexdigest()
    floor = {"BLEU_4": 0.02}
    (folder / "results.json").write_text(
        json.dumps(
            {
                "test": {"model": {"BLEU_4": score, "METEOR": None}, "nearest training image": floor},
                "config": resolved,
                "variety": {"model": {"diversity": 0.5}},
                "provenance": {"annotation_sha256": sha256, "checkpoint_sha256": checkpoint_sha256},
                "synthetic": True,
            }
        )
    )
    (folder / "model_best.pth").touch()
