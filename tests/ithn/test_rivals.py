"""Rivals of ITHN by their flags: the objective against the equations written out, and two processes against one."""

from dataclasses import replace

import pytest
import torch

from modules.ithn.objective import LABELS
from modules.ithn.synthesis import STRATEGIES
from modules.labels.rules import CLASSES
from modules.runtime import distributed
from tests.gloo_support import run_together
from tests.tiny_backbone import make_objective, rows_of, tiny_batch

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7, 3, 8], [6, 3, 12, 5, 4, 4]
IDF = torch.linspace(0, 2, 11, dtype=torch.float64)
MASKED = "equal labels and texts are no columns"
RIVALS = {
    "negatives as columns": {"strategy": "columns"},
    "ITHN's as columns": {"strategy": "ithn", "negatives_as": "columns"},
    "MoCHi's as columns": {"strategy": "mochi", "negatives_as": "columns", "mask_identical": True},
    "sigmoid": {"strategy": "contrastive", "contrastive_form": "sigmoid"},
    "sigmoid with columns": {"strategy": "columns", "contrastive_form": "sigmoid"},
    "debiased": {"strategy": "contrastive", "contrastive_form": "debiased"},
    "hardness-weighted": {"strategy": "columns", "contrastive_form": "hardness_weighted"},
    "triplet": {"strategy": "columns", "contrastive_form": "triplet"},
    "the paper's triplet": {"strategy": "ithn", "contrastive_form": "paper_triplet"},
    "soft targets of labels": {"strategy": "contrastive", "contrastive_targets": "labels", "target_temperature": 0.5},
    "soft targets of words": {"strategy": "columns", "contrastive_targets": "text"},
    "equal labels count twice": {"strategy": "contrastive", "same_label_weight": 2.0},
    "equal labels are left out": {"strategy": "ithn", "same_label_weight": 0.0},
    "MoCHi as published": {"strategy": "mochi_queue", "queue_size": 9, "queue_hardest": 8},
    "MoCHi as published, equal labels count twice": {
        **{"strategy": "mochi_queue", "queue_size": 9, "queue_hardest": 8},
        "same_label_weight": 2.0,
    },
    MASKED: {"strategy": "columns", "mask_identical": True, "same_label_weight": 0.0},
}
AVERAGED = {"equal labels are left out"}  # Eq. 11, which does not go with the encoder's features
ON_ENCODER = [name for name in RIVALS if name not in AVERAGED]


def build(**settings):
    return make_objective(alpha=0.5, idf=IDF if settings.get("contrastive_targets") == "text" else None, **settings)


def labelled(batch):
    """With labels that some studies share, and a study without a negative."""
    labels = torch.zeros_like(batch.positive.labels)
    labels[[0, 2, 5], 1] = 1
    labels[[1, 2], 3] = 1
    batch.has_negative[4] = False
    return replace(batch, positive=replace(batch.positive, labels=labels))


@pytest.fixture
def batch():
    return labelled(tiny_batch(LENGTHS, NEGATIVE_LENGTHS))


def features_of(objective, batch):
    pairs = [batch.positive, batch.negative]
    return objective._features(pairs, objective._passes(pairs))


def alike(batch, i, j, of_negatives, by_labels):
    """Whether row j is no negative of anchor i: the same text or study, or, ``by_labels``, the same labels."""
    if by_labels:
        other = batch.negative.labels[j] if of_negatives else batch.positive.labels[j]
        return bool((batch.positive.labels[i] == other).all())
    return int(batch.report_key[i]) == int(batch.negative_key[j] if of_negatives else batch.report_key[j])


def columns_by_hand(objective, batch, harder_of, left_out=lambda i, j, of_negatives: False, weight=lambda i, j, _: 1.0):
    """Each image against all reports and all harder negatives, each report against all images and mined ones."""
    z, negative_z, u, negative_u = features_of(objective, batch)
    harder = harder_of(z, u, negative_u)
    harder = harder / harder.norm(dim=1, keepdim=True)
    total, scale = 0.0, objective.temp_1.exp()
    for anchors, partners, further in ((z, u, harder), (u, z, negative_z)):
        for i in range(6):
            terms = [torch.exp(scale * (anchors[i] @ partners[i]))]
            for j in range(6):
                if j != i and not left_out(i, j, False):
                    terms.append(weight(i, j, False) * torch.exp(scale * (anchors[i] @ partners[j])))
                if j != 4 and not left_out(i, j, True):
                    terms.append(weight(i, j, True) * torch.exp(scale * (anchors[i] @ further[j])))
            total = total - torch.log(terms[0] / sum(terms))
    return total / 12


def require_equal(objective, batch, expected):
    """The objective's loss, of the contrastive term alone, is ``expected`` in value and gradient."""
    loss = objective(batch, 4)["loss"]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    known = [value for name, value in objective.named_parameters() if value.requires_grad]
    found, by_hand = (torch.autograd.grad(of, known, allow_unused=True) for of in (loss, expected))
    for parameter, *pair in zip(known, found, by_hand, strict=True):
        own, hand = (torch.zeros_like(parameter) if value is None else value for value in pair)
        torch.testing.assert_close(own, hand, rtol=0, atol=1e-10)


ALONE = {"contrastive_weight": 1.0, "cosine_weight": 0.0, "ce_weight": 0.0}


@pytest.mark.parametrize("strategy", ["columns", "prior", "ithn", "mochi"])
def test_columns_by_hand(batch, strategy):
    """A mined report is trained as in NegCLIP and VSE++, a synthesised one is a constant."""
    objective = build(strategy=strategy, negatives_as="columns", **ALONE)
    hardness = 1 - 2.718281828459045 ** (-0.5 * 3)

    def harder_of(z, u, negative_u):
        made = STRATEGIES[strategy].synthesise(z, u, negative_u, hardness)
        return made if strategy in ("columns", "prior") else made.detach()

    require_equal(objective, batch, columns_by_hand(objective, batch, harder_of))
    constant = build(strategy=strategy, negatives_as="columns", detach_negative=True, **ALONE)
    require_equal(constant, batch, columns_by_hand(constant, batch, lambda *own: harder_of(*own).detach()))


def restrained(batch):
    """With texts and labels that anchors share with other studies' negatives."""
    labels = torch.zeros_like(batch.negative.labels)
    labels[[1, 3], 1] = 1  # those of studies 0 and 5
    labels[0, 5] = 1
    return replace(
        batch,
        report_key=torch.tensor([3, 1, 2, 3, 4, 5]),
        negative_key=torch.tensor([9, 3, 1, 8, 7, 5]),
        negative=replace(batch.negative, labels=labels),
    )


@pytest.mark.parametrize(
    ("given", "by_labels", "weight"),
    [
        ({"mask_identical": True}, False, 0.0),
        ({"same_label_weight": 0.0}, True, 0.0),
        ({"same_label_weight": 2.5}, True, 2.5),
    ],
)
def test_texts_and_labels_restrain_columns_too(batch, given, by_labels, weight):
    batch = restrained(batch)
    objective = build(strategy="columns", **given, **ALONE)

    def same(i, j, of_negatives):
        return alike(batch, i, j, of_negatives, by_labels)

    expected = columns_by_hand(
        objective,
        batch,
        lambda z, u, negative_u: negative_u,
        left_out=lambda *pair: weight == 0 and same(*pair),
        weight=lambda *pair: weight if same(*pair) else 1.0,
    )
    require_equal(objective, batch, expected)


@pytest.mark.parametrize("weight", [1.0, 0.0, 2.5])
def test_the_queues_loss_by_hand(batch, weight):
    """The second step: negatives of the batch, those of the queue, and mixtures of its hardest, which are constants."""
    first, second = rows_of(restrained(batch), [0, 1, 3, 4]), rows_of(restrained(batch), [0, 2, 5])
    objective = build(strategy="mochi_queue", queue_size=6, queue_hardest=8, same_label_weight=weight, **ALONE)
    old_z, old_u = (
        value.detach() for value in objective._features([first.positive], objective._passes([first.positive]))
    )
    objective(first, 4)
    (one, other, share), (rank, _, own_share) = objective.queue._draw(3, 8), objective.queue._draw(3, 1, first=3)
    z, u = objective._features([second.positive], objective._passes([second.positive]))
    total, scale, mixtures = 0.0, objective.temp_1.exp(), 0

    def weight_of(i, held, key, labels):
        if held and int(second.report_key[i]) == int(key):
            return 0.0
        return weight if bool((second.positive.labels[i] == labels).all()) else 1.0

    for anchors, partners, queue in ((z, u, old_u), (u, z, old_z)):
        for i, anchor in enumerate(anchors):
            own = torch.exp(scale * (anchor @ partners[i]))
            terms = [own]
            for j in range(3):
                if j != i:
                    counts = weight_of(i, False, second.report_key[j], second.positive.labels[j])
                    terms.append(counts * torch.exp(scale * (anchor @ partners[j])))
            counted = [weight_of(i, True, first.report_key[j], first.positive.labels[j]) for j in range(4)]
            terms += [counts * torch.exp(scale * (anchor @ queue[j])) for j, counts in enumerate(counted)]
            nearness = (queue @ anchor.detach()).tolist()
            ranked = sorted((j for j in range(4) if counted[j]), key=nearness.__getitem__, reverse=True)
            pairs = [(int(one[i, m]), int(other[i, m]), share[i, m]) for m in range(8)]
            mixed = [s * queue[ranked[a]] + (1 - s) * queue[ranked[b]] for a, b, s in pairs if max(a, b) < len(ranked)]
            if int(rank[i, 0]) < len(ranked):
                s = own_share[i, 0] / 2
                mixed.append(s * anchor.detach() + (1 - s) * queue[ranked[int(rank[i, 0])]])
            mixtures += len(mixed)
            terms += [torch.exp(scale * (anchor @ (mixture / mixture.norm()))) for mixture in mixed]
            total = total - torch.log(own / sum(terms))
    assert mixtures > 6
    require_equal(objective, second, total / 6)


@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_labels_restrain_the_queue_too(batch, weight):
    """Without mixtures, which have no labels: the queue is left with one sample of another anchor's labels."""
    first, second = rows_of(batch, [0, 1, 3]), rows_of(batch, [2, 4, 5])
    objective = build(strategy="mochi_queue", queue_size=3, queue_hardest=1, same_label_weight=weight, **ALONE)
    old = [value.detach() for value in objective._features([first.positive], objective._passes([first.positive]))]
    objective(first, 4)
    keys, labels = second.report_key, second.positive.labels
    z, u = objective._features([second.positive], objective._passes([second.positive]))
    found = objective.queue.further(z, u, keys, 1.0, labels, weight)
    for i in range(3):
        for column, held in enumerate(old[1]):
            same = bool((labels[i] == first.positive.labels[column]).all())
            assert bool(found.count[i, column]) == (weight != 0 or not same)
            score = z[i] @ held + (torch.tensor(weight).log() if weight and same else 0.0)
            torch.testing.assert_close(found.of_images[i, column], score, rtol=0, atol=1e-7)
    assert objective.queue.labels.shape == (3, LABELS) and len(CLASSES) == LABELS
    assert {bool(value) for value in found.count[:, :3].flatten()} == ({True} if weight else {True, False})


def test_a_study_whose_negative_says_the_same_has_no_triplet(batch):
    batch = restrained(batch)
    plain, masked = (
        build(strategy="ithn", contrastive_form="paper_triplet", mask_identical=mask)(batch, 4)["contrastive"]
        for mask in (False, True)
    )
    only = replace(batch, has_negative=batch.has_negative & (batch.report_key != batch.negative_key))
    expected = build(strategy="ithn", contrastive_form="paper_triplet")(only, 4)["contrastive"]
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)
    assert float(plain) != float(masked)


def test_a_study_that_is_not_finite_is_no_negative_of_later_steps(batch):
    objective = build(**RIVALS["MoCHi as published"])
    objective(batch, 4)
    broken = replace(batch, positive=replace(batch.positive, images=batch.positive.images.clone()))
    broken.positive.images[2] = torch.nan
    assert not objective(broken, 4)["loss"].isfinite()
    assert objective.queue.known.sum() == 8
    loss = objective(batch, 4)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_the_papers_triplet_is_the_hinge_of_eq_4(batch):
    objective = build(strategy="ithn", contrastive_form="paper_triplet", triplet_margin=0.7)
    found = objective(batch, 4)["contrastive"]
    z, _, u, negative_u = objective._features(
        [batch.positive, batch.negative], objective._passes([batch.positive, batch.negative])
    )
    harder = STRATEGIES["ithn"].synthesise(z, u, negative_u, 1 - 2.718281828459045 ** (-0.5 * 3))
    harder = harder / harder.norm(dim=1, keepdim=True)
    hinges = [
        max(float((z[i] - u[i]) @ (z[i] - u[i]) - (z[i] - harder[i]) @ (z[i] - harder[i])) + 0.7, 0) for i in range(6)
    ]
    assert float(found) == pytest.approx((sum(hinges) - hinges[4]) / 5, abs=1e-10)


@pytest.mark.parametrize("form", ["triplet", "paper_triplet"])
def test_hinges_know_no_temperature_in_the_released_variant_either(batch, form):
    objective = build(strategy="ithn", ithn_variant="released", contrastive_form=form)
    loss = objective(batch, 4)["loss"]
    loss.backward()
    # A trained parameter without a gradient ends a run of several processes.
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    assert objective.temp_1.grad is None and objective.temp_3.grad is None
    for name in ("temp_1", "temp_3"):
        getattr(objective, name).data.add_(0.5)
        torch.testing.assert_close(objective(batch, 4)["loss"], loss)


@pytest.mark.parametrize("rival", RIVALS)
def test_every_rival_reaches_every_parameter(batch, rival):
    objective = build(**RIVALS[rival])
    objective(batch, 4)  # fills the queue
    terms = objective(rows_of(batch, [3, 1, 0, 2]), 4)
    assert objective.temp_1.requires_grad == ("triplet" not in rival)  # hinges know no temperature
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            [gradient] = torch.autograd.grad(terms["loss"], [parameter], retain_graph=True)
            assert gradient.isfinite().all() and gradient.any(), name


@pytest.mark.parametrize("rival", ON_ENCODER)
def test_rivals_on_the_encoders_features(batch, rival):
    objective = build(**RIVALS[rival], contrastive_features="encoder")
    terms = objective(batch, 4)
    assert terms["loss"].isfinite()
    for projection in (objective.img_projection, objective.text_projection):
        [gradient] = torch.autograd.grad(terms["loss"], [projection.linear1.weight], retain_graph=True)
        assert gradient.any()


def test_rivals_differ(batch):
    values = {}
    for rival, chosen in RIVALS.items():
        objective = build(**chosen)
        objective(batch, 4)
        values[rival] = round(float(objective(rows_of(batch, [3, 1, 0, 2, 5]), 4)["contrastive"]), 9)
    assert len(set(values.values())) == len(values), values


def second_steps() -> dict:
    """Terms and gradients of every rival's second step on this process's rows."""
    found, share = {}, len(LENGTHS) // distributed.world_size()
    for rival, chosen in RIVALS.items():
        parallel = distributed.data_parallel(objective := build(**chosen))
        whole = restrained(labelled(tiny_batch(LENGTHS, NEGATIVE_LENGTHS)))
        own = rows_of(whole, slice(distributed.rank() * share, (distributed.rank() + 1) * share))
        for epoch in (3, 4):
            objective.zero_grad()
            terms = parallel(own, epoch)
            terms["loss"].backward()
        found[rival] = {
            "contrastive": terms["contrastive"],
            **{name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None},
        }
    return found


def test_two_processes_equal_one(tmp_path):
    found, expected = run_together(second_steps, 2, tmp_path), second_steps()
    masked, free = (expected[name]["contrastive"] for name in (MASKED, "negatives as columns"))
    assert abs(float(masked - free)) > 1e-3  # anchors of one process do share texts and labels with the other's columns
    for result in found:
        for rival, values in expected.items():
            for name, value in values.items():
                torch.testing.assert_close(result[rival][name], value, rtol=1e-10, atol=1e-10, msg=f"{rival}: {name}")
