"""Reports for loose images: the same as the test split's, with the search's own log-probabilities, read from files."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import MODELS
from modules.inference.attention import opacity, recorded_attention, shares, view_maps
from modules.inference.prediction import Predictor, WrittenReport
from modules.inference.study_files import find_studies
from modules.layers.transformer import Attention
from modules.pages.prediction_page import PageStudy, render_page
from modules.run.predictor import load_predictor
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint, write_checkpoint
from scripts import plot_attention, predict
from tests.data.test_dicom import dicom
from tests.pages.test_html_report import PAYLOADS, Page
from tests.run.test_plugin import OWN_FLAGS, build

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    return module.main()


def test_reports_are_those_of_the_test_split(demo, trained, tmp_path, monkeypatch, capsys):
    """No annotation is read: the images of the test studies alone give what main_test.py wrote."""
    test = json.loads((demo / "annotation.json").read_text())["test"]
    for study in test:
        for number, path in enumerate(study["image_path"]):
            place = tmp_path / "studies" / study["id"] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(demo / "images" / path, place)
    moved = shutil.copy(trained / "model_best.pth", tmp_path / "model.pth")
    code = run(
        monkeypatch,
        predict,
        "--load",
        moved,
        "--group",
        "folder",
        "--batch_size",
        3,
        "--json",
        tmp_path / "out.json",
        "--csv",
        tmp_path / "out.csv",
        "--html",
        tmp_path / "out.html",
        tmp_path / "studies",
    )
    assert not code
    with open(trained / "res.csv", newline="") as file:
        wanted = [row[0] for row in csv.reader(file)]
    content = json.loads((tmp_path / "out.json").read_text())
    by_id = {Path(row["id"]).name: row for row in content["reports"]}
    assert [by_id[study["id"]]["report"] for study in test] == wanted
    assert "not a medical device" in content["warning"]
    with open(tmp_path / "out.csv", newline="") as file:
        assert [row["report"] for row in csv.DictReader(file)] == [row["report"] for row in content["reports"]]
    shown = capsys.readouterr()
    assert "not a medical device" in shown.err
    assert all(row["sentences"][0]["text"] in shown.out for row in content["reports"] if row["sentences"])
    for name in ("out.json", "out.csv", "out.html"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_the_searches_own(demo, demo_labels, demo_index, name):
    """One teacher-forced pass over the finished report gives each word what the beam search gave it."""
    config, data, objective, loader = build(
        demo, demo_index, "--model_name", name, "--ithn", "off", "--beam_size", "3", *OWN_FLAGS[name]
    )
    from modules.run.build import decoding_options

    predictor = Predictor(
        objective.backbone,
        tokenizer=data.tokenizer,
        transform=loader.dataset.transform,
        num_views=2,
        decoding=decoding_options(config),
        device=torch.device("cpu"),
        precision="float32",
    )
    images = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)) for seed in range(3)]
    monkeyed = loader.dataset.transform.__class__(32, None, False, (0.5,) * 3, (0.2,) * 3)
    predictor.transform = monkeyed
    written = predictor.write([images[:2], images[2:]], attention=True)  # the second study has one view
    tensors, view_mask = predictor._tensors([images[:2], images[2:]])
    found = objective.backbone.search(tensors, view_mask=view_mask, decoding=predictor.decoding)
    for row, report in enumerate(written):
        log_probs = found.log_probs[row, 0].tolist()
        assert report.log_probs == pytest.approx(log_probs[: len(report.words)], abs=1e-4)
        assert report.log_prob == pytest.approx(
            sum(log_probs[: len(report.words) + (report.end_log_prob is not None)]), abs=1e-3
        )
        assert sum(sentence.log_prob for sentence in report.sentences) == pytest.approx(sum(report.log_probs))
        assert report.maps.shape[0] == len(report.words)
        assert report.maps.sum((1, 2, 3)) == pytest.approx(1, abs=1e-5)
    assert not written[1].maps[:, 1].any()  # nothing of the absent view was looked at


def test_recorded_weights_are_those_that_were_used():
    torch.manual_seed(0)
    attention = Attention(8, 2).eval()
    x, source = torch.randn(3, 5, 8), torch.randn(3, 6, 8)
    mask = torch.rand(3, 1, 1, 6) < 0.7
    mask[..., 0] = True
    keys, values = attention.keys_values(source)
    with recorded_attention([attention]) as found:
        out = attention(x, keys, values, mask)
    attention(x, keys, values, mask)
    assert len(found) == 1
    again = attention.linears[3]((found[0] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, out)
    assert found[0].masked_select(~mask.expand_as(found[0])).abs().sum() == 0


def test_maps_are_layers_heads_and_views_in_their_places():
    layers = [torch.rand(1, 2, 3, 8).softmax(-1) for _ in range(2)]  # two heads, three words, two views of 2 x 2
    last, mean = view_maps(layers, 2, -1), view_maps(layers, 2, None)
    assert last[0, 1, 1, 0, 1] == pytest.approx(float(layers[1][0, :, 1, 5].mean()))
    assert mean[0, 2, 0, 1, 0] == pytest.approx(float(torch.stack(layers)[:, 0, :, 2, 2].mean()))
    assert view_maps([torch.rand(1, 2, 3, 7)], 1, -1) is None  # seven regions are no grid


def test_only_more_than_an_even_share_is_coloured():
    even = np.full((2, 2, 2), 1 / 8)
    assert opacity(shares(even)).max() == 0
    skewed = even.copy()
    skewed[0, 0] = 0.25, 0.0
    assert opacity(shares(skewed))[0, 0].tolist() == [1.0, 0.0]  # twice its share, and nothing


def test_sentences_end_at_full_stops():
    words = ["no", "effusion", ".", "heart", "large"]
    report = WrittenReport(words, [-0.1, -0.2, -0.3, -1.0, -2.0], None)
    assert [(s.text, s.log_prob) for s in report.sentences] == [
        ("no effusion .", pytest.approx(-0.6)),
        ("heart large", -3.0),
    ]
    assert report.sentences[1].mean_log_prob == -1.5
    assert WrittenReport([], [], -0.5).sentences == [] and WrittenReport([], [], -0.5).log_prob == -0.5


def test_files_become_studies(tmp_path):
    for name in ("b/10.png", "b/2.png", "a/x.jpg", "a/notes.txt", "a/.hidden.png", "c/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a" / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "a" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "c" / "1.2.840.5").write_bytes(b"\x08\x00\x16\x00\x1c\0\0\0" + bytes(200))  # without preamble
    os.mkfifo(tmp_path / "a" / "pipe.png")

    def found(group, *paths):
        return [
            (Path(study.name).name, [path.name for path in study.paths])
            for study in find_studies([str(tmp_path / path) for path in paths], group)
        ]

    assert found("none", "b/2.png", "a") == [("2.png", ["2.png"]), ("IM0001", ["IM0001"]), ("x.jpg", ["x.jpg"])]
    assert found("folder", "") == [("a", ["IM0001", "x.jpg"]), ("b", ["2.png", "10.png"]), ("c", ["1.2.840.5"])]
    assert found("all", "b", "b/2.png") == [("b", ["2.png", "10.png"])]
    assert found("none", "c") == [("1.2.840.5", ["1.2.840.5"])]
    (tmp_path / "c" / "1.2.840.5").unlink()
    with pytest.raises(InputError, match="no image in this folder"):
        found("none", "c")
    for special in (str(tmp_path / "a" / "pipe.png"), "/dev/zero"):
        with pytest.raises(InputError, match="neither a regular file nor a folder"):
            find_studies([special], "none")
    with pytest.raises(InputError, match="no such file or folder"):
        found("none", "d")


def test_an_unreadable_image_costs_its_own_report_only(demo, trained, tmp_path, monkeypatch, capsys):
    good = next((demo / "images").rglob("*.png"))
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    dicom(tmp_path / "outside.dcm", WindowCenter=60000, WindowWidth=10)
    dicom(tmp_path / "low.dcm", WindowCenter=128, WindowWidth=256)  # a window for 8 bits on 12
    images = [tmp_path / name for name in ("bad.png", "black.png", "outside.dcm", "low.dcm")]
    arguments = ("--load", trained / "model_best.pth", *images, good, "--json", tmp_path / "out.json")
    assert run(monkeypatch, predict, *arguments) == 2
    shown = capsys.readouterr().err
    assert "bad.png" in shown and "3 of 5 studies" in shown and "Traceback" not in shown
    assert "black.png' is blank" in shown and "outside.dcm' is blank: every pixel has the grey value 0" in shown
    assert "warning: image" in shown and "low.dcm' is nearly blank: 9" in shown
    written = [row["id"] for row in json.loads((tmp_path / "out.json").read_text())["reports"]]
    assert written == [str(tmp_path / "low.dcm"), str(good)]


def test_what_cannot_predict_is_refused(trained, tmp_path):
    content = load_checkpoint(trained / "model_best.pth")
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "published.pth")
    with pytest.raises(InputError, match="no vocabulary.*convert_checkpoint"):
        load_predictor(str(tmp_path / "published.pth"), {})
    config = content["config"] | {"model_name": "xpronet", "xpronet_labels": "reference"}
    write_checkpoint(tmp_path / "leak.pth", content | {"config": config})
    with pytest.raises(InputError, match="--xpronet_labels predicted"):
        load_predictor(str(tmp_path / "leak.pth"), {})
    config = content["config"] | {"model_name": "visualgpt", "detection_features": str(tmp_path / "gone.hdf5")}
    write_checkpoint(tmp_path / "detections.pth", content | {"config": config})
    with pytest.raises(InputError, match="--detection_features, which a new image does not have"):
        load_predictor(str(tmp_path / "detections.pth"), {})


@pytest.mark.parametrize("script", ["predict", "plot_attention", "serve"])
def test_a_missing_checkpoint_is_named_before_torch_is_imported(demo, tmp_path, script):
    image = [] if script == "serve" else [next((demo / "images").rglob("*.png"))]
    out = ["--out", tmp_path / "out"] if script == "plot_attention" else []
    code = (
        f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); import scripts.{script} as script\n"
        "try: script.main()\nexcept Exception as error: print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, script, "--load", tmp_path / "gone.pth", *out, *image],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert "gone.pth: no such file" in done.stdout and done.stdout.endswith("False\n")
    assert not (tmp_path / "out").exists()


def test_files_that_training_read_may_be_gone(demo, trained, tmp_path, monkeypatch):
    """Feature cache, pretrained weights, annotation and images: predict.py asks for none of them."""
    content, gone = load_checkpoint(trained / "model_best.pth"), str(tmp_path / "gone")
    config = (
        content["config"]
        | {"freeze_visual_extractor": True, "visual_extractor_pretrained": True}
        | dict.fromkeys(
            ("feature_cache", "image_cache", "gpt2_path", "ann_path", "image_dir", "visual_extractor_weights"), gone
        )
    )
    write_checkpoint(tmp_path / "model.pth", content | {"config": config})
    image = next((demo / "images").rglob("*.png"))
    for name, checkpoint in (("first", trained / "model_best.pth"), ("moved", tmp_path / "model.pth")):
        assert not run(monkeypatch, predict, "--load", checkpoint, "--quiet", image, "--csv", tmp_path / name)
    assert (tmp_path / "first").read_text() == (tmp_path / "moved").read_text()


def test_a_captioning_model_reads_one_image(demo, trained, tmp_path):
    content = load_checkpoint(trained / "model_best.pth")
    write_checkpoint(tmp_path / "coco.pth", content | {"config": content["config"] | {"dataset_name": "coco"}})
    assert load_predictor(str(tmp_path / "coco.pth"), {}).num_views == 1


def test_a_dicom_gives_the_report_of_its_pixels(demo, trained, tmp_path, monkeypatch, capsys):
    """An inverted 12-bit DICOM without a suffix, in a folder, beside the image that it was made of."""
    image = np.asarray(Image.open(next((demo / "images").rglob("*.png"))).convert("L"))
    Image.fromarray(image).save(tmp_path / "image.png")
    (tmp_path / "scans").mkdir()
    dicom(
        tmp_path / "scans" / "IM0001",
        (4095 - np.rint(image * (4095 / 255))).astype(np.uint16),
        photometric="MONOCHROME1",
        WindowCenter=2048,
        WindowWidth=4096,
    )
    assert not run(
        monkeypatch,
        predict,
        "--load",
        trained / "model_best.pth",
        tmp_path / "image.png",
        tmp_path / "scans",
        "--json",
        tmp_path / "out.json",
        "--html",
        tmp_path / "out.html",
    )
    first, second = json.loads((tmp_path / "out.json").read_text())["reports"]
    assert first["report"] == second["report"] != ""
    assert second["log_prob"] == pytest.approx(first["log_prob"], abs=1e-4)
    everything = capsys.readouterr().out + (tmp_path / "out.json").read_text() + (tmp_path / "out.html").read_text()
    assert "Doe" not in everything and "PHI-4711" not in everything


def test_flags_of_decoding_go_before_the_checkpoints(trained):
    predictor = load_predictor(str(trained / "model_best.pth"), {"beam_size": 1, "max_seq_length": 5})
    assert (predictor.decoding.beam_size, predictor.decoding.max_seq_length) == (1, 5)
    assert load_predictor(str(trained / "model_best.pth"), {}).decoding.beam_size == 2


@pytest.mark.thorough
@pytest.mark.parametrize("by", ["sentence", "word"])
def test_attention_is_plotted(demo, trained, tmp_path, monkeypatch, by):
    folders = sorted(path for path in (demo / "images").iterdir() if path.is_dir())[:2]
    assert not run(
        monkeypatch,
        plot_attention,
        "--load",
        trained / "model_best.pth",
        "--out",
        tmp_path / "maps",
        "--group",
        "folder",
        "--by",
        by,
        "--layer",
        "mean",
        *folders,
    )
    pictures = sorted((tmp_path / "maps").glob("*.png"))
    assert len(pictures) == 2 and all(Image.open(path).width > 200 for path in pictures)
    assert (tmp_path / "maps" / "attention.html").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="--layer 7"):
        run(
            monkeypatch,
            plot_attention,
            "--load",
            trained / "model_best.pth",
            "--out",
            tmp_path / "maps",
            "--layer",
            "7",
            *folders,
        )


def test_names_of_pictures_stay_in_the_folder():
    taken = set()
    assert plot_attention.file_name("../../etc/passwd", taken) == "etc_passwd.png"
    assert plot_attention.file_name("/etc/passwd", taken) == "etc_passwd_2.png"
    assert plot_attention.file_name("..", taken) == "study.png"


def test_page_escapes_names_and_words_and_runs_its_own_script_only():
    maps = np.full((1, 1, 2, 2), 0.25)
    plain = render_page(
        [PageStudy("a", ("data:image/jpeg;base64,AA==",), WrittenReport(["b"], [-0.1], 0.0, maps))],
        title="t",
        checkpoint="c",
    )
    expected = Page(plain).structure
    for payload in PAYLOADS:
        text = render_page(
            [PageStudy(payload, ("data:image/jpeg;base64,AA==",), WrittenReport([payload], [-0.1], 0.0, maps))],
            title="t",
            checkpoint=payload,
        )
        assert Page(text).structure == expected
    policy = next(
        attributes["content"]
        for tag, attributes in expected
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert f"{math.exp(-0.1):.2f}" in plain


def test_help_needs_no_torch():
    for script in ("predict", "plot_attention"):
        code = (
            "import sys, runpy; sys.argv = ['x', '--help']\n"
            f"try: runpy.run_path('scripts/{script}.py', run_name='__main__')\n"
            "except SystemExit: assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
