"""Words and patches in place of means, against loops; z from the encoder; several negatives of an anchor."""

import dataclasses

import pytest
import torch
from tiny_backbone import gradients, make_objective, tiny_batch

from modules.batches import Pair
from modules.losses import clip_scores, contrastive_loss, cosine_loss, normalise, own_scores
from modules.negatives import ithn
from modules.token_level import harder_tokens, token_scores

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7], [6, 3, 12, 5]


def unit(*shape):
    return normalise(torch.randn(*shape, dtype=torch.float64))


def test_token_scores_and_harder_tokens_by_loops():
    torch.manual_seed(1)
    image, report, negative = unit(3, 4, 5), unit(3, 6, 5), unit(3, 7, 5)
    seen, said = torch.rand(3, 4) < 0.7, torch.rand(3, 6) < 0.7
    seen[:, 0], said[:, 0] = True, True
    scores, harder = token_scores(image, seen, report, said), harder_tokens(image, seen, report, said, negative, 0.4)
    for i in range(3):
        for j in range(3):
            best = [max(image[i, s] @ report[j, t] for s in range(4) if seen[i, s]) for t in range(6) if said[j, t]]
            torch.testing.assert_close(scores[i, j], sum(best) / len(best))
        for t in range(7):
            word = negative[i, t]
            z = max((image[i, s] for s in range(4) if seen[i, s]), key=lambda patch, word=word: patch @ word)
            u = max((report[i, k] for k in range(6) if said[i, k]), key=lambda own, word=word: own @ word)
            torch.testing.assert_close(harder[i, t], normalise(ithn(z[None], u[None], word[None], 0.4))[0])


def test_the_token_level_objective_is_made_of_them():
    batch, objective = tiny_batch(LENGTHS, NEGATIVE_LENGTHS), make_objective(token_level=True, alpha=0.5)
    pairs = [batch.positive, batch.negative]
    outputs, terms = objective._outputs(pairs), objective(batch, 3)
    images = objective.img_projection(torch.cat([output.image_features[..., :-1] for output in outputs]))
    z, patches = images[:4, 0], images[:4, 1:]
    u, negative = (objective.text_projection(output.report_features) for output in outputs)
    seen, said = torch.ones(4, 1, dtype=torch.bool), batch.positive.token_mask[:, 1:]
    harder = harder_tokens(patches, seen, u, said, negative, objective.hardness(3))
    scale = objective.temp_1.exp()
    column = token_scores(patches, seen, harder, batch.negative.token_mask[:, 1:]).diagonal().unsqueeze(1)
    torch.testing.assert_close(terms["contrastive"], contrastive_loss(
        scale * token_scores(patches, seen, u, said), for_images=scale * column), check_dtype=False)
    torch.testing.assert_close(terms["cosine"], cosine_loss(z, images[4:, 0]))


@pytest.mark.parametrize("context", ["own", "other"])
def test_z_is_made_of_the_encoders_output_and_the_decoder_can_be_left_out(context):
    batch = tiny_batch(LENGTHS, NEGATIVE_LENGTHS)
    objective = make_objective(image_feature="encoder", report_gradient=False, harder_term="column", ce_weight=0.0,
                               report_context=context)
    found = gradients(objective, objective(batch, 3)["loss"])
    # The tiny backbone's encoder is its view of the image; the words are the decoder's.
    assert found["backbone.look.weight"].abs().sum() > 0 and found["text_projection.linear1.weight"].abs().sum() > 0
    words = found["backbone.words.weight"]
    assert words is None or not words.any()


@pytest.mark.parametrize("form", ["paper", "column"])
def test_several_negatives_of_each_sample(form):
    one, other = tiny_batch(LENGTHS, NEGATIVE_LENGTHS), tiny_batch(LENGTHS, [4, 12, 6, 3], seed=7)
    both = Pair(*(torch.cat([getattr(side.negative, name) for side in (one, other)]) for name in
                  ("images", "view_mask", "tokens", "token_mask", "labels")))
    objective = make_objective(alpha=0.5, harder_term=form)
    terms = objective(dataclasses.replace(one, negative=both), 3)
    parts = [objective(dataclasses.replace(one, negative=side.negative), 3) for side in (one, other)]
    torch.testing.assert_close(terms["cosine"], (parts[0]["cosine"] + parts[1]["cosine"]) / 2)
    pairs = [one.positive, both]
    z, _, _, u, first, second = objective._embed(pairs, objective._outputs(pairs))
    if form == "column":
        scale = objective.temp_1.exp()
        columns = [own_scores(z, normalise(ithn(z, u, each, objective.hardness(3))), scale) for each in (first, second)]
        torch.testing.assert_close(terms["contrastive"],
                                   contrastive_loss(clip_scores(z, u, scale), for_images=torch.cat(columns, 1)))
    same = objective(dataclasses.replace(one, negative=Pair(*(torch.cat([getattr(one.negative, name)] * 2) for name in (
        "images", "view_mask", "tokens", "token_mask", "labels")))), 3)
    if form == "paper":  # twice the same one is the same as once
        torch.testing.assert_close(same["contrastive"], parts[0]["contrastive"])
