"""Decoding with guidance: the arithmetic, every backbone against passes over whole reports, and the mean image."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from models import MODELS
from models.base import VisualFeatures
from modules.decoding.guidance import Guided
from modules.decoding.options import DecodingOptions
from modules.decoding.search import decode
from modules.evaluation import tester
from modules.run.data import training_studies
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint, write_checkpoint
from scripts import export, predict
from tests.decoding.test_search import Language, Session, plain_beam_search
from tests.run.test_plugin import LLAMA, OWN_FLAGS, build


class Fixed:
    """A session that always says the same; it remembers what it was asked."""

    def __init__(self, probabilities: list[float]):
        self.probabilities, self.asked = torch.tensor([[probabilities]]), []

    def step(self, tokens, parents):
        self.asked.append((tokens, parents))
        return self.probabilities.log().expand(*tokens.shape, -1)

    def keep(self, rows):
        self.asked.append(rows)


def test_the_words_that_the_image_adds_are_raised():
    """p = 0.5 0.3 0.2 with the image, 0.6 0.3 0.1 without: p^2 / q is 0.41667 0.3 0.4, of 1.11667 together."""
    own, mean = Fixed([0.5, 0.3, 0.2]), Fixed([0.6, 0.3, 0.1])
    tokens, parents = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    found = Guided(own, mean, 1.0).step(tokens, parents)
    torch.testing.assert_close(found.exp(), torch.tensor([[[0.37313, 0.26866, 0.35821]]]), atol=1e-5, rtol=0)
    # Half the weight: p^1.5 / q^0.5.
    half = [0.5**1.5 / math.sqrt(0.6), 0.3, 0.2**1.5 / math.sqrt(0.1)]
    found = Guided(own, mean, 0.5).step(tokens, parents)
    torch.testing.assert_close(found.exp(), torch.tensor([[half]]) / sum(half))
    Guided(own, mean, 1.0).keep(torch.tensor([0]))
    assert len(own.asked) == len(mean.asked) == 3 and mean.asked[0] == (tokens, parents)


def test_a_word_below_a_tenth_of_the_likeliest_is_not_raised():
    """p = 0.9 0.089 0.011: the second word is below 0.09, and stays behind whatever the mean image rules out."""
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    found = Guided(Fixed([0.9, 0.089, 0.011]), Fixed([1.0, 0.0, 0.0]), 2.0).step(tokens, None)
    assert found.isfinite().all() and found[0, 0, 0] == 0
    assert found[0, 0, 1] - found[0, 0, 2] == pytest.approx(math.log(0.089 / 0.011), abs=1e-3)
    # At 0.09 it is ranked: 0.9^3 / 1^2 against 0.09^3 / e^(-200), as far as e^(-100) stands for 0.
    found = Guided(Fixed([0.9, 0.0901, 0.0099]), Fixed([1.0, 0.0, 0.0]), 2.0).step(tokens, None)
    assert found.isfinite().all() and found[0, 0].argmax() == 1
    # What the image itself rules out stays ruled out.
    found = Guided(Fixed([0.5, 0.5, 0.0]), Fixed([0.5, 0.5, 0.0]), 2.0).step(tokens, None)
    assert found.exp().tolist() == [[[0.5, 0.5, 0.0]]]


class Difference(Language):
    """p^2 / q of two languages where p is plausible, normalised."""

    def __init__(self, own: Language, mean: Language):
        self.own, self.mean = own, mean

    def log_probs(self, study, history):
        own, mean = self.own.log_probs(study, history), self.mean.log_probs(study, history)
        ranked = [2 * p - q if p.exp() >= 0.1 * own.exp().max() else p - 1000 for p, q in zip(own, mean, strict=True)]
        return torch.stack(ranked).log_softmax(-1)


def test_guided_beams_are_those_of_the_language_of_the_differences():
    """Beams change places and studies leave: both sessions must follow."""
    from modules.decoding.search import decode

    own, mean = Language(9, 6), Language(10, 6)
    options = DecodingOptions(beam_size=3, max_seq_length=6)
    found = decode(Guided(Session(own, 6), Session(mean, 6), 1.0), 6, torch.device("cpu"), options)
    for study in range(6):
        score, tokens = plain_beam_search(Difference(own, mean), study, 3, 6)[0]
        length = tokens.index(0) + 1 if 0 in tokens else 6
        assert found.tokens[study, 0].tolist()[:length] == tokens[:length]
        assert float(found.scores[study, 0]) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, []) for name in MODELS),
        ("xpronet", ["--xpronet_labels", "reference"]),
        ("visualgpt", ["--visualgpt_compat", "published"]),
        ("hf", ["--decoder_config", LLAMA]),
    ],
)
def test_every_backbone_is_guided_by_its_mean_image(demo, demo_labels, demo_index, name, more):
    """Greedy words are the best of the differences by teacher-forced passes under image and mean image."""
    config, _, objective, loader = build(
        demo, demo_index, "--model_name", name, "--ithn", "off", *OWN_FLAGS[name], *more
    )
    backbone = objective.eval().backbone
    pair = next(iter(loader)).to("cpu").positive
    pair.view_mask[1, 1] = False
    labels = pair.labels if more[:1] == ["--xpronet_labels"] else None
    with torch.no_grad():
        features = backbone.extract(pair.images, pair.view_mask)
        # Little trained, the decoder looks away; features of a large scale make the image matter.
        features = dataclasses.replace(
            features, patches=20 * torch.randn_like(features.patches) * features.patch_mask.unsqueeze(-1)
        )
        features.pooled = backbone_mean(features)
        backbone.mean_patches = 20 * torch.randn_like(features.patches[0])
        options = DecodingOptions(sample_method="greedy", block_trigrams=False, max_seq_length=8, suppress_unk=False)
        plain = backbone.generate(None, features=features, labels=labels, decoding=options)
        guided = backbone.generate(
            None, features=features, labels=labels, decoding=dataclasses.replace(options, guidance=1.5)
        )
        mean = backbone.mean_study(features)
        inputs = torch.cat([torch.zeros_like(guided[:, :1]), guided[:, :-1]], dim=1)
        seen, unseen = (backbone(None, inputs, labels=labels, features=each).log_probs for each in (features, mean))
    assert not torch.equal(plain, guided)
    half = len(backbone.mean_patches) // 2
    assert torch.equal(mean.patches[0], backbone.mean_patches) and mean.patch_mask is features.patch_mask
    assert torch.equal(mean.patches[1, :half], backbone.mean_patches[:half]) and not mean.patches[1, half:].any()
    torch.testing.assert_close(mean.pooled, backbone_mean(mean))
    ranked = (seen + 1.5 * (seen - unseen)).masked_fill(seen < seen.amax(-1, keepdim=True) + math.log(0.1), -math.inf)
    chosen = ranked.gather(-1, guided.unsqueeze(-1)).squeeze(-1)
    before_end = torch.ones_like(guided, dtype=torch.bool)
    before_end[:, 1:] = guided[:, :-1].bool().cummin(dim=1).values
    assert ((ranked.amax(-1) - chosen)[before_end] < 1e-4).all()


def backbone_mean(features: VisualFeatures) -> torch.Tensor:
    """Mean over the patches of the views that are there."""
    there = features.patch_mask.unsqueeze(-1).float()
    return (features.patches * there).sum(1) / there.sum(1)


def test_a_study_of_the_mean_image_is_written_as_without_guidance(demo, demo_index):
    config, _, objective, loader = build(demo, demo_index, "--ithn", "off")
    backbone = objective.eval().backbone
    pair = next(iter(loader)).to("cpu").positive
    options = DecodingOptions(sample_method="greedy", max_seq_length=8)
    with torch.no_grad():
        backbone.mean_patches = backbone.extract(pair.images, pair.view_mask).patches[0]
        mean = backbone.mean_study(backbone.extract(pair.images, pair.view_mask))
        assert torch.equal(
            backbone.generate(None, features=mean, decoding=options),
            backbone.generate(None, features=mean, decoding=dataclasses.replace(options, guidance=2.0)),
        )
        # A further view than the training studies had looks like the first.
        one_view = backbone.mean_patches[: len(backbone.mean_patches) // 2]
        backbone.mean_patches = one_view
        assert torch.equal(backbone.mean_study(mean).patches[0], torch.cat([one_view, one_view]))


def mean_of(batches) -> torch.Tensor:
    class Backbone:
        @staticmethod
        def extract(images, view_mask):
            return VisualFeatures(images, None if view_mask.all() else view_mask, images.mean(1))

    return tester.mean_patches(Backbone, batches, torch.device("cpu"), "float32")


def test_the_mean_image_leaves_absent_views_out():
    class Batch:
        def __init__(self, patches, mask):
            self.positive = type("Pair", (), {"images": torch.tensor(patches), "view_mask": torch.tensor(mask)})

        def to(self, device):
            return self

    batches = [
        Batch([[[1.0], [10.0]], [[2.0], [99.0]]], [[True, True], [True, False]]),
        Batch([[[6.0], [20.0]]], [[True, True]]),
    ]
    assert mean_of(batches).tolist() == [[3.0], [15.0]]
    # One study of seventeen has a second view: its mean would be that patient's, so it is that of all, 17 + 10 by 18.
    rare = [Batch([[[1.0], [0.0]]] * 16, [[True, False]] * 16), Batch([[[1.0], [10.0]]], [[True, True]])]
    assert mean_of(rare).tolist() == [[1.0], [1.5]]
    with pytest.raises(InputError, match="the mean training image is not finite"):
        mean_of([Batch([[[math.inf], [1.0]]], [[True, True]])])


def test_the_mean_image_is_of_studies_spread_over_the_training_split(demo, demo_index, monkeypatch):
    config, data, objective, _ = build(demo, demo_index, "--ithn", "off", "--guidance", "1")
    extractor, device = objective.backbone.visual_extractor, torch.device("cpu")
    ids = [study.id for study in data.annotation.splits["train"]]
    with training_studies(config, data, extractor, device) as batches:
        assert [name for batch in batches for name in batch.ids] == ids
    monkeypatch.setattr("modules.run.data.MEAN_STUDIES", 3)
    with training_studies(config, data, extractor, device) as batches:
        assert [name for batch in batches for name in batch.ids] == [ids[turn * len(ids) // 3] for turn in range(3)]
    with training_studies(dataclasses.replace(config, guidance=0.0), data, extractor, device) as batches:
        assert batches is None


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    return module.main()


def rows_of(checkpoint: Path, out: Path, *flags: str) -> str:
    """res.csv as main_test.py writes it for ``checkpoint``."""
    from modules.flags import parse_flags
    from modules.run.testing import run_testing

    argv = ["--load", str(checkpoint), "--save_dir", str(out), "--record_dir", str(out), *flags]
    run_testing(*parse_flags(argv, "main_test.py", ""))
    return (out / "res.csv").read_text()


def predicted(monkeypatch, checkpoint: Path, demo: Path, folder: Path) -> list[str]:
    """Reports of predict.py for the demo's test studies, a folder of images each, in the annotation's order."""
    studies = json.loads((demo / "annotation.json").read_text())["test"]
    for study in studies:
        for number, path in enumerate(study["image_path"]):
            place = folder / "studies" / study["id"] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(demo / "images" / path, place)
    out = folder / "out.json"
    run(monkeypatch, predict, "--load", checkpoint, "--group", "folder", "--json", out, folder / "studies")
    reports = {Path(row["id"]).name: row["report"] for row in json.loads(out.read_text())["reports"]}
    return [reports[study["id"]] for study in studies]


@pytest.mark.thorough
def test_from_training_to_a_report_for_a_loose_image(demo, train, tmp_path, monkeypatch):
    """The checkpoint holds the mean image that it was tested with, and the shared folder does too."""
    folder = train("--guidance", "1.5", "--save_dir", tmp_path / "guided")
    best = folder / "model_best.pth"
    content = load_checkpoint(best)
    assert content["mean_patches"].shape == (2, 512) and content["config"]["guidance"] == 1.5
    written = (folder / "res.csv").read_text()
    assert "decoded with guidance 1.5" in (folder / "report.html").read_text()
    assert rows_of(best, tmp_path / "again") == written
    assert rows_of(best, tmp_path / "plain", "--guidance", "0") != written

    run(monkeypatch, export, best, "--out", tmp_path / "shared")
    run(monkeypatch, export, tmp_path / "shared", "--out", tmp_path / "back.pth")
    rows = [line.split(",")[0] for line in written.splitlines()]
    for name, checkpoint in (("own", best), ("back", tmp_path / "back.pth")):
        reports = predicted(monkeypatch, checkpoint, demo, tmp_path / name)
        assert reports == rows[-len(reports) :]

    damaged = dict(content, mean_patches=content["mean_patches"][:, :3])
    write_checkpoint(tmp_path / "damaged.pth", damaged)
    with pytest.raises(InputError, match="mean_patches have width 3, the visual extractor's is 512"):
        run(monkeypatch, predict, "--load", tmp_path / "damaged.pth", demo / "images")


def test_what_cannot_be_guided_is_told(trained, demo, demo_index, monkeypatch):
    assert load_checkpoint(trained / "model_best.pth")["mean_patches"] is None
    with pytest.raises(InputError, match="--guidance 1: .* has no mean training image: trained without"):
        run(monkeypatch, predict, "--load", trained / "model_best.pth", "--guidance", "1", demo / "images")
    monkeypatch.setitem(MODELS, "bag", "tests.bag_of_patches.BagOfPatches")
    with pytest.raises(InputError, match=r"--guidance 1: --model_name bag writes reports by a generate\(\) of its own"):
        build(demo, demo_index, "--model_name", "bag", "--guidance", "1")
    with pytest.raises(InputError, match="--guidance -1"):
        build(demo, demo_index, "--guidance", "-1")


@pytest.mark.parametrize(
    "damage",
    [
        "words",
        torch.zeros(3),
        torch.full((2, 512), math.nan),
        torch.zeros(2, 512, dtype=torch.int64),
        torch.zeros(2, 512).to_sparse(),
        torch.zeros(0, 512),
    ],
)
def test_a_damaged_mean_image_is_told(tmp_path, damage):
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "mean_patches": damage}, tmp_path / "damaged.pth")
    told = (
        r"damaged.pth: (its mean_patches is not a table of finite numbers|refused, it holds a tensor that is not dense)"
    )
    with pytest.raises(InputError, match=told):
        load_checkpoint(tmp_path / "damaged.pth")


@pytest.mark.thorough
def test_only_a_validated_epoch_keeps_its_mean_image(train, tmp_path):
    """The checkpoints within the second epoch and before its validation have weights that no mean was made with."""
    folder = train("--guidance", "1", "--epochs", "2", "--keep_epochs", "true", "--save_dir", tmp_path / "kept")
    assert load_checkpoint(folder / "epoch_0002.pth")["mean_patches"] is None
    assert load_checkpoint(folder / "current_checkpoint.pth")["mean_patches"] is not None


def test_unreadable_images_of_the_mean_are_replaced_whatever_their_share(demo, demo_index, tmp_path):
    """Two of fourteen studies are more than a split may have; of the sample for the mean they may be."""
    shutil.copytree(demo / "images", tmp_path / "images")
    config, data, objective, _ = build(
        demo,
        demo_index,
        "--ithn",
        "off",
        "--guidance",
        "1",
        "--on_bad_image",
        "skip",
        "--image_dir",
        str(tmp_path / "images"),
    )
    for study in data.annotation.splits["train"][:2]:
        (tmp_path / "images" / study.image_paths[0]).write_bytes(b"no image")
    with training_studies(config, data, objective.backbone.visual_extractor, torch.device("cpu")) as batches:
        found = list(batches)
    assert sum(batch.replaced for batch in found) == 2 and sum(len(batch.ids) for batch in found) == 14


def test_of_shards_the_first_studies_make_the_mean(demo, demo_index, tmp_path, monkeypatch):
    from scripts import make_shards

    run(
        monkeypatch,
        make_shards,
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--out",
        tmp_path / "shards",
    )
    config, data, objective, _ = build(demo, demo_index, "--ithn", "off", "--guidance", "1", "--batch_size", "4")
    config = dataclasses.replace(config, shards=str(tmp_path / "shards"), negative_index="")
    monkeypatch.setattr("modules.run.data.MEAN_STUDIES", 7)
    with training_studies(config, data, objective.backbone.visual_extractor, torch.device("cpu")) as batches:
        assert len(batches) == 2
        assert [len(batch.ids) for batch in batches] == [len(batch.ids) for batch in batches] == [4, 4]


@pytest.mark.parametrize("rule", [{"min_length": 2}, {"no_repeat_ngram_size": 1}])
def test_a_rule_that_forbids_the_likeliest_word_costs_nothing(rule):
    """With an image that changes nothing, reports are as likely as without guidance: words are not left behind where
    the only plausible one is forbidden."""
    probabilities = [0.95, 0.03, 0.02] if "min_length" in rule else [0.04, 0.95, 0.01]
    found = []
    for weight in (0.0, 0.5):
        session = Fixed(probabilities)
        guided = Guided(session, Fixed(probabilities), weight) if weight else session
        options = DecodingOptions(max_seq_length=4, beam_size=2, guidance=weight, **rule)
        found.append(decode(guided, 1, torch.device("cpu"), options))
    # Guided probabilities are divided by what plausible words have together, 0.95 here.
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=0.2, rtol=0)


def test_a_suppressed_word_does_not_decide_what_is_plausible(demo, demo_index):
    _, _, objective, loader = build(demo, demo_index, "--model_name", "r2gencmn", "--ithn", "off")
    backbone, pair = objective.eval().backbone, next(iter(loader)).to("cpu").positive
    options = DecodingOptions(max_seq_length=4, guidance=0.5)
    with torch.no_grad():
        backbone.encoder_decoder.logit.bias[backbone.unk_id] += 50
        features = backbone.extract(pair.images, pair.view_mask)
        backbone.mean_patches = torch.zeros_like(features.patches[0])
        found = backbone.search(None, features=features, decoding=options)
    assert (found.tokens != backbone.unk_id).all() and (found.scores > -900).all()


@pytest.mark.thorough
def test_the_best_model_of_an_epoch_judged_by_nll_has_its_own_mean_image(train, tmp_path):
    folder = train(
        *("--guidance", "1", "--epochs", "4", "--eval_every", "4", "--monitor_metric", "nll", "--lr_ed", "1e-3"),
        *("--start_eval_epoch", "1", "--keep_epochs", "true", "--save_dir", tmp_path / "judged"),
    )
    best = load_checkpoint(folder / "model_best.pth")
    assert best["mean_patches"] is not None
    means = [load_checkpoint(folder / f"epoch_000{epoch}.pth")["mean_patches"] for epoch in range(1, 4)]
    known = [mean for mean in means if mean is not None]
    assert all(not torch.equal(known[0], mean) for mean in known[1:])
