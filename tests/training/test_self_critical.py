"""Self-critical training: the reward and its gradient by hand, a reward that rises, every backbone, the programs."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from models import MODELS
from models.base import Backbone, Output, VisualFeatures
from modules.data.batches import Batch, Pair
from modules.flags import parse_flags, resolve_config
from modules.run.build import build_objective, prepare_device
from modules.run.data import build_dataset, build_split_loader, read_data
from modules.run.self_critical import FREQUENCIES, self_critical_objective
from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint, write_checkpoint
from modules.training.rewards import Reward, training_frequencies
from modules.training.self_critical import SelfCritical, repeat_rows, up_to_end, without_dropout
from modules.training.settings import SelfCriticalSettings
from tests.conftest import TINY
from tests.run.test_plugin import OWN_FLAGS

torch.set_num_threads(1)


# ---- rewards


def test_cider_by_hand():
    """Four studies; "a b" in all, so worth nothing; "c" in one: the words' vectors are worked out below."""
    studies = [["a b c"], ["a b"], ["a b d"], ["a b d e"]]
    frequencies, count = training_frequencies_of(studies)
    assert count == 4 and frequencies[("a",)] == 4 and frequencies[("d",)] == 2 and frequencies[("c",)] == 0
    reward = Reward("CIDEr", studies, frequencies=(frequencies, count))
    # Unigrams of "a b c": idf log(4/4), log(4/4), log(4/1); bigrams: a b 0, b c log 4; trigram a b c log 4. A text
    # equal to its reference has cosine 1 for n = 1, 2, 3 and 0 for n = 4, which it has none of: 10 * 3/4.
    assert reward([0, 1], ["a b c", "a b"]) == pytest.approx([7.5, 0.0])
    # "c" against "a b c": cosine 1 for unigrams only, lengths differ by 2: 10/4 * exp(-2^2 / (2 * 6^2)).
    assert reward([0], ["c"])[0] == pytest.approx(2.5 * math.exp(-4 / 72))


def training_frequencies_of(studies, path=None):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        return training_frequencies(path or Path(folder) / "frequencies.json", studies)


def test_frequencies_are_kept_and_belong_to_their_texts(tmp_path, monkeypatch):
    path, studies = tmp_path / "frequencies.json", [["a b"], ["a c", "a"], ["a"]]
    first = training_frequencies(path, studies)
    assert first[1] == 3 and first[0][("a",)] == 3  # studies, not captions
    assert path.stat().st_mode & 0o077 == 0 and "b" not in json.loads(path.read_text())["frequencies"]
    monkeypatch.setattr("modules.training.rewards.document_frequencies", None)  # not counted again
    assert training_frequencies(path, studies) == first
    with pytest.raises(TypeError):
        training_frequencies(path, [["other"]])
    path.write_text("damaged")
    with pytest.raises(TypeError):
        training_frequencies(path, studies)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("BLEU_1", [1, 0.5]), ("BLEU_2", [1, 0.5**0.5 * (1 / 3) ** 0.5]), ("ROUGE_L", [1, 0.5]), ("clinical_f1", [1, 0])],
)
def test_other_rewards(name, expected):
    references = [["small pleural effusion ."], ["small pleural effusion ."]]
    texts = ["small pleural effusion .", "small pleural lung is"]
    found = Reward(name, references)([0, 1], texts)
    assert found == pytest.approx(expected, abs=1e-6)
    several = Reward(name, [["nothing", "small pleural effusion ."]])
    if name != "clinical_f1":
        assert several([0], texts[:1])[0] == pytest.approx(1)


# ---- the loss


class Chooser(Backbone):
    """Writes words whose probabilities depend on nothing but the position and the study's first feature's sign."""

    def __init__(self, num_ids=4, length=3):
        super().__init__()
        self.image_dim = self.report_dim = 2
        self.table = nn.Parameter(torch.zeros(2, length, num_ids))
        self.visual_extractor = nn.Flatten()
        self.dropout = nn.Dropout(0.5)

    def extract(self, images, view_mask=None, features=None):
        pooled = images.flatten(1)[:, :2]
        return VisualFeatures(pooled.unsqueeze(1), None, pooled)

    def scores(self, features):
        assert not self.training
        return self.table[(features.pooled[:, 0] > 0).long()].log_softmax(-1)

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None):
        return Output(self.scores(features)[:, : tokens.size(1)], features.pooled, features.patches)

    def generate(self, images, *, view_mask=None, labels=None, features=None, decoding):
        scores = self.scores(features)
        if decoding.sample_method == "greedy":
            tokens = scores.argmax(-1)
        else:
            tokens = scores.exp().flatten(0, 1).multinomial(1).view(scores.shape[:2])
        return tokens * ((tokens == 0).cumsum(1) == 0)


def batch_of(rows=4):
    images = torch.ones(rows, 1, 3, 2, 2)
    images[1::2] = -1
    tokens = torch.zeros(rows, 3, dtype=torch.int64)
    pair = Pair(images, torch.ones(rows, 1, dtype=torch.bool), tokens, torch.ones_like(tokens, dtype=torch.bool))
    return Batch(pair, None, None, torch.arange(rows), torch.arange(rows), [""] * rows, [""] * rows)


def self_critical(backbone, reward, **options):
    return SelfCritical(
        backbone,
        idf=None,
        stage=SelfCriticalSettings(self_critical=True, **{"scst_samples": 6, "scst_baseline": "mean"} | options),
        reward=reward,
        decode=lambda tokens: [" ".join(map(str, row)) for row in tokens.tolist()],
        max_seq_length=3,
        labelled=False,
    )


def ones_said(rows, texts):
    """The share of 1 among three words."""
    return np.array([text.split().count("1") / 3 for text in texts])


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_loss_is_the_policy_gradient_written_out(baseline):
    torch.manual_seed(0)
    backbone = Chooser()
    backbone.table.data.normal_()
    seen = []

    def reward(rows, texts):
        seen.append((rows, texts))
        return ones_said(rows, texts)

    terms = self_critical(backbone, reward, scst_baseline=baseline)(batch_of(), 1)
    rows, texts = seen[0]
    assert rows == [row for row in range(4) for _ in range(6)]
    greedy = dict(zip(*seen[1], strict=True)) if baseline == "greedy" else {}
    log_probs = backbone.table.detach().log_softmax(-1)
    total = expected_baseline = 0.0
    for row, text in zip(rows, texts, strict=True):
        own = [t for r, t in zip(rows, texts, strict=True) if r == row]
        base = ones_said(0, [greedy[row]])[0] if baseline == "greedy" else ones_said(0, own).mean()
        words = [int(word) for word in text.split()]
        end = words.index(0) if 0 in words else 2
        said = sum(log_probs[int(row % 2 == 0), place, words[place]].item() for place in range(end + 1))
        total -= (ones_said(0, [text])[0] - base) * said / 3 / 24
        expected_baseline += base / 24
    assert terms["loss"].item() == pytest.approx(total, rel=1e-4, abs=1e-7)
    assert terms["baseline"].item() == pytest.approx(expected_baseline, rel=1e-4)


def test_gradient_raises_what_was_rewarded():
    torch.manual_seed(0)
    backbone = Chooser()
    self_critical(backbone, ones_said)(batch_of(), 1)["loss"].backward()
    step = -backbone.table.grad
    assert (step[:, 0, 1] > 0).all()  # a 1 at the first place becomes likelier
    assert (step[:, 0, 0] < 0).all()  # the end there, which forbids any, less likely
    assert step.sum(-1).abs().max().item() < 1e-6


def test_sampled_reward_rises():
    torch.manual_seed(0)
    backbone = Chooser()
    objective = self_critical(backbone, ones_said)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    history = []
    for _ in range(60):
        terms = objective(batch_of(), 1)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        history.append(terms["reward"].item())
    assert np.mean(history[:5]) < 0.3 and np.mean(history[-5:]) > 0.9


def test_equal_rewards_change_nothing():
    backbone = Chooser()
    self_critical(backbone, lambda rows, texts: np.ones(len(texts)))(batch_of(), 1)["loss"].backward()
    assert not backbone.table.grad.any()


def test_the_modes_come_back():
    backbone = Chooser()
    backbone.visual_extractor.eval()
    objective = self_critical(backbone, ones_said)
    before = {name: part.training for name, part in objective.named_modules()}
    objective(batch_of(), 1)
    assert before == {name: part.training for name, part in objective.named_modules()}
    with without_dropout(backbone):
        assert not backbone.dropout.training


def test_rows_and_ends():
    features = VisualFeatures(torch.arange(4.0).view(2, 1, 2), None, torch.arange(2.0).view(2, 1))
    repeated = repeat_rows(features, 3)
    assert repeated.pooled.flatten().tolist() == [0, 0, 0, 1, 1, 1] and repeated.patch_mask is None
    assert repeat_rows(dataclasses.replace(features, own=1), 3).own == 1  # how many tokens are the images'
    assert up_to_end(torch.tensor([[3, 0, 0], [0, 0, 0], [1, 2, 3]])).tolist() == [
        [True, True, False],
        [True, False, False],
        [True, True, True],
    ]


# ---- every backbone, with ITHN and without


@pytest.mark.parametrize("strategy", ["off", "ithn"])
@pytest.mark.parametrize("backbone", MODELS)
def test_every_backbone_takes_a_step(demo, demo_index, demo_labels, tmp_path, backbone, strategy):
    given, _ = parse_flags(
        [
            "--ann_path",
            str(demo / "annotation.json"),
            "--image_dir",
            str(demo / "images"),
            "--label_path",
            str(demo_labels),
            "--negative_index",
            str(demo_index),
            "--ithn",
            "off" if strategy == "off" else "on",
            "--self_critical",
            "true",
            "--scst_samples",
            "2",
            "--model_name",
            backbone,
            *TINY,
            *OWN_FLAGS[backbone],
        ],
        "main_train.py",
        "",
    )
    config = resolve_config(given)
    device = prepare_device(config)
    data = read_data(config)
    objective = build_objective(
        config, data, device, pretrained=True, make=self_critical_objective(config, data, tmp_path)
    )
    dataset = build_dataset(
        config, data, "train", augment=True, negatives=strategy == "ithn", extractor=objective.backbone.visual_extractor
    )
    loader = build_split_loader(config, dataset, device, shuffle=True)
    loader.set_epoch(1)
    terms = objective.train()(next(iter(loader)).to("cpu"), 1)
    terms["loss"].backward()
    assert all(value.isfinite() for value in terms.values()) and {"reward", "baseline"} <= set(terms)
    assert ("contrastive" in terms) == (strategy == "ithn")
    entry = dict(objective.backbone.named_parameters())[objective.backbone.vocabulary_entry]
    assert entry.grad.abs().sum() > 0
    assert objective.backbone.visual_extractor.model[0].weight.grad.abs().sum() > 0
    assert (tmp_path / FREQUENCIES).is_file()


# ---- main_train.py


@pytest.mark.thorough
def test_a_stage_of_its_own(train, tmp_path):
    first = train("--seed", 5)
    weights = load_checkpoint(first / "model_best.pth")["state_dict"]
    second = train(
        "--load",
        first / "model_best.pth",
        "--save_dir",
        tmp_path / "stage",
        "--self_critical",
        "true",
        "--scst_samples",
        2,
        "--lr_ed",
        0,
        "--resume",
        "auto",
    )  # nothing is there yet: --load counts
    content = load_checkpoint(second / "model_best.pth")
    assert (content["config"]["lr_ve"], content["config"]["monitor_metric"]) == (1e-5, "CIDEr")
    assert content["config"]["seed"] == 5  # the first stage's settings are the defaults
    row = content["history"][0]
    assert row["train_reward"] >= 0 and "train_baseline" in row and "train_nll" not in row
    name = "encoder_decoder.logit.weight"  # learning rate 0: the weights that it started from
    assert torch.equal(content["state_dict"][name], weights[name])
    made_from = json.loads((second / "results.json").read_text())["provenance"]
    assert made_from["checkpoint_sha256"] == file_sha256(second / "model_best.pth")
    assert made_from["started_from_sha256"] == file_sha256(first / "model_best.pth")
    assert f"starts from {first / 'model_best.pth'}" in (second / "train.log").read_text()


@pytest.mark.slow
def test_the_stage_is_resumed(train, tmp_path):
    stage = train(
        "--load",
        train() / "model_best.pth",
        "--save_dir",
        tmp_path / "stage",
        "--self_critical",
        "true",
        "--scst_baseline",
        "mean",
        "--scst_reward",
        "ROUGE_L",
    )
    train("--resume", stage / "current_checkpoint.pth", "--save_dir", stage, "--epochs", 2)
    history = load_checkpoint(stage / "current_checkpoint.pth")["history"]
    assert [row["epoch"] for row in history] == [1, 2] and all("train_reward" in row for row in history)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--self_critical", "true"], "--load results/RUN/model_best.pth"),
        (["--load", "x/model_best.pth"], "no such file"),
        (["--self_critical", "true", "--scst_baseline", "mean", "--scst_samples", "1"], "--scst_samples 2 or more"),
        (["--self_critical", "true", "--compile", "true"], "--compile: not with"),
    ],
)
def test_mistakes_get_one_line(train, flags, reason):
    with pytest.raises(InputError, match=reason) as error:
        train(*flags)
    assert "\n" not in str(error.value)


def test_a_run_is_not_written_over_its_own_start(train, tmp_path):
    (tmp_path / "results").mkdir()
    write_checkpoint(tmp_path / "results" / "model_best.pth", {"state_dict": {"weight": torch.zeros(1)}})
    with pytest.raises(InputError, match="needs --save_dir, a new folder"):
        train("--load", tmp_path / "results" / "model_best.pth")
