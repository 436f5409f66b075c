"""Report features under another study's image: they say what the report says, and the image cannot leak into them."""

import dataclasses

import pytest
import torch
from tiny_backbone import TinyBackbone, tiny_batch

from modules.errors import InputError
from modules.objective import Objective

LENGTHS, NEGATIVE_LENGTHS = [5, 3, 6, 4], [4, 6, 3, 5]


def make(context: str = "other", **settings) -> Objective:
    torch.manual_seed(0)
    return Objective(TinyBackbone(auxiliary_weight=0.1), embedding_dim=5, alpha=0.5, report_context=context,
                     **settings).double()


def features(objective: Objective, batch) -> list[torch.Tensor]:
    pairs = [batch.positive] if batch.negative is None else [batch.positive, batch.negative]
    outputs = objective._outputs(pairs) if objective.report_context == "own" else \
        objective._outputs_under_others(pairs)
    return objective._embed(pairs, outputs)


def other_image(pair, row: int):
    images = pair.images.clone()
    images[row] += 3
    return dataclasses.replace(pair, images=images)


@pytest.mark.parametrize("negatives", [None, NEGATIVE_LENGTHS])
def test_a_report_feature_does_not_depend_on_the_image_that_it_is_compared_with(negatives):
    batch = tiny_batch(LENGTHS, negatives)
    changed = dataclasses.replace(batch, positive=other_image(batch.positive, 1))
    strategy = "ithn" if negatives else "contrastive"
    for context, moved in (("own", {1}), ("other", {2})):  # the row after reads under it
        objective = make(context, strategy=strategy)
        before, after = features(objective, batch), features(objective, changed)
        u = 2 if negatives else 1
        assert {row for row in range(4) if not torch.equal(before[u][row], after[u][row])} == moved
        assert {row for row in range(4) if not torch.equal(before[0][row], after[0][row])} == {1}  # z is the image
    if negatives:  # u- is read under the anchors' images too, z- is the negative's own
        objective = make()
        changed = dataclasses.replace(batch, negative=other_image(batch.negative, 1))
        before, after = features(objective, batch), features(objective, changed)
        assert torch.equal(before[3], after[3])
        assert {row for row in range(4) if not torch.equal(before[1][row], after[1][row])} == {1}


def test_generation_is_trained_as_before_and_the_text_part_by_the_contrastive_terms_alone():
    batch = tiny_batch(LENGTHS, NEGATIVE_LENGTHS)
    own, other = make("own")(batch, 2), make("other")(batch, 2)
    for name in ("nll", "label", "cosine"):
        torch.testing.assert_close(own[name], other[name], rtol=1e-12, atol=1e-12)
    assert own["contrastive"] != other["contrastive"]
    alone = make(contrastive_weight=0.0, cosine_weight=0.0)
    plain = make("own", contrastive_weight=0.0, cosine_weight=0.0)
    for objective in (alone, plain):
        objective(batch, 2)["loss"].backward()
    for one, two in zip(alone.backbone.parameters(), plain.backbone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)


def test_an_unknown_context_is_refused():
    with pytest.raises(InputError, match="report_context"):
        make("none")
