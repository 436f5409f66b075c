"""Scores of captions: equal to COCO's own evaluation on the same input, with all captions of an image as references."""

import contextlib
import io
import json
import shutil

import pytest

from modules.data.captions import collapse_repeats
from modules.evaluation.meteor import ptb_tokenise
from modules.evaluation.metrics import Metrics, measure
from modules.evaluation.report_statistics import ReportStatistics
from modules.runtime.errors import InputError

CAPTIONS = {
    5: [
        "A man's dog runs, happily, on the beach.",
        "The dog is running by the sea",
        "A wet dog (brown) on wet sand!",
        "there's a dog on a beach ",
        "Dog; sea; sand.",
    ],
    17: [
        "Two half-eaten pizzas sit on a table.",
        "A table with 2 pizzas on it",
        "Pizza & beer on a wooden table",
        "A couple of pizzas that are on a table.",
        "two pizzas",
        "A sixth caption of the same pizzas.",
    ],
    30: [
        'A "STOP" sign near the road',
        "a red stop sign\nin front of a house",
        "Stop sign, house, road.",
        "An octagonal sign that says stop.",
        "The sign can't be missed",
    ],
}
GENERATED = {5: "a dog running on the beach", 17: "a a table with with two pizzas", 30: ""}


class LeftOut:
    """A scorer that costs nothing: SPICE would download its models."""

    def method(self):
        return "left out"

    def compute_score(self, references, _):
        return 0.0, [0.0] * len(references)


def coco_evaluation(captions, generated, tmp_path, monkeypatch, left_out=("SPICE",)):
    """The scores of pycocoevalcap's COCOEvalCap but those of ``left_out``."""
    from pycocoevalcap import eval as evaluation
    from pycocotools.coco import COCO

    rows = [(image, text) for image, texts in captions.items() for text in texts]
    (tmp_path / "references.json").write_text(
        json.dumps(
            {
                "info": {},
                "images": [{"id": image} for image in captions],
                "annotations": [
                    {"id": number, "image_id": image, "caption": text} for number, (image, text) in enumerate(rows)
                ],
            }
        )
    )
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": image, "caption": text} for image, text in generated.items()])
    )
    for name in left_out:
        monkeypatch.setattr(evaluation, name.capitalize(), LeftOut)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "references.json"))
        official = evaluation.COCOEvalCap(truth, truth.loadRes(str(tmp_path / "results.json")))
        official.evaluate()
    return {name.replace("Bleu", "BLEU"): float(value) for name, value in official.eval.items() if name not in left_out}


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap asks for a java on the PATH")
def test_scores_are_those_of_cocos_evaluation(tmp_path, monkeypatch):
    expected = coco_evaluation(CAPTIONS, GENERATED, tmp_path, monkeypatch)
    with Metrics(timeout=600) as metrics:
        references = [ptb_tokenise(texts) for texts in CAPTIONS.values()]
        found, tables = measure(metrics, references, None, ptb_tokenise(list(GENERATED.values())))
    assert found == pytest.approx(expected, abs=1e-9) and min(found["METEOR"], found["CIDEr"], found["BLEU_4"]) > 0
    # What the intervals and the comparison of runs are made of gives the same scores.
    again = ReportStatistics(tables, "", "").scores()
    assert again == pytest.approx(expected, abs=1e-9)


def test_tokens_are_those_of_pycocoevalcaps_wrapper():
    texts = ["A man's t-shirt, isn't it? (yes)", "", "Café — “quoted” 1.5%...", "U.S. half-pipe w/o <unk> .", "last"]
    assert ptb_tokenise(texts) == [
        "a man 's t-shirt is n't it -lrb- yes -rrb-",
        "",
        "café quoted 1.5 %",
        "u.s. half-pipe w/o <unk>",
        "last",
    ]
    assert ptb_tokenise(["one\nline\u2028only"]) == ["one line only"] and ptb_tokenise([]) == []


@pytest.mark.parametrize(
    ("program", "part", "timeout"),
    [
        ("exit 3", "exit code 3 after 0 of 2", 60),
        ("sleep 9", "timed out", 0.5),
        ("echo one", "after 1 of 2", 60),
        (None, "No such file", 60),
    ],
)
def test_a_java_that_fails_is_one_line(tmp_path, program, part, timeout):
    java = tmp_path / "java"
    if program is not None:
        java.write_text(f"#!/bin/sh\n{program}\n")
        java.chmod(0o755)
    with pytest.raises(InputError, match="COCO's scores need") as error:
        ptb_tokenise(["a", "b"], java=str(java), timeout=timeout)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_one_reference_as_text_or_list_is_the_same():
    references, hypotheses = ["a dog on a beach", "two pizzas"], ["a dog", "two pizzas on a table"]
    with Metrics() as metrics:
        one, listed = (
            metrics.compute(texts, hypotheses, with_meteor=False)
            for texts in (references, [[text] for text in references])
        )
    assert one == listed


def test_a_further_reference_counts():
    with Metrics() as metrics:
        few = metrics.compute([["a cat"], ["two pizzas"]], ["a dog runs", "two pizzas"], with_meteor=False)
        more = metrics.compute(
            [["a cat", "a dog runs"], ["two pizzas"]], ["a dog runs", "two pizzas"], with_meteor=False
        )
    assert more["BLEU_2"] == pytest.approx(1, abs=1e-6) and more["ROUGE_L"] == 1
    assert few["BLEU_2"] < 0.9 and few["ROUGE_L"] < 1


def test_document_frequencies_count_images_not_captions():
    """An n-gram in all five captions of one of two images has document frequency 1 of 2, and counts."""
    with Metrics() as metrics:
        scores = metrics.compute([["red dog"] * 5, ["blue cat"] * 5], ["red dog", "blue cat"], with_meteor=False)
    # Both unigrams and the bigram match in full; 3- and 4-grams do not exist: 10 * (1 + 1 + 0 + 0) / 4.
    assert scores["CIDEr"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a a dog dog runs", "a dog runs"), ("a dog a dog", "a dog a dog"), ("", ""), ("no no no", "no")],
)
def test_repeats_are_collapsed(text, expected):
    assert collapse_repeats(text) == expected
