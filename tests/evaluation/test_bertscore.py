"""BERTScore by hand on vectors, and with a tiny random encoder taken apart."""

import numpy as np
import pytest
import torch

from modules.evaluation.bertscore import NAMES, BertScore, greedy_match
from modules.runtime.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "heart", "is", "normal", "lungs", "clear", ".", "no"]
REFERENCES = ["the heart is normal .", "no lungs", "the lungs clear . heart normal", "clear", ""]
HYPOTHESES = ["heart normal", "the heart is clear .", "the lungs clear . heart normal", "", "clear"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random BERT with its tokeniser."""
    from transformers import BertConfig, BertModel, BertTokenizer

    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    BertTokenizer.from_pretrained(path).save_pretrained(path)
    return path


def expected(folder, layer, reference, hypothesis):
    """Precision, recall, F1 of one pair: each word takes the nearest of the other side's, special tokens included."""
    from transformers import BertModel

    model = BertModel.from_pretrained(folder).eval()
    sides = []
    for words in (hypothesis.split(), reference.split()):
        ids = torch.tensor([[WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[layer][0].double()
        sides.append(hidden / hidden.norm(dim=1, keepdim=True))
    cosine = sides[0] @ sides[1].T
    precision, recall = cosine.max(1).values[1:-1].mean(), cosine.max(0).values[1:-1].mean()
    return [float(precision), float(recall), float(2 * precision * recall / (precision + recall))]


@pytest.mark.parametrize("layer", [1, 2])
def test_scores_equal_the_encoder_taken_apart(folder, layer):
    scores = BertScore(str(folder), layer, batch_size=2).score(REFERENCES, HYPOTHESES)
    assert tuple(scores) == NAMES
    found = np.concatenate(list(scores.values()), axis=1)
    for row in range(3):
        assert found[row] == pytest.approx(expected(folder, layer, REFERENCES[row], HYPOTHESES[row]), abs=1e-6)
    assert found[2] == pytest.approx([1, 1, 1], abs=1e-6) and found[0, 2] < 0.999
    assert found[3:].tolist() == [[0.0] * 3] * 2


def test_greedy_match_by_hand():
    # Two words against three, at known angles; the last place of the hypothesis is padding.
    east, north, north_east = torch.tensor([1.0, 0]), torch.tensor([0, 1.0]), torch.tensor([0.5**0.5, 0.5**0.5])
    hypothesis = torch.stack([east, north, east])[None]
    reference = torch.stack([north_east, -east, north])[None]
    seen = torch.tensor([[True, True, False]])
    [[precision, recall, f1]] = greedy_match(hypothesis, seen, seen, reference, *[torch.ones(1, 3).bool()] * 2).tolist()
    assert precision == pytest.approx((0.5**0.5 + 1) / 2)
    assert recall == pytest.approx((0.5**0.5 + 0 + 1) / 3)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_mistakes_are_one_line_with_the_flag(folder, tmp_path):
    with pytest.raises(InputError, match="--bertscore_path .*config.json"):
        BertScore(str(tmp_path))
    with pytest.raises(InputError, match="--bertscore_layer 0: .* bert of 2 layers; name one of 1 to 2"):
        BertScore(str(folder))
    with pytest.raises(InputError, match="--bertscore_layer 3"):
        BertScore(str(folder), 3)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--bertscore_path .*cannot be loaded"):
        BertScore(str(tmp_path), 1)
