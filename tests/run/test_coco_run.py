"""The main job on captions: mine, train, test; with images and with detection features; what it leaves to read."""

import csv
import json
import shutil

import pytest

from modules.config import Config
from modules.evaluation.report_statistics import load_statistics
from modules.flags import parse_flags
from modules.run.predictor import load_predictor
from modules.run.testing import run_testing
from modules.run.training import run_training
from modules.runtime.errors import InputError
from scripts.check_data import check
from tests.coco_support import coco_records, make_coco, make_detections, make_labels
from tests.conftest import TINY
from tests.evaluation.test_coco_scores import coco_evaluation

MODELS = {
    "r2gencmn": "",
    "r2gen": "--rm_d_model 16 --rm_num_heads 2",
    "visualgpt": "--gpt2_layers 1 --gpt2_positions 24",
    "xpronet": "--num_cluster 14 --num_protype 2 --d_img_ebd 8 --d_txt_ebd 8 --init_protypes_path=",
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The tiny data set with its detections and a hard-negative index."""
    from modules.data.annotations import read_annotation
    from modules.data.captions import split_captions
    from scripts.mine_hard_negatives import build_parser, mine

    folder = make_coco(tmp_path_factory.mktemp("coco"))
    make_detections(folder / "detections.hdf5")
    arguments = build_parser().parse_args(
        [
            "--ann_path",
            str(folder / "annotation.json"),
            "--dataset_name",
            "coco",
            "--out",
            str(folder / "index.safetensors"),
            "--text_encoder",
            "tfidf",
            "--device",
            "cpu",
        ]
    )
    mine(arguments, split_captions(read_annotation(folder / "annotation.json"))).save(arguments.out)
    return folder


@pytest.fixture
def train(coco, tmp_path):
    def run(*flags):
        argv = [
            "--dataset_name",
            "coco",
            "--ann_path",
            coco / "annotation.json",
            "--image_dir",
            coco / "images",
            "--epochs",
            1,
            "--save_dir",
            tmp_path / "results",
            "--record_dir",
            tmp_path / "records",
            *TINY,
            *flags,
        ]
        run_training(*parse_flags([str(part) for part in argv], "main_train.py", ""))
        return tmp_path / "results"

    return run


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


@pytest.mark.thorough
def test_captions_are_samples_and_references(train, coco, tmp_path, monkeypatch):
    folder = train(
        "--negative_index", coco / "index.safetensors", "--mask_identical", "true", "--monitor_metric", "CIDEr"
    )
    results = json.loads((folder / "results.json").read_text())
    assert "40 training, 3 validation and 4 test samples" in (folder / "train.log").read_text()
    assert results["tokenisation"].startswith("Penn Treebank")
    model = results["test"]["model"]
    assert not [name for name in model if "_full" in name or "ce_" in name]
    assert set(results["test"]) == {"model", "commonest training report", "nearest training image"}
    # A caption that an image of the same kind has is among the references, whatever is said first.
    assert results["test"]["nearest training image"]["BLEU_1"] > 0.8
    numbers = {name: value for name, value in model.items() if name != "METEOR"}
    assert set(numbers) == set(results["intervals"]["model"]) - {"diversity"}
    again = load_statistics(folder / "statistics.npz")["model"].scores()
    assert {name: again[name] for name in numbers} == pytest.approx(numbers, abs=1e-9)
    _check_files(folder, model, tmp_path, monkeypatch)


def _check_files(folder, model, tmp_path, monkeypatch):
    truth = coco_records()["test"]
    gts = rows(folder / "gts.csv")
    assert gts == [[*record["captions"], *[""] * (5 - len(record["captions"]))] for record in truth]
    generated = json.loads((folder / "exports" / "captions.json").read_text())
    assert [row["image_id"] for row in generated] == [record["id"] for record in truth]
    assert [[row["caption"]] for row in generated] == rows(folder / "res.csv")
    if shutil.which("java"):
        captions = {record["id"]: record["captions"] for record in truth}
        official = coco_evaluation(
            captions,
            {row["image_id"]: row["caption"] for row in generated},
            tmp_path,
            monkeypatch,
            left_out=("SPICE", "METEOR"),
        )
        assert {name: model[name] for name in official} == pytest.approx(official, abs=1e-9)
    page = (folder / "report.html").read_text()
    assert "Penn Treebank" in page and "of 5 captions generated" in page and "isn&#39;t it?" in page
    assert "cut to the maximum length" not in page
    log = (folder / "train.log").read_text()
    assert not any(caption in log for record in truth for caption in record["captions"])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "strategy"), [("r2gencmn", "ithn"), ("r2gen", "off"), ("xpronet", "ithn"), ("visualgpt", "mochi")]
)
def test_detections_take_the_place_of_images_in_every_backbone(train, coco, tmp_path, model, strategy):
    ithn = (
        ["--ithn", "off"]
        if strategy == "off"
        else ["--strategy", strategy, "--num_neighbours", 3, "--negative_index", coco / "index.safetensors"]
    )
    labels = make_labels(tmp_path / "labels.csv")  # by image, of which the captions have theirs; read by XProNet alone
    folder = train(
        "--model_name",
        model,
        *MODELS[model].split(),
        *ithn,
        "--label_path",
        labels,
        "--detection_features",
        coco / "detections.hdf5",
        "--max_detections",
        3,
        "--num_workers",
        2,
        "--image_dir",
        tmp_path / "no_images",
        "--collapse_repeats",
        "true",
        "--use_bn",
        1,
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["test"]["model"]["BLEU_1"] >= 0 and "repeated words collapsed" in results["tokenisation"]
    if model == "r2gencmn" and strategy == "ithn":
        before = results["test"]
        run_testing(*parse_flags(["--load", str(folder / "model_best.pth")], "main_test.py", ""))
        assert json.loads((folder / "results.json").read_text())["test"] == before
        with pytest.raises(InputError, match="trained with --detection_features, which a new image does not have"):
            load_predictor(str(folder / "model_best.pth"), {})


def test_features_of_a_frozen_extractor_are_stored_once_per_image(train, tmp_path):
    train("--freeze_visual_extractor", "true", "--feature_cache", tmp_path / "cache", "--floors", "false")
    (stored,) = (tmp_path / "cache").iterdir()
    assert stored.stat().st_size == pytest.approx(17 * 512 * 4, abs=200)  # 17 images of one patch, not 40 captions


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--detection_features", "nowhere.hdf5"], "--detection_features nowhere.hdf5: cannot be read: no such file"),
        (["--detection_features", "README.md"], "--detection_features README.md: cannot be read"),
        (["--detection_features", "x.hdf5", "--views", "separate"], "one set of features per record"),
        (
            ["--detection_features", "x.hdf5", "--freeze_visual_extractor", "true", "--feature_cache", "x"],
            "--feature_cache: with --detection_features no image",
        ),
        (["--radgraph_path", "x"], "--radgraph_path: scores radiology reports"),
        (["--radeval", "rouge"], "--radeval: scores radiology reports"),
        (["--monitor_metric", "ce_rule_f1_micro_14_uncertain_negative"], "a radiology data set"),
    ],
)
def test_mistakes_get_one_line(train, flags, part):
    with pytest.raises(InputError) as error:
        train(*flags)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_an_index_of_reports_is_refused(train, coco, tmp_path):
    """Mined without --dataset_name coco it has a row for every image, not for every caption."""
    from modules.data.annotations import read_annotation
    from scripts.mine_hard_negatives import build_parser, mine

    arguments = build_parser().parse_args(
        [
            "--ann_path",
            str(coco / "annotation.json"),
            "--out",
            str(tmp_path / "reports.safetensors"),
            "--text_encoder",
            "tfidf",
        ]
    )
    mine(arguments, read_annotation(coco / "annotation.json")).save(arguments.out)
    with pytest.raises(InputError, match="mined from other training reports"):
        train("--negative_index", tmp_path / "reports.safetensors")


def test_an_image_without_detections_is_named_before_training(train, coco, tmp_path):
    make_detections(tmp_path / "some.hdf5", leave_out=(113,))
    with pytest.raises(InputError, match="split 'val', study '113': .*has no '113_features'"):
        train("--detection_features", tmp_path / "some.hdf5")
    config = Config(
        dataset_name="coco",
        ann_path=str(coco / "annotation.json"),
        threshold=1,
        negative_index=str(coco / "index.safetensors"),
        detection_features=str(tmp_path / "some.hdf5"),
    )
    found = check(config, hashed=False)  # of scripts/check_data.py
    assert ["'113_features'" in problem.message for problem in found.problems] == [True]
    assert found.statistics["detections"]["images"] == 16 and found.statistics["index"]["studies"] == 40
