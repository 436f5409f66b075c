"""A tiny synthetic data set, drawn once per test run, and the settings of the smallest network that trains on it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# No time limit on a busy machine, and the same examples in every run.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

TINY = (
    "--visual_extractor resnet18 --visual_extractor_pretrained false --image_size 32 --d_model 16 --d_ff 16 "
    "--num_heads 2 --num_layers 1 --cmm_size 16 --cmm_dim 16 --topk 4 --embedding_dim 8 --batch_size 8 "
    "--max_seq_length 24 --beam_size 2 --num_workers 0 --tensorboard false --meteor false --lr_ed 1e-3"
).split()


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder with annotation.json and images/ of 20 synthetic studies, two views each."""
    from scripts.synthetic.dataset import draw_images, plan_studies, prepare_folder, write_tables

    folder = tmp_path_factory.mktemp("demo")
    studies = plan_studies(seed=3, number=20, normal_fraction=0.4, findings=None, reports=None)
    prepare_folder(folder)
    for _ in draw_images(folder, studies, seed=3, size=64, workers=1):
        pass
    write_tables(folder, studies, "drawn for a test")
    return folder


@pytest.fixture(scope="session")
def demo_index(demo):
    """Hard-negative index of the tiny data set, mined with tf-idf through the script's own parts."""
    from modules.data.annotations import read_annotation
    from scripts.mine_hard_negatives import build_parser, mine

    path = demo / "negatives.safetensors"
    arguments = build_parser().parse_args(
        [
            "--ann_path",
            str(demo / "annotation.json"),
            "--out",
            str(path),
            "--text_encoder",
            "tfidf",
            "--top_k",
            "3",
            "--device",
            "cpu",
        ]
    )
    mine(arguments, read_annotation(demo / "annotation.json")).save(path)
    return path


@pytest.fixture(scope="session")
def demo_labels(demo):
    """CSV file with the 14 labels of every study of the tiny data set, by scripts/label_reports.py."""
    path = demo / "report_labels.csv"  # labels.csv has what was drawn
    script = Path(__file__).parent.parent / "scripts" / "label_reports.py"
    subprocess.run([sys.executable, script, demo / "annotation.json", "--out", path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """Results folder of a model of two views, trained on the tiny data set for an epoch."""
    from modules.flags import parse_flags
    from modules.run.training import run_training

    folder = tmp_path_factory.mktemp("trained")
    given, ignored = parse_flags(
        [
            "--ann_path",
            str(demo / "annotation.json"),
            "--image_dir",
            str(demo / "images"),
            "--epochs",
            "1",
            "--save_dir",
            str(folder / "run"),
            "--record_dir",
            str(folder / "records"),
            *TINY,
        ],
        "main_train.py",
        "",
    )
    run_training(given, ignored)
    return folder / "run"


@pytest.fixture
def train(demo, tmp_path, monkeypatch):
    """``train("--flag", value, ...)`` runs main_train.py's work on the tiny data set; returns the results folder.

    Its curves are not drawn, a quarter of the time of so small a training; ``trained`` draws them.
    """
    from modules.flags import parse_flags
    from modules.run import training
    from modules.run.training import run_training

    monkeypatch.setattr(training, "training_curves", lambda history: b"no curves")

    def run(*flags):
        argv = [
            "--ann_path",
            demo / "annotation.json",
            "--image_dir",
            demo / "images",
            "--epochs",
            1,
            "--save_dir",
            tmp_path / "results",
            "--record_dir",
            tmp_path / "records",
            *TINY,
            *flags,
        ]
        given, ignored = parse_flags([str(part) for part in argv], "main_train.py", "")
        run_training(given, ignored)
        return type(tmp_path)(given["save_dir"])

    return run
