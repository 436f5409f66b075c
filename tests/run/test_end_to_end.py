"""The main job on a tiny synthetic data set: mine, train with ITHN, test, read the results, resume, fail politely."""

import contextlib
import csv
import json
import os
import stat
import subprocess
import sys

import pytest
import torch

from modules.evaluation.clinical_scores import AVERAGINGS, UNCERTAIN_POLICIES
from modules.evaluation.report_statistics import load_statistics
from modules.flags import parse_flags
from modules.run.resuming import require_same_network
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint


def main_test(*argv):
    from modules.run.testing import run_testing

    given, ignored = parse_flags([str(part) for part in argv], "main_test.py", "")
    run_testing(given, ignored)


@pytest.mark.thorough
def test_a_training_on_the_cpu_keeps_what_it_frees(train, monkeypatch):
    from modules.run import training
    from modules.training.trainer import Trainer

    told = []

    @contextlib.contextmanager
    def kept():
        told.append("kept")
        yield
        told.append("given back")

    step = Trainer._step
    monkeypatch.setattr(training, "freed_memory_kept", kept)
    monkeypatch.setattr(Trainer, "_step", lambda self, batches: (told.append("step"), step(self, batches)))
    train("--ithn", "off")
    assert len(told) > 2 and told == ["kept", *["step"] * (len(told) - 2), "given back"]


def test_main_job(train, demo_index, tmp_path):
    folder = train("--negative_index", demo_index, "--epochs", 2, "--meteor", "true")
    assert {
        "current_checkpoint.pth",
        "model_best.pth",
        "train.log",
        "history.json",
        "curves.png",
        "results.json",
        "res.csv",
        "gts.csv",
        "report.html",
    } <= {entry.name for entry in folder.iterdir()}
    history = json.loads((folder / "history.json").read_text())
    assert [row["train_hardness"] for row in history] == pytest.approx([0.0, 1 - 2.718281828**-0.01])
    assert all(row[f"train_{name}"] > 0 for row in history for name in ("nll", "contrastive", "cosine"))
    results = json.loads((folder / "results.json").read_text())
    assert set(results["test"]) == {"model", "commonest training report", "nearest training image"}
    assert results["test"]["model"]["METEOR"] is not None
    assert results["synthetic"] is True and results["config"]["strategy"] == "ithn"
    assert results["provenance"]["packages"]["torch"] == torch.__version__.split("+")[0]
    with open(folder / "res.csv", newline="") as generated, open(folder / "gts.csv", newline="") as references:
        assert len(list(csv.reader(generated))) == len(list(csv.reader(references))) == 4
    page = (folder / "report.html").read_text()
    assert "synthetic" in page.lower() and "<script" not in page
    assert page.count('<article class="card">') == 3 and "ROUGE-L <b>" in page and 'class="finding ' in page
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "report.html").stat().st_mode) == 0o600
    _check_nothing_private(folder, demo_index.parent)
    _check_scores(folder, results)
    _check_test_repeats(folder, results, tmp_path)


def _check_scores(folder, results):
    """Both forms of the references, clinical scores, an interval around every score, and what a comparison needs."""
    model = results["test"]["model"]
    assert model["BLEU_4_truncated"] == model["BLEU_4"] and "BLEU_4_full" in model
    assert {
        f"ce_rule_f1_{averaging}_{classes}_uncertain_{policy}{suffix}"
        for averaging in AVERAGINGS
        for classes in (14, 5)
        for policy in UNCERTAIN_POLICIES
        for suffix in ("", "_full", "_truncated")
    } <= set(model)
    for system, scores in results["test"].items():
        limits = results["intervals"][system]
        trusted = {name for name in scores if not name.endswith("_truncated") and "_macro_" not in name}
        assert trusted | {"diversity"} == set(limits)
        assert all(low <= high for low, high in limits.values())
    found = load_statistics(folder / "statistics.npz")
    for system, statistics in found.items():
        again = statistics.scores()
        assert all(
            again[name] == pytest.approx(value, abs=1e-12)
            for name, value in results["test"][system].items()
            if not name.endswith("_truncated")
        )
    assert [row["class"] for row in results["clinical_classes"]["rule"]][0] == "No Finding"
    for entry in [folder / "statistics.npz", *(folder / "exports").iterdir()]:
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600


def _check_nothing_private(folder, demo):
    log = (folder / "train.log").read_text()
    annotation = json.loads((demo / "annotation.json").read_text())
    for study in annotation["train"] + annotation["val"] + annotation["test"]:
        assert study["id"] not in log and study["report"][:30] not in log


def _check_test_repeats(folder, results, tmp_path):
    """--load repeats the scores, also from a folder that was moved and with flags of training, which are named."""
    moved = tmp_path / "moved"
    folder.rename(moved)
    (moved / "results.json").unlink()
    main_test("--load", moved / "model_best.pth", "--lr_ve", 1e-4, "--num_train_epochs", 9, "--bos_idx", 0)
    assert "no effect here (only training depends on them): --epochs, --lr_ve\n" in (moved / "test.log").read_text()
    again = json.loads((moved / "results.json").read_text())
    assert again["test"] == results["test"] and again["best_epoch"] == results["best_epoch"]
    assert (again["config"]["epochs"], again["config"]["lr_ve"]) == (2, 5e-5)  # what the model was trained with
    main_test("--load", moved / "model_best.pth")
    assert not list(moved.glob("earlier_*"))
    with open(tmp_path / "records" / "iu_xray.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and rows[0]["test_BLEU_4"] == rows[1]["test_BLEU_4"] == rows[2]["test_BLEU_4"]
    page = (moved / "report.html").read_bytes()
    main_test("--load", moved / "model_best.pth", "--beam_size", 1)
    assert json.loads((moved / "results.json").read_text())["config"]["beam_size"] == 1
    kept = moved / "earlier_1"
    assert json.loads((kept / "results.json").read_text()) == json.loads(
        json.dumps(again | {"provenance": json.loads((kept / "results.json").read_text())["provenance"]})
    )
    assert (kept / "report.html").read_bytes() == page and (kept / "exports").is_dir()
    assert (moved / "model_best.pth").is_file() and (moved / "exports").is_dir()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "extra", [[], ["--previous_epoch_start", "true", "--lr_scheduler", "ReduceLROnPlateau", "--plateau_patience", "0"]]
)
def test_resume_is_exact(train, demo_index, tmp_path, extra):
    flags = ["--negative_index", demo_index, "--alpha", "0.5", *extra]
    whole = load_checkpoint(train(*flags, "--epochs", 3) / "current_checkpoint.pth")
    part = train(*flags, "--epochs", 2, "--save_dir", tmp_path / "part")
    resumed = train(
        *flags,
        "--epochs",
        3,
        "--save_dir",
        tmp_path / "part",
        "--num_workers",
        1,
        "--resume",
        part / "current_checkpoint.pth",
    )
    resumed = load_checkpoint(resumed / "current_checkpoint.pth")
    for name, value in whole["objective"].items():
        assert torch.equal(value, resumed["objective"][name]), name
    for row, other in zip(whole["history"], resumed["history"], strict=True):
        row.pop("seconds"), other.pop("seconds")
        assert row == other
    assert whole["best"] == resumed["best"]
    for state, other in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.thorough
def test_a_run_that_goes_on_elsewhere_takes_its_best_model_along(train, tmp_path):
    first = train("--epochs", 2, "--lr_scheduler", "CosineAnnealingLR", "--monitor_metric", "nll")
    resume = [
        "--resume",
        first / "current_checkpoint.pth",
        "--lr_scheduler",
        "CosineAnnealingLR",
        "--monitor_metric",
        "nll",
        "--epochs",
        2,
        "--save_dir",
        tmp_path / "elsewhere",
    ]
    elsewhere = train(*resume)
    best = load_checkpoint(first / "model_best.pth")["state_dict"]
    assert all(
        torch.equal(value, best[key])
        for key, value in load_checkpoint(elsewhere / "model_best.pth")["state_dict"].items()
    )
    assert (elsewhere / "results.json").is_file()
    for flag, value in (("--optim", "SGD"), ("--lr_ed", "0.5"), ("--monitor_metric", "CIDEr"), ("--epochs", "9")):
        with pytest.raises(InputError, match=f"{flag} {value}: the run of --resume .* began with"):
            train(*resume, flag, value)


@pytest.mark.thorough
def test_a_best_model_that_was_left_behind_is_chosen_anew(train, tmp_path):
    content = load_checkpoint(train("--epochs", 2, "--monitor_metric", "nll") / "current_checkpoint.pth")
    content["best"] = {"score": 0.0, "epoch": 1, "epochs_without": 1}  # better than any to come
    torch.save(content, tmp_path / "alone.pth")
    other = train(
        "--epochs", 3, "--monitor_metric", "nll", "--resume", tmp_path / "alone.pth", "--save_dir", tmp_path / "other"
    )
    assert load_checkpoint(other / "model_best.pth")["epoch"] == 3
    assert "choose a new best model" in (other / "train.log").read_text()


@pytest.mark.thorough
def test_a_best_model_of_another_epoch_is_not_taken_along(train, tmp_path):
    """An older checkpoint was resumed: the model_best.pth beside it is of an epoch that it does not know."""
    first = train("--epochs", 3, "--monitor_metric", "nll", "--lr_ed", 1e-2, "--keep_epochs", "true")
    assert load_checkpoint(first / "model_best.pth")["epoch"] > 1
    again = ("--monitor_metric", "nll", "--lr_ed", 1e-2, "--resume", first / "epoch_0002.pth", "--epochs", 2)
    other = train(*again, "--save_dir", tmp_path / "other")
    assert "the model_best.pth is of another epoch than 1 or damaged" in (other / "train.log").read_text()
    assert load_checkpoint(other / "model_best.pth")["epoch"] == 2


@pytest.mark.thorough
def test_every_epoch_is_kept_although_only_the_last_is_validated(train):
    folder = train("--epochs", 3, "--start_eval_epoch", 3, "--keep_epochs", "true")
    for epoch in (1, 2, 3):
        assert load_checkpoint(folder / f"epoch_000{epoch}.pth")["epoch"] == epoch


@pytest.mark.parametrize("flags", [["--sample_method", "sample"], ["--beam_size", "4"]])
def test_one_of_several_answers_is_kept(train, flags):
    folder = train(*flags, "--sample_n", 3)
    with open(folder / "res.csv", newline="") as generated:
        assert len(list(csv.reader(generated))) == 4


@pytest.mark.thorough
def test_plain_backbone_needs_no_negatives(train):
    folder = train("--alpha", 0.5, "--ce_weight", 1)
    assert load_checkpoint(folder / "model_best.pth")["strategy"] == "off"
    assert "train_contrastive" not in json.loads((folder / "history.json").read_text())[0]
    log = (folder / "train.log").read_text()
    assert "no effect here (ITHN is off): --alpha, --embedding_dim\n" in log
    # What a run began as is not asked again where it goes on.
    train("--resume", "auto", "--strategy", "ithn", "--epochs", 2)
    assert load_checkpoint(folder / "current_checkpoint.pth")["strategy"] == "off"
    assert (folder / "train.log").read_text().count("ITHN is off") == 2


def test_the_contrastive_strategy_needs_no_negatives(train):
    folder = train("--strategy", "contrastive")
    assert load_checkpoint(folder / "model_best.pth")["strategy"] == "contrastive"
    assert json.loads((folder / "history.json").read_text())[0]["train_contrastive"] > 0


@pytest.mark.thorough
def test_test_labels_do_not_choose_the_model(train, demo, tmp_path):
    flags = ["--epochs", 3, "--lr_ed", "1e-2"]
    first = load_checkpoint(train(*flags) / "model_best.pth")
    annotation = json.loads((demo / "annotation.json").read_text())
    reports = [study["report"] for study in annotation["test"]]
    for study, report in zip(annotation["test"], reports[1:] + reports[:1], strict=True):
        study["report"] = report
    (tmp_path / "permuted.json").write_text(json.dumps(annotation))
    second = load_checkpoint(
        train(*flags, "--ann_path", tmp_path / "permuted.json", "--save_dir", tmp_path / "other") / "model_best.pth"
    )
    assert first["epoch"] == second["epoch"]
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())


def test_published_checkpoint_is_tested_with_its_flags(train, demo, tmp_path):
    """A file as the public code writes it: weights under its names, no vocabulary, no settings."""
    content = load_checkpoint(train() / "model_best.pth")
    torch.save(
        {"epoch": 7, "state_dict": content["state_dict"], "optimizer": {}, "monitor_best": 0.1},
        tmp_path / "published.pth",
    )
    from tests.conftest import TINY

    flags = [
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--save_dir",
        tmp_path / "p",
        "--record_dir",
        tmp_path / "records",
        *TINY,
    ]
    main_test("--load", tmp_path / "published.pth", *flags)
    ours = json.loads((tmp_path / "results" / "results.json").read_text())
    assert json.loads((tmp_path / "p" / "results.json").read_text())["test"] == ours["test"]
    reason = r"published\.pth: made for a vocabulary of \d+ words, .* gives \d+;.*--threshold"
    for prefix in ("", "module."):
        torch.save({prefix + name: value for name, value in content["state_dict"].items()}, tmp_path / "published.pth")
        with pytest.raises(InputError, match=reason):
            main_test("--load", tmp_path / "published.pth", *flags, "--threshold", 1)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--model_name", "xpronet"], "--model_name xpronet: contradicts checkpoint"),
        (["--d_model", 64, "--cmm_dim", 64], "--d_model 64: contradicts checkpoint"),
        (["--cmm_size", 8], "--cmm_size 8: contradicts checkpoint"),
    ],
)
def test_flags_of_another_network_than_the_checkpoints_are_named(train, trained, tmp_path, flags, part):
    path = trained / "model_best.pth"
    for start in (main_test, lambda *argv: train(*argv, "--save_dir", tmp_path / "other")):
        with pytest.raises(InputError, match=f"{part} .*, which holds model_name r2gencmn, d_model 16.*leave the flag"):
            start("--load", path, *flags)
    # Flags of another backbone's network do no harm.
    require_same_network({"rm_d_model": 8, "d_model": 16}, load_checkpoint(path)["config"], str(path))


def _break_image(demo, tmp_path, content):
    folder = tmp_path / "images"
    subprocess.run(["cp", "-r", demo / "images", folder], check=True)
    broken = next(folder.glob("*/0.png"))
    broken.unlink() if content is None else broken.write_bytes(content)
    return folder


@pytest.mark.parametrize(("content", "part"), [(None, "No such file"), (b"", "empty"), (b"\x89PNG\r\n", "cannot be")])
def test_bad_image_names_the_study_and_stops(train, demo, tmp_path, content, part):
    with pytest.raises(InputError, match=rf"split '\w+', study 'SYN\d+': .*{part}"):
        train("--image_dir", _break_image(demo, tmp_path, content))


def test_more_than_one_percent_of_replaced_images_stops(train, demo, tmp_path):
    with pytest.raises(InputError, match="--on_bad_image skip: 1 of"):
        train("--image_dir", _break_image(demo, tmp_path, b""), "--on_bad_image", "skip")


@pytest.mark.thorough
def test_a_replaced_test_image_is_counted_and_not_shown(train, demo, tmp_path):
    annotation = json.loads((demo / "annotation.json").read_text())
    annotation["test"] = [study | {"id": f"{study['id']}_{copy}"} for copy in range(26) for study in annotation["test"]]
    annotation["test"][0] |= {"id": "unreadable", "image_path": ["none.png"], "view": []}
    (tmp_path / "one_bad.json").write_text(json.dumps(annotation))
    folder = train("--ann_path", tmp_path / "one_bad.json", "--on_bad_image", "skip", "--report_samples", 200)
    assert "1 of 104 samples replaced some with unreadable images" in (folder / "train.log").read_text()
    assert "unreadable" not in (folder / "exports" / "predicted_reports.csv").read_text()
    assert (folder / "report.html").read_text().count('<article class="sample ') == 104


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--ithn", "on"], "needs hard negatives"),
        (["--strategy", "prior"], "--strategy prior needs hard negatives"),
        (["--strategy", "ithn"], "--strategy ithn needs hard negatives"),  # the default, typed out
        (["--ithn_variant", "paper"], "--strategy ithn needs hard negatives"),
        (["--ithn_variant", "released"], "needs hard negatives"),
        (["--negative_index", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--cmm_dim", "32"], "--cmm_dim 32: must equal --d_model 16"),
        (["--model_name", "r2gen", "--rm_d_model", "32"], "--rm_d_model 32: must equal --d_model 16"),
        (["--model_name", "gpt"], "--model_name gpt: must be one of"),
        (["--visual_extractor", "resnet10"], "did you mean"),
        (["--image_dir", "nowhere"], "nowhere"),
        (["--beam_size", "500"], "--beam_size 500: at most the"),
        (["--ann_path", "nowhere.json"], "nowhere.json"),
        (["--save_dir", "/proc/self"], "--save_dir /proc/self: cannot be written"),
        (["--record_dir", "README.md"], "folder 'README.md' cannot be made"),
        (["--resume", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_get_one_line_before_training(train, flags, part):
    with pytest.raises(InputError) as error:
        train(*flags)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_index_of_another_annotation_is_refused(train, demo, demo_index, tmp_path):
    annotation = json.loads((demo / "annotation.json").read_text())
    annotation["train"][0]["report"] += " Changed."
    (tmp_path / "changed.json").write_text(json.dumps(annotation))
    with pytest.raises(InputError, match="mine"):
        train("--ann_path", tmp_path / "changed.json", "--negative_index", demo_index)


def test_main_test_without_a_checkpoint_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "main_test.py", "--load", str(tmp_path / "none.pth")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.pth" in done.stderr
