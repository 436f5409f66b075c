"""What a run on captions leaves to read: tables, COCO's two files, and the page's samples."""

import csv
import json
import stat

import pytest
from PIL import Image

from modules.pages.exports import write_caption_exports
from modules.pages.html_report import write_report
from modules.pages.html_scores import CAPTIONS, ScoreRow, score_tables
from modules.pages.sentences import compare_captions
from modules.pages.studies import Sample
from modules.runtime.records import write_report_tables


def test_each_caption_has_a_column(tmp_path):
    write_report_tables(tmp_path, ["a dog", ""], [["A dog, here.", 'Dogs\n"here"'], ["a cat", "b", "c"]])
    with open(tmp_path / "gts.csv", newline="") as file:
        assert list(csv.reader(file)) == [["A dog, here.", 'Dogs\n"here"', ""], ["a cat", "b", "c"]]
    assert (tmp_path / "res.csv").read_text() == 'a dog\n""\n'


def test_cocos_evaluation_can_read_both_files(tmp_path):
    from pycocotools.coco import COCO

    write_caption_exports(tmp_path, ["7", "x9"], ["a dog", ""], [("A dog.", "Dogs"), ("A cat",)])
    truth = COCO(str(tmp_path / "references.json"))
    assert [row["caption"] for row in truth.imgToAnns[7]] == ["A dog.", "Dogs"]
    results = truth.loadRes(str(tmp_path / "captions.json"))
    assert results.imgToAnns[7][0]["caption"] == "a dog" and results.imgToAnns["x9"][0]["caption"] == ""
    rows = json.loads((tmp_path / "reports.json").read_text())
    assert rows[0] == {"id": "7", "report": "a dog", "references": ["A dog.", "Dogs"]}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("generated", "shared"),
    [
        ("a dog runs", [True, False, True]),
        ("A dog runs .", [True, False, True]),
        ("a dog", [False, False, False]),
        ("", [False, False, False]),
    ],
)
def test_captions_that_say_the_same_are_marked(generated, shared):
    captions, found = compare_captions(["A dog runs.", "A cat", " a dog  runs"], generated)
    assert [caption.shared for caption in captions] == shared
    assert [sentence.shared for sentence in found] == ([any(shared)] if generated else [])


def page(path, **sample):
    image = Image.new("RGB", (8, 8))
    write_report(
        path,
        title="t",
        subtitle="s",
        synthetic=False,
        scores=[ScoreRow("model", "test", {"BLEU_4": 0.25})],
        classes={},
        history=[],
        best_epoch=None,
        variety={},
        warnings=[],
        flags={},
        provenance={},
        samples=[
            Sample(
                **{
                    "id": "7",
                    "images": [image],
                    "views": [""],
                    "reference": "cleaned",
                    "generated": "a dog",
                    "captions": ["A <b>dog</b>.", "A dog"],
                }
                | sample
            )
        ],
        references=CAPTIONS,
        notes=["Texts were split into words by: rules & rules."],
    )
    return path.read_text()


def test_the_page_shows_every_caption_and_says_how_texts_were_split(tmp_path):
    found = page(tmp_path / "report.html")
    assert (
        'A <mark class="only-reference">&lt;b&gt;dog&lt;/b&gt;</mark>.' in found
        and "1 of 2 captions generated" in found
    )
    assert "cleaned" not in found  # all captions stand in the place of the one cleaned reference
    assert "split into words by: rules &amp; rules" in found
    assert "Against all captions of an image" in found and "cut to the maximum length" not in found


def test_a_sample_without_images_is_shown_without(tmp_path):
    assert "1 of 2 captions generated" in page(tmp_path / "report.html", images=[], views=[])


def test_captions_have_one_table():
    (table,) = score_tables([ScoreRow("model", "test", {"BLEU_1": 0.5, "CIDEr": 0.25})], CAPTIONS)
    assert table["columns"] == ["BLEU-1", "CIDEr"]
