"""XProNet beyond the published vectors: what studies read, whose labels are used where, auxiliary losses, runs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.xpronet import Settings, XProNet, own_columns
from modules.config import Config
from modules.data.batches import Batch, Pair
from modules.data.tokenizers import Tokenizer
from modules.decoding.options import DecodingOptions
from modules.ithn.objective import Objective
from modules.ithn.weights import load_published_state
from modules.layers.prototypes import label_contrastive_loss, prototypes_of, selected_attention, with_no_finding
from modules.run.build import build_backbone
from modules.runtime import distributed
from modules.runtime.errors import InputError
from tests.gloo_support import run_together

torch.set_num_threads(1)
CLASSES, EACH, WORDS = 5, 3, 12
LABELS = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 0]])


class Extractor(nn.Module):
    """Each view's colours as two patches of width 3; absent views are 0."""

    width = 3

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images, view_mask=None):
        patches = self.gain * images.mean(-1).transpose(2, 3).flatten(1, 2)  # (B, N * H, 3), H = 2
        if view_mask is None or view_mask.all():
            return patches, None, patches.mean(1)
        mask = view_mask.repeat_interleave(2, dim=1)
        patches = patches * mask.unsqueeze(-1)
        return patches, mask, patches.sum(1) / mask.sum(1, keepdim=True)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    options = {
        "num_cluster": CLASSES,
        "num_protype": EACH,
        "d_img_ebd": 4,
        "d_txt_ebd": 2,
        "topk": 4,
        "d_model": 8,
        "d_ff": 8,
        "num_heads": 2,
        "num_layers": 2,
    }
    apart = {"no_finding": changes.pop("no_finding", 4), "init_prototypes": changes.pop("init_prototypes", None)}
    settings = Settings(**options | changes)
    model = XProNet(visual_extractor=Extractor(), num_ids=WORDS, settings=settings, **apart)
    # Small random weights tell the same report for every image: sharpen the words.
    nn.init.normal_(model.encoder_decoder.logit.weight, std=2.0)
    return model.eval()


def batch(rows=3, length=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 2, 3, 2, 2, generator=generator)
    tokens = torch.randint(1, WORDS, (rows, length), generator=generator)
    tokens[:, 0] = 0
    return images, tokens


DECODING = DecodingOptions(beam_size=2, max_seq_length=8)


def test_a_study_reads_the_prototypes_of_its_labels_and_no_others():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 7, 4, generator=generator, requires_grad=True)
    keys = torch.randn(2, CLASSES * EACH, 4, generator=generator, requires_grad=True)
    values = torch.randn(2, CLASSES * EACH, 4, generator=generator, requires_grad=True)
    selected = prototypes_of(LABELS, CLASSES * EACH)
    found = selected_attention(query, keys, values, selected, 4)
    for i, labels in enumerate(LABELS):
        rows = [c * EACH + n for c in range(CLASSES) if labels[c] for n in range(EACH)]
        assert selected[i].nonzero().squeeze(1).tolist() == rows
        scores = query[i] @ keys[:, rows].transpose(-1, -2) / 4**0.5
        best, order = scores.topk(min(4, len(rows)), dim=-1)  # the second study has three prototypes only
        read = values[:, rows].unsqueeze(1).expand(-1, 7, -1, -1).gather(2, order.unsqueeze(-1).expand(-1, -1, -1, 4))
        torch.testing.assert_close(found[i], (best.softmax(-1).unsqueeze(-1) * read).sum(2))
    found.square().sum().backward()
    unread = torch.tensor([c * EACH + n for c in (4,) for n in range(EACH)])
    assert not keys.grad[:, unread].any() and not values.grad[:, unread].any()
    assert torch.isfinite(query.grad).all()


def test_half_precision_takes_its_softmax_in_float32():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 2, 7, 4), (2, 15, 4), (2, 15, 4))
    )
    selected = prototypes_of(LABELS, 15)
    found = selected_attention(query, keys, values, selected, 4)
    assert found.dtype == torch.bfloat16
    exact = selected_attention(query.float(), keys.float(), values.float(), selected, 4)
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)


def test_a_study_without_labels_is_no_finding():
    labels = torch.stack([torch.zeros(CLASSES), LABELS[0]])
    assert with_no_finding(labels, 3).tolist() == [[0, 0, 0, 1, 0], LABELS[0].tolist()]
    model, (images, tokens) = build(no_finding=2), batch(1)
    nothing = model(images, tokens, labels=torch.zeros(1, CLASSES))
    named = model(images, tokens, labels=torch.eye(CLASSES)[2:3])
    assert torch.equal(nothing.log_probs, named.log_probs)
    assert nothing.auxiliary == named.auxiliary


def test_contrastive_loss_in_numbers():
    features = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    labels = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    # Cosines: .6 between the first two, which share a class and differ in one of three labels: target 1.5^(-1/3).
    # The third shares none: its cosines 0 and -.8 stay below the margin. A study with itself is at its target of 1.
    expected = 2 * (1.5 ** (-1 / 3) - 0.6) / 9
    assert label_contrastive_loss(features, labels, 0.4).item() == pytest.approx(expected, abs=1e-6)
    # Both pairs of the third are pushed where the margin is below their cosine.
    expected += 2 * ((0 + 0.9) + (-0.8 + 0.9)) / 9
    assert label_contrastive_loss(features, labels, -0.9).item() == pytest.approx(expected, abs=1e-6)


def test_generation_does_not_see_the_given_labels():
    model, (images, _) = build(), batch()
    model.label_head.weight.data.zero_()
    model.label_head.bias.data = torch.tensor([-1.0, 2.0, -1.0, 0.5, -1.0])  # classes 1 and 3 for every study
    own = model.generate(images, decoding=DECODING)
    assert torch.equal(own, model.generate(images, labels=LABELS, decoding=DECODING))
    told = build(xpronet_labels="reference")
    told.load_state_dict(model.state_dict())
    predicted = torch.tensor([[0.0, 1, 0, 1, 0]]).expand(3, -1)
    assert torch.equal(own, told.generate(images, labels=predicted, decoding=DECODING))
    assert not torch.equal(own, told.generate(images, labels=LABELS, decoding=DECODING))
    with pytest.raises(ValueError, match="needs the labels of every study"):
        told.generate(images, decoding=DECODING)
    # Nothing above one half: No Finding.
    model.label_head.bias.data.fill_(-0.1)
    assert torch.equal(
        model.generate(images, decoding=DECODING),
        told.generate(images, labels=torch.zeros(3, CLASSES), decoding=DECODING),
    )


def test_each_study_is_decoded_as_if_alone():
    model, (images, _) = build(xpronet_labels="reference"), batch()
    together = model.search(images, labels=LABELS, decoding=DECODING)
    for i in range(3):
        alone = model.search(images[i : i + 1], labels=LABELS[i : i + 1], decoding=DECODING)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.scores[0], together.scores[i])
    assert len({tuple(row.tolist()) for row in together.tokens[:, 0]}) > 1


def test_incremental_decoding_agrees_with_teacher_forcing():
    model, (images, _) = build(xpronet_labels="reference"), batch()
    found = model.search(images, labels=LABELS, decoding=DecodingOptions(beam_size=1, max_seq_length=6))
    inputs = F.pad(found.tokens[:, 0, :-1], (1, 0))
    taught = model(images, inputs, labels=LABELS).log_probs.gather(-1, found.tokens[:, 0].unsqueeze(-1)).squeeze(-1)
    before_end = (found.tokens[:, 0].cumprod(1) > 0).float()
    torch.testing.assert_close(found.log_probs[:, 0] * before_end, taught * before_end)
    assert before_end.sum() > 6


def test_absent_views_change_nothing():
    model, (images, tokens) = build(xpronet_labels="reference"), batch()
    view_mask = torch.tensor([[True, False]] * 3)
    partly = model(images, tokens, view_mask=view_mask, labels=LABELS)
    alone = model(images[:, :1], tokens, labels=LABELS)
    torch.testing.assert_close(partly.log_probs, alone.log_probs)
    for name, loss in alone.auxiliary.items():
        torch.testing.assert_close(partly.auxiliary[name], loss)


def test_hard_negatives_add_nothing_to_the_auxiliary_losses():
    model = build()
    images, tokens = batch(6, length=9)
    tokens[:3, 6:] = 0  # the positives are shorter than the negatives that they are joined with
    labels = torch.cat([LABELS, LABELS.flip(0)])
    together = model(images, tokens, labels=labels, supervised_rows=3)
    alone = model(images[:3], tokens[:3, :6], labels=LABELS)
    assert set(alone.auxiliary) == {"img_con", "txt_con", "label"}
    for name, loss in alone.auxiliary.items():
        torch.testing.assert_close(together.auxiliary[name], loss)
    torch.testing.assert_close(together.log_probs[:, :6], alone.log_probs)
    assert model(images, tokens, labels=labels, supervised_rows=0).auxiliary == {}
    # The negatives are read with labels of their own.
    other = model(images, tokens, labels=torch.cat([LABELS, LABELS]), supervised_rows=3)
    assert not torch.equal(other.report_features[3:], together.report_features[3:])
    assert torch.equal(other.report_features[:3], together.report_features[:3])


def test_own_columns_end_with_the_last_word():
    assert own_columns(torch.tensor([[0, 5, 0, 0], [0, 0, 7, 0]])).tolist() == [[True, True, True, False]]
    assert own_columns(torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[True, False, False]]


def test_the_head_is_trained_beside_the_model():
    model, (images, tokens) = build(label_loss_weight=0.5, weight_img_con_loss=0.0, weight_txt_con_loss=0.0), batch()
    output = model.train()(images, tokens, labels=LABELS)
    assert set(output.auxiliary) == {"label"}
    features = images.mean(-1).mean((1, 3))
    loss = F.binary_cross_entropy_with_logits(model.label_head(features), LABELS)
    torch.testing.assert_close(output.auxiliary["label"], 0.5 * loss)
    output.auxiliary["label"].backward()
    assert model.label_head.bias.grad.abs().min() > 0 and model.visual_extractor.gain.grad != 0
    with pytest.raises(ValueError, match="XProNet is trained with labels"):
        model(images, tokens)
    # Outside training, where no labels are given, those of the head are used and no auxiliary loss is.
    unlabelled = model.eval()(images, tokens)
    predicted = model(images, tokens, labels=(model.label_head(features) > 0).float())
    assert unlabelled.auxiliary == {} and torch.equal(unlabelled.log_probs, predicted.log_probs)


def test_initial_prototypes_are_taken_over():
    rows = torch.randn(CLASSES * EACH, 6)
    assert torch.equal(build(init_prototypes=rows).encoder_decoder.protypes, rows)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"topk": 16}, "--topk 16: --num_cluster 5 times --num_protype 3 are only 15 prototypes"),
        ({"no_finding": 5}, "no_finding 5"),
        ({"xpronet_labels": "given"}, "--xpronet_labels given: must be one of predicted, reference"),
    ],
)
def test_options_that_do_not_fit(changes, reason):
    with pytest.raises(ValueError, match=reason):
        build(**changes)


def published_weights(prefix=""):
    return {
        prefix + name: value for name, value in build(seed=7).state_dict().items() if not name.startswith("label_head.")
    }


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_have_no_head(prefix):
    objective = Objective(build(xpronet_labels="reference"))
    missing = load_published_state(objective, published_weights(prefix))
    assert missing == ["backbone.label_head.weight", "backbone.label_head.bias"]
    assert torch.equal(objective.backbone.encoder_decoder.protypes, build(seed=7).encoder_decoder.protypes)
    with pytest.raises(InputError, match="it has no label head.*give --xpronet_labels reference"):
        load_published_state(Objective(build()), published_weights(prefix))
    with_less = {name: value for name, value in published_weights().items() if "logit.bias" not in name}
    with pytest.raises(InputError, match="1 entries are missing, the first is encoder_decoder.logit.bias"):
        load_published_state(objective, with_less)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, "--num_cluster 20: the labels have 14 classes.*give --num_cluster 14"),
        ({"num_cluster": 14, "num_protype": 2}, "--topk 32: --num_cluster 14 times --num_protype 2 are only 28"),
        ({"num_cluster": 14, "label_loss_weight": 0.0}, "--label_loss_weight 0 trains no predicted labels"),
    ],
)
def test_flags_that_do_not_fit(flags, reason):
    with pytest.raises(InputError, match=reason):
        build_backbone(
            Config(model_name="xpronet", **flags), nn.Identity(), Tokenizer(["<unk>"], "iu_xray"), pretrained=False
        )


# ---- through main_train.py and main_test.py, on the tiny synthetic data set


@pytest.fixture
def run(train, demo_labels, demo_index):
    def with_flags(*flags):
        return train(
            "--model_name",
            "xpronet",
            "--label_path",
            demo_labels,
            "--init_protypes_path",
            "",
            "--num_cluster",
            14,
            "--num_protype",
            2,
            "--d_img_ebd",
            4,
            "--d_txt_ebd",
            2,
            "--floors",
            "false",
            "--negative_index",
            demo_index,
            *flags,
        )

    return with_flags


@pytest.mark.thorough
def test_run_with_predicted_labels(run, tmp_path, monkeypatch):
    from modules.data.batches import Batch

    seen = []
    monkeypatch.setattr(Batch, "to", lambda self, device, to=Batch.to: seen.append(self) or to(self, device))
    folder = run()
    # Labels reach the training batches, and no batch that reports are generated for.
    labelled = [split.positive.labels is not None for split in seen]
    assert labelled == sorted(labelled, reverse=True) and True in labelled and False in labelled
    history = json.loads((folder / "history.json").read_text())
    assert all(history[0][f"train_{name}"] > 0 for name in ("img_con", "txt_con", "label", "contrastive"))
    results = json.loads((folder / "results.json").read_text())
    assert not [name for name in results["test"]["model"] if "reference" in name]
    assert math.isfinite(results["test"]["model"]["nll"])


@pytest.mark.thorough
def test_run_with_reference_labels(run, monkeypatch):
    from modules.training.optimizers import PlateauOnAny

    watched = []
    monkeypatch.setattr(PlateauOnAny, "step", lambda self, scores: watched.append((self.metrics, set(scores))))
    folder = run(
        "--xpronet_labels",
        "reference",
        "--epochs",
        2,
        "--lr_scheduler",
        "ReduceLROnPlateau",
        "--plateau_patience",
        0,
        "--monitor_metric",
        "nll",
    )
    log = (folder / "train.log").read_text()
    assert log.count("labels that come from the reference reports") == 1
    history = json.loads((folder / "history.json").read_text())
    scores = [name for name in history[0] if name.startswith("val_")]
    assert scores and all("reference_labels" in name for name in scores)
    results = json.loads((folder / "results.json").read_text())
    for values in (results["test"]["model"], results["val"], results["variety"]["model"]):
        assert values and all("reference_labels" in name for name in values)
    # Model selection and schedule follow the scores under these names.
    assert len(watched) == 2
    assert all(
        metrics == ("BLEU_3_reference_labels", "BLEU_4_reference_labels") and set(metrics) <= names
        for metrics, names in watched
    )
    nll = [row["val_nll_reference_labels"] for row in history]
    assert results["best_epoch"] == 1 + nll.index(min(nll))
    assert "BLEU-4 reference_labels" in (folder / "report.html").read_text()
    assert "test, model" in log and "f1_micro_14_uncertain_negative_reference_labels_full=" in log


def untrained_parts(label_loss_weight: float) -> list[str]:
    """Trains two steps, of which the second fails where another process waits for a gradient; those without one."""
    objective = Objective(build(xpronet_labels="reference", label_loss_weight=label_loss_weight)).train()
    images, tokens = batch()
    pair = Pair(images, torch.ones(3, 2, dtype=torch.bool), tokens, torch.ones_like(tokens, dtype=torch.bool), LABELS)
    given = Batch(pair, None, None, torch.arange(3), torch.arange(3), [""] * 3, [""] * 3)
    parallel = distributed.data_parallel(objective)
    for _ in range(2):
        parallel(given, 1)["loss"].backward()
    return [name for name, parameter in objective.named_parameters() if parameter.grad is None]


def test_processes_train_without_a_loss_of_the_labels(tmp_path):
    head = ["backbone.label_head.weight", "backbone.label_head.bias"]
    assert run_together(untrained_parts, 2, tmp_path, 0.0) == [head, head]
    assert untrained_parts(1.0) == []
