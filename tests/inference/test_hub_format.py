"""scripts/export.py and scripts/convert_checkpoint.py: what goes out comes back the same, and nothing else goes out."""

import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from modules.config import EXPORTED
from modules.data.dataset_specs import data_title
from modules.inference.hub_format import published_weights, read_hub_folder, same_weights
from modules.inference.model_card import CardFacts, model_card
from modules.inference.study_files import require_model
from modules.run.loading import load_trained
from modules.run.testing import run_testing
from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from scripts import convert_checkpoint, export
from tests.golden_support import GOLDEN_DIR
from tests.models.test_golden import Reference


def run(program, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    program.main()


@pytest.fixture(scope="module")
def trained(demo, demo_index, tmp_path_factory):
    """Results folder of one epoch of R2GenCMN with ITHN on the tiny data set."""
    from modules.flags import parse_flags
    from modules.run.training import run_training
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("trained")
    argv = [
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--epochs",
        1,
        "--save_dir",
        folder,
        "--record_dir",
        folder / "records",
        "--negative_index",
        demo_index,
        "--device",
        "cpu",
        *TINY,
    ]
    run_training(*parse_flags([str(part) for part in argv], "main_train.py", ""))
    return folder


@pytest.mark.thorough
def test_to_the_hubs_layout_and_back(trained, tmp_path, monkeypatch, demo):
    flags = ("--licence", "mit", "--dataset", "Own & Sons", "--language", "de")
    run(export, monkeypatch, trained / "model_best.pth", "--out", tmp_path / "shared", *flags)
    files = {path.name for path in (tmp_path / "shared").iterdir()}
    assert files == {"model.safetensors", "config.json", "vocabulary.json", "README.md"}
    # No path of this machine, and nothing of the data but its words.
    text = "".join((tmp_path / "shared" / name).read_text() for name in ("config.json", "vocabulary.json", "README.md"))
    assert str(demo) not in text and str(trained) not in text and not re.search(r"SYN\d{4}", text)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "license: mit\n" in card and "synthetic" in card and "no medical device" in card
    assert "# r2gencmn on Own & Sons\n" in card and "language of the reports: de" in card
    results = json.loads((trained / "results.json").read_text())
    _require_scores(card, results)
    run(export, monkeypatch, tmp_path / "shared", "--out", tmp_path / "back.pth")
    first, last = load_checkpoint(trained / "model_best.pth"), load_checkpoint(tmp_path / "back.pth")
    assert same_weights(first["state_dict"], last["state_dict"]) and first["vocabulary"] == last["vocabulary"]
    image = next((demo / "images").rglob("0.png"))
    assert written_by(trained / "model_best.pth", image, monkeypatch, tmp_path) == written_by(
        tmp_path / "back.pth", image, monkeypatch, tmp_path
    )
    with pytest.raises(InputError, match="is there already"):
        run(export, monkeypatch, trained / "model_best.pth", "--out", tmp_path / "shared")


def _require_scores(card, results):
    """The card's table has the run's scores, intervals and baselines, and its header is the hub's model-index."""
    scores, (low, high) = results["test"], results["intervals"]["model"]["BLEU_1"]
    systems = ("model", "commonest training report", "nearest training image")
    own, common, nearest = (f"{scores[name]['BLEU_1']:.3f}" for name in systems)
    assert f"| BLEU-1 | {own} | {low:.3f} – {high:.3f} | {common} | {nearest} |" in card
    assert f"test split of {results['variety']['model']['num_reports']} reports" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["language"] == "de" and header["pipeline_tag"] == "image-to-text"
    [entry] = header["model-index"]
    assert entry["results"][0]["dataset"] == {"name": "Own & Sons", "type": "own___sons", "split": "test"}
    found = {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]}
    assert found["BLEU-1"] == round(scores["model"]["BLEU_1"], 4) and "Clinical F1, micro, 14 classes" in found


def test_a_data_set_is_called_by_its_own_name():
    assert data_title("iu_xray", "data/iu_xray/annotation.json", False) == "IU X-Ray"
    assert data_title("mimic_cxr", "/x/MIMIC-CXR/annotation.json", False) == "MIMIC-CXR"
    assert data_title("iu_xray", "data/own/annotation.json", False) == ""
    assert data_title("iu_xray", "data/iu_xray/annotation.json", True) == "synthetic radiographs"


def test_a_card_without_scores_says_so():
    content = {"config": {"model_name": "r2gen", "visual_extractor": "x", "dataset_name": "coco"}, "strategy": "off"}
    card = model_card(content | {"epoch": 3}, {}, CardFacts("COCO", data_licence="cc-by-4.0"))
    assert "licence of the data: cc-by-4.0" in card
    assert "No scores of this checkpoint" in card and "model-index" not in card and "captions of images" in card
    assert "language of the reports: not stated" in card and "language:" not in card.split("---")[1]


def test_a_folder_is_loaded_as_its_checkpoint(trained, demo, tmp_path, monkeypatch):
    """The same reports from predict.py, and the same scores from main_test.py."""
    shared = tmp_path / "shared"
    run(export, monkeypatch, trained / "model_best.pth", "--out", shared)
    image = next((demo / "images").rglob("0.png"))
    assert written_by(shared, image, monkeypatch, tmp_path) == written_by(
        trained / "model_best.pth", image, monkeypatch, tmp_path
    )
    data = {"ann_path": str(demo / "annotation.json"), "image_dir": str(demo / "images"), "device": "cpu"}
    data |= {"record_dir": str(tmp_path / "records"), "num_workers": 0, "meteor": False}
    run_testing(data | {"load": str(shared), "save_dir": str(tmp_path / "tested")}, [])
    results = [json.loads((folder / "results.json").read_text()) for folder in (trained, tmp_path / "tested")]
    assert results[0]["test"] == results[1]["test"] and results[0]["intervals"] == results[1]["intervals"]
    assert (trained / "res.csv").read_text() == (tmp_path / "tested/res.csv").read_text()
    assert results[1]["provenance"]["checkpoint_sha256"] == file_sha256(shared / "model.safetensors")
    assert "best epoch" not in (tmp_path / "tested/report.html").read_text()
    with pytest.raises(InputError, match="--save_dir is missing"):
        run_testing(data | {"load": str(shared)}, [])


def test_a_model_on_the_hub_is_asked_for_by_its_address_alone(trained, tmp_path, monkeypatch):
    shared, asked = tmp_path / "shared", []
    run(export, monkeypatch, trained / "model_best.pth", "--out", shared)

    def snapshot_download(name, **options):
        asked.append(name)
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("not here")
        return str(shared)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    content, weights = load_trained("hf://owner/name")
    assert weights == shared / "model.safetensors" and content["epoch"] == 1 and asked == ["owner/name"] * 2
    with pytest.raises(InputError, match="no such file"):
        load_trained("owner/name")  # may be a mistyped path: nobody is told of it
    assert len(asked) == 2
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="hf download owner/name --local-dir DIR"):
        load_trained("hf://owner/name")
    for path in ("hf://owner/name", str(shared), str(trained / "model_best.pth")):
        require_model(path)
    for path, error in ((tmp_path, "is a folder; give .*model_best.pth"), (tmp_path / "none", "no such file")):
        for read in (require_model, load_trained):
            with pytest.raises(InputError, match=error):
                read(str(path))


def written_by(checkpoint, image, monkeypatch, folder):
    from scripts import predict

    table = folder / "reports.csv"
    run(predict, monkeypatch, "--load", checkpoint, image, "--csv", table, "--quiet", "--device", "cpu")
    return table.read_text()


def test_a_wrong_folder_is_refused(trained, tmp_path, monkeypatch):
    run(export, monkeypatch, trained / "model_best.pth", "--out", tmp_path / "shared")
    settings = json.loads((tmp_path / "shared/config.json").read_text())
    for name, content, error in (
        ("config.json", "{}", "format is None"),
        ("config.json", "[]", "a JSON object"),
        ("vocabulary.json", "{", "cannot be read"),
        ("model.safetensors", "x", "damaged"),
        ("config.json", json.dumps(settings | {"d_model": 32, "cmm_dim": 32}), "shape"),
        ("config.json", json.dumps(settings | {"model_name": "x"}), "--model_name x"),
    ):
        shutil.copytree(tmp_path / "shared", tmp_path / "wrong", dirs_exist_ok=True)
        (tmp_path / "wrong" / name).write_text(content)
        with pytest.raises(InputError, match=error):
            run(export, monkeypatch, tmp_path / "wrong", "--out", tmp_path / "out.pth")
        assert not (tmp_path / "out.pth").exists()
    # Settings that are none of the model's cannot come in by this way: they would name files to read or write.
    (tmp_path / "shared/config.json").write_text(json.dumps(settings | {"save_dir": "/etc", "gpt2_path": "/etc"}))
    assert {"save_dir", "gpt2_path"}.isdisjoint(read_hub_folder(tmp_path / "shared", EXPORTED)["config"])


@pytest.mark.thorough
def test_to_a_published_checkpoint_and_back(trained, tmp_path, monkeypatch, demo):
    best = trained / "model_best.pth"
    run(convert_checkpoint, monkeypatch, best, "--to", "published", "--out", tmp_path / "r2gencmn.pth")
    published = torch.load(tmp_path / "r2gencmn.pth", weights_only=True)
    assert set(published) == {"epoch", "state_dict"}
    assert {name.split(".")[0] for name in published["state_dict"]} == {"visual_extractor", "encoder_decoder"}

    tiny = (
        "--visual_extractor resnet18 --image_size 32 --d_model 16 --d_ff 16 --num_heads 2 --num_layers 1 "
        "--cmm_size 16 --cmm_dim 16 --topk 4 --max_seq_length 24 --beam_size 2 --threshold 3"
    ).split()
    flags = ("--ann_path", demo / "annotation.json", "--image_dir", demo / "images", *tiny)

    def convert(source, *more, to="ours"):
        run(convert_checkpoint, monkeypatch, source, "--to", to, "--out", tmp_path / "ours.pth", *more)

    # As a run on several GPUs saves it.
    published["state_dict"] = {f"module.{name}": value for name, value in published["state_dict"].items()}
    torch.save(published, tmp_path / "wrapped.pth")
    convert(tmp_path / "wrapped.pth", *flags)
    ours, first = load_checkpoint(tmp_path / "ours.pth"), load_checkpoint(best)
    assert same_weights(ours["state_dict"], published_weights(first["state_dict"], heads=False))
    assert ours["vocabulary"] == first["vocabulary"]
    image = next((demo / "images").rglob("0.png"))
    assert written_by(tmp_path / "ours.pth", image, monkeypatch, tmp_path) == written_by(
        best, image, monkeypatch, tmp_path
    )
    with pytest.raises(InputError, match="ours.pth: is there already"):
        convert(tmp_path / "wrapped.pth", *flags)
    (tmp_path / "ours.pth").unlink()
    with pytest.raises(InputError, match="is a checkpoint of this project already"):
        convert(best, *flags)
    with pytest.raises(InputError, match="made for a vocabulary of"):
        convert(tmp_path / "r2gencmn.pth", *flags, "--threshold", 9)
    with pytest.raises(InputError, match="--threshold says .* with --to ours only"):
        convert(best, "--threshold", 9, to="published")
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        convert(tmp_path / "r2gencmn.pth", to="published")


@pytest.mark.parametrize("dataset", ["iu_xray", "mimic_cxr"])
def test_a_published_checkpoint_goes_both_ways(dataset, tmp_path, monkeypatch):
    reference = Reference("R2Gen", dataset)
    torch.save({"epoch": 7, "state_dict": reference.model.state_dict(), "monitor_best": 0.1}, tmp_path / "r2gen.pth")
    options = (
        "visual_extractor",
        "d_model",
        "d_ff",
        "num_heads",
        "num_layers",
        "rm_num_slots",
        "rm_num_heads",
        "rm_d_model",
        "threshold",
        "max_seq_length",
    )
    flags = [word for name in options for word in (f"--{name}", reference.golden.options[name])]
    run(
        convert_checkpoint,
        monkeypatch,
        tmp_path / "r2gen.pth",
        "--to",
        "ours",
        "--out",
        tmp_path / "ours.pth",
        "--backbone",
        "r2gen",
        "--dataset_name",
        dataset,
        "--ann_path",
        GOLDEN_DIR / "R2Gen" / dataset / "annotation.json",
        *flags,
    )
    ours = load_checkpoint(tmp_path / "ours.pth")
    assert dict(enumerate(ours["vocabulary"]["tokens"], 1)) == {
        int(key): word for key, word in reference.golden.config["idx2token"].items()
    }
    run(convert_checkpoint, monkeypatch, tmp_path / "ours.pth", "--to", "published", "--out", tmp_path / "back.pth")
    first, last = (torch.load(tmp_path / name, weights_only=True) for name in ("r2gen.pth", "back.pth"))
    assert last["epoch"] == 7 and list(last["state_dict"]) == list(first["state_dict"])
    assert same_weights(first["state_dict"], last["state_dict"])


def test_what_the_released_code_reads(trained):
    state = load_checkpoint(trained / "model_best.pth")["state_dict"]
    assert "temp_3" not in state  # the paper's variant has one temperature
    released = published_weights(state, heads=True)
    assert torch.equal(released["temp_3"], state["temp_1"])
    assert {name for name in released if not name.startswith(("visual_extractor.", "encoder_decoder."))} == {
        "temp_1",
        "temp_3",
        "img_projection.linear1.weight",
        "text_projection.linear1.weight",
    }
    with pytest.raises(InputError, match="trained without ITHN"):
        published_weights({"encoder_decoder.logit.weight": torch.zeros(1)}, heads=True)
    assert list(published_weights({"label_head.weight": torch.zeros(1)}, heads=False)) == []


def test_tied_weights_are_written(trained, tmp_path, monkeypatch):
    run(export, monkeypatch, trained / "model_best.pth", "--out", tmp_path / "shared")
    weights = load_file(tmp_path / "shared/model.safetensors")
    assert weights.keys() == load_checkpoint(trained / "model_best.pth")["state_dict"].keys()
    without = {name: value for name, value in weights.items() if "logit" not in name}
    save_file(without, tmp_path / "shared/model.safetensors")
    with pytest.raises(InputError, match="2 entries are missing"):
        run(export, monkeypatch, tmp_path / "shared", "--out", tmp_path / "out.pth")
