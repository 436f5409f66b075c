"""probe_image_leakage.py: whose image a report's feature follows, for a decoder that looks at it or does not."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modules.data.annotations import Study
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from scripts.research.image_leakage import (
    Readings,
    follow,
    grid_features,
    partners,
    read_batches,
    retrieval,
    study_groups,
    text_only_retrieval,
    variance_shares,
)
from scripts.research.probe_image_leakage import main
from scripts.research.probe_numbers import read_numbers
from tests.tiny_backbone import TinyBackbone, tiny_batch

ROOT = Path(__file__).resolve().parents[2]


def study(name: str, images: tuple[str, ...], study_id: str = "") -> Study:
    return Study(name, "Clear lungs.", images, "train", study_id or name, ("",) * len(images))


def make() -> Objective:
    torch.manual_seed(0)
    return Objective(TinyBackbone(), ITHNSettings(embedding_dim=5, strategy="contrastive")).double().eval()


def readings(objective, batch, groups=(0, 1, 2, 3)):
    objective.backbone.mean_patches = torch.zeros(1, 6, dtype=torch.float64)
    return read_batches(objective, [batch], groups, torch.device("cpu"))


def test_a_decoder_that_does_not_look_makes_features_of_the_report_alone():
    batch, objective = tiny_batch([5, 3, 6, 4], None), make()
    with torch.no_grad():
        objective.backbone.look.weight.zero_()
        own = objective.embed(batch.positive)
    found = follow(readings(objective, batch))
    cosines = own.report @ own.image.T
    assert found["cos_own"] == pytest.approx(float(cosines.diagonal().mean()))
    assert found["cos_under"] == pytest.approx(float(cosines.diagonal(-1).sum() + cosines[0, -1]) / 4)
    assert found["retrieval"] == float((cosines.T.argmax(1) == torch.arange(4)).sum()) / 4 == found["retrieval_mean"]
    shares = variance_shares(grid_features(objective, [batch], range(4), 4, torch.device("cpu")))
    assert shares["report"] == pytest.approx(1) and shares["image"] == pytest.approx(0)


def test_a_decoder_that_looks_and_does_not_read_makes_features_of_the_image_alone():
    batch, objective = tiny_batch([5, 3, 6, 4], None), make()
    with torch.no_grad():
        objective.backbone.words.weight.zero_()
        own = objective.embed(batch.positive)
    found = follow(readings(objective, batch))
    # Hidden states are those of the image before: under another image the feature is that image's.
    assert found["cos_under"] == pytest.approx(float((own.report * own.image).sum(1).mean()))
    assert found["cos_own"] == pytest.approx(float((own.report.roll(1, 0) * own.image).sum(1).mean()))
    assert found["retrieval_mean"] <= 0.5  # all reports read the same, but for rounding
    shares = variance_shares(grid_features(objective, [batch], range(4), 4, torch.device("cpu")))
    assert shares["image"] == pytest.approx(1) and shares["report"] == pytest.approx(0)


def test_no_report_is_paired_with_another_view_or_caption_of_its_own_study():
    studies = [
        study("a", ("a/0.png", "a/1.png")),
        study("b", ("b.png",)),
        study("c#0", ("c.png",), study_id="c"),
        study("c#1", ("c.png",), study_id="d"),  # another caption of the image, whatever it calls its study
    ]
    groups = study_groups(studies)
    assert groups == [0, 1, 2, 2]
    # --views separate: both images of a, both captions of c.
    samples = torch.tensor([groups[row] for row in (0, 0, 1, 2, 3)])
    found = partners(samples)
    assert found.tolist() == [4, 4, 1, 2, 2]
    assert (samples[found] != samples).all()
    assert partners(torch.tensor([7, 7])).tolist() == [-1, -1]


def test_rows_without_another_study_are_left_out(monkeypatch):
    batch, objective = tiny_batch([5, 3, 6, 4], None), make()
    [found] = readings(objective, batch, groups=(0, 0, 0, 1))
    assert found.rows.tolist() == [0, 1, 2, 3] and found.partner.tolist() == [3, 3, 3, 2]
    assert readings(objective, batch, groups=(5, 5, 5, 5)) == []


def test_other_views_of_a_study_do_not_compete_in_retrieval():
    image = torch.eye(3)
    report = torch.tensor([[0.9, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert retrieval(image, report, torch.tensor([0, 1, 2])).tolist() == [False, True, True]
    assert retrieval(image, report, torch.tensor([0, 0, 2])).tolist() == [True, True, True]


def test_variance_shares_by_hand():
    """Rows are images, columns reports: 1 3 / 5 7 has effects of 4 and 2 and no interaction; 16 x 4 / 20 and 4 / 20."""
    shares = variance_shares(torch.tensor([[1.0, 3.0], [5.0, 7.0]]).unsqueeze(-1))
    assert shares == pytest.approx({"image": 0.8, "report": 0.2, "both": 0.0})
    assert variance_shares(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).unsqueeze(-1))["both"] == pytest.approx(1)


def test_text_alone_retrieves_what_the_words_tell():
    """Images that their word decides are found by the text, in the training split by studies that were left out."""

    def batch(first, kinds=3):
        words = [f"finding{kind} seen again" for kind in range(kinds)]
        image = torch.eye(kinds)
        return Readings(first + torch.arange(kinds), words, image, image, image, image, *[torch.arange(kinds)] * 2)

    train = [batch(3 * number) for number in range(10)]
    assert text_only_retrieval(train, [batch(900)]) == 1.0 == text_only_retrieval(train, train)
    blind = [replace(part, texts=["seen again"] * 3) for part in train]
    assert text_only_retrieval(blind, blind) < 0.5


@pytest.mark.thorough
def test_the_table_has_plain_and_joint_checkpoints(trained, train, demo_index, tmp_path, monkeypatch, capsys):
    columns = ("--strategy", "ithn", "--negatives_as", "columns", "--negative_index", demo_index)
    joint = train("--ithn", "on", *columns, "--save_dir", tmp_path / "joint")
    paths = [str(folder / "model_best.pth") for folder in (joint, trained)]
    numbers = tmp_path / "numbers.json"
    argv = ["probe_image_leakage.py", "--load", *paths, "--device", "cpu", "--grid", "3", "--numbers", str(numbers)]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [len(line) for line in lines] == [9] * 6 and [line[1] for line in lines[2:]] == ["train", "test"] * 2
    assert all("–" not in line for line in lines[2:4]) and all(line[2:8] == ["–"] * 6 for line in lines[4:])
    kept = read_numbers(numbers, "probe_image_leakage")
    assert [row["checkpoint"] for row in kept] == [path for path in paths for _ in range(2)]
    assert f"{kept[1]['retrieval']:.3f}" == lines[3][2] and "retrieval" not in kept[3]
    for line in lines[2:]:
        assert sum(map(float, line[8].split(" / "))) == pytest.approx(1, abs=0.02)


def test_a_checkpoint_that_is_not_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "scripts/research/probe_image_leakage.py", "--load", "nowhere.pth"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "nowhere.pth" in done.stderr
