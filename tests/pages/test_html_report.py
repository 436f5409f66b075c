"""The report page: nothing that a report says becomes markup, nothing is fetched, and what it marks is right."""

import base64
import hashlib
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from modules.evaluation.diversity import collapse_statistics
from modules.pages.findings import Finding, Findings
from modules.pages.html_report import write_report
from modules.pages.html_scores import ScoreRow
from modules.pages.plots import PANELS, drawn_panels, training_curves
from modules.pages.studies import THUMBNAIL, Sample, thumbnail

VOID = {"meta", "img", "input", "br", "hr", "link", "base"}
PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<ScRiPt src=//evil.example/x>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src=javascript:alert(1)>",
    "<iframe srcdoc='<script>1</script>'>",
    "<object data=//evil.example>",
    "<embed src=//evil.example>",
    "<link rel=stylesheet href=//evil.example/x>",
    "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<form action=//evil.example><input name=q>",
    "<a href=javascript:alert(1)>x</a>",
    "<a href='data:text/html,<script>1</script>'>x",
    "<style>*{display:none}</style>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<!--",
    "--><script>1</script>",
    "<![CDATA[",
    "]]><b>",
    "</p></div></article></main>",
    "<plaintext>",
    "<textarea>",
    "<xmp>",
    "<noscript><p title='</noscript><b>'>",
    "<template><script>1</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "` onclick=alert(1)",
    'x" style="background:url(//evil.example)',
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "&amp;&quot;",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "{{ config.__class__ }}",
    "${7*7}",
    "<%= 7 %>",
    "\\u003cscript\\u003e",
    "<<b>>",
    "<b",
    "<\x00script>",
    "+ADw-script+AD4-",
    "\u202edrow\u202c",
    "<math><mtext><b>",
    "javascript:alert(1)",
    "née 肺 ±",
]


class Page(HTMLParser):
    """The structure of a page (tags with their attributes, in order), its texts, and whether all tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.structure, self.texts, self.open, self.styles = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.structure.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.texts).append(data)

    def find(self, tag, **wanted):
        return [a for name, a in self.structure if name == tag and wanted.items() <= a.items()]


def history(epochs=3):
    return [
        {
            "epoch": e,
            "lr_ve": 5e-5,
            "lr_ed": 7e-4,
            "train_loss": 3 / e,
            "train_nll": 2 / e,
            "train_hardness": 0.01 * e,
            "train_reward": 0.1 * e,
            "train_cos_positive": 0.1,
            "val_BLEU_4": 0.1 * e,
            "val_ce_rule_f1_micro_14_uncertain_negative": 0.2 * e,
            "val_METEOR": None if e == 2 else 0.1,
        }
        for e in range(1, epochs + 1)
    ]


def film(size=(40, 30), value=90):
    return Image.new("L", size, value)


def sample(text, **changes):
    arguments = {
        "findings": Findings((Finding("Edema"),), (Finding("Fracture", "uncertain"),), ()),
        "scores": {"ROUGE_L": 0.5},
    }
    return Sample(text, [film(), film()], (text, ""), text, f"{text} . clear .", **(arguments | changes))


def page(path, text="plain", **changes):
    """Write a page that shows ``text`` wherever a text can come from outside."""
    arguments = {
        "title": text,
        "subtitle": text,
        "synthetic": True,
        "notes": [text],
        "history": history(),
        "best_epoch": 2,
        "classes": {
            text: [
                {
                    "class": text,
                    "precision": 0.5,
                    "recall": 0.25,
                    "f1": 1 / 3,
                    "reference_positives": 8,
                    "generated_positives": 4,
                }
            ]
        },
        "scores": [ScoreRow(text, "test", {"BLEU_4": 0.2, "METEOR": None}), ScoreRow("floor", text, {text: 0.1}, True)],
        "variety": {text: collapse_statistics([text, "other words here too"])},
        "warnings": [text],
        "samples": [sample(text)],
        "highlights": [("best", sample(text))],
        "chosen_by": text,
        "total": 9,
        "flags": {text: text, "nested": {text: [text, 1]}},
        "provenance": {"commit": text},
    }
    write_report(path, **(arguments | changes))
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_text_and_changes_no_structure(tmp_path, payload):
    settings = {"history": []}  # the curves take no text
    found = page(tmp_path / "a.html", payload, **settings)
    plain = page(tmp_path / "b.html", "plain", **settings)
    assert not found.open

    def neutral(structure):
        return [
            (tag, {key: "view" if key == "alt" else value for key, value in attributes.items()})
            for tag, attributes in structure
        ]

    assert neutral(found.structure) == neutral(plain.structure)
    assert found.find("img")[0]["alt"] == payload
    assert "".join(found.texts).count(payload) == "".join(plain.texts).count("plain")


def test_fifty_payloads_are_tried():
    assert len(set(PAYLOADS)) >= 50


def test_nothing_is_fetched_and_no_script_can_run(tmp_path):
    found = page(tmp_path / "report.html")
    tags = {tag for tag, _ in found.structure}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "use", "foreignobject"}
    ids = [attributes["id"] for _, attributes in found.structure if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.structure:
        assert not [key for key in attributes if key.startswith("on") or key in ("style", "srcset", "action")]
        assert "href" not in attributes or (tag == "a" and attributes["href"].removeprefix("#") in ids)
        assert attributes.get("src", "data:image/").startswith("data:image/")
    [style] = found.styles
    assert "url(" not in style and "@import" not in style
    assert "://" not in re.sub(r"[A-Za-z0-9+/]{200,}", "", (tmp_path / "report.html").read_text())


def test_the_policy_forbids_everything_but_inlined_images_and_its_own_style(tmp_path):
    found = page(tmp_path / "report.html")
    [policy] = [a["content"] for a in found.find("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256("".join(found.styles).encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # The policy must stand before anything that it is to govern.
    assert [tag for tag, _ in found.structure][:4] == ["html", "head", "meta", "meta"]


def test_only_the_owner_can_read_it(tmp_path):
    page(tmp_path / "results" / "report.html")
    assert os.stat(tmp_path / "results" / "report.html").st_mode & 0o777 == 0o600
    assert os.stat(tmp_path / "results").st_mode & 0o777 == 0o700


def test_images_are_small_and_carry_nothing_but_pixels(tmp_path):
    source = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "patient name"
    Image.fromarray(np.arange(900 * 600, dtype=np.uint32).astype(np.uint8).reshape(900, 600)).save(
        source, "JPEG", comment=b"patient name", exif=exif, icc_profile=b"patient name"
    )
    loaded = Image.open(io.BytesIO(source.getvalue()))
    assert b"patient name" in source.getvalue()
    data = thumbnail(loaded)
    assert b"patient" not in data
    assert Image.open(io.BytesIO(data)).size == (round(600 / 900 * THUMBNAIL), THUMBNAIL)
    assert Image.open(io.BytesIO(thumbnail(Image.new("RGBA", (10, 10))))).mode == "RGB"
    found = page(tmp_path / "report.html", samples=iter([Sample("s", [film()], (), "a .", "a .")]))
    inlined = found.find("img", alt="view 1")[0]["src"]
    assert Image.open(io.BytesIO(base64.b64decode(inlined.split(",")[1]))).size == (40, 30)


def test_synthetic_data_is_called_so_and_real_data_is_not(tmp_path):
    assert "Synthetic" in "".join(page(tmp_path / "a.html").texts)
    assert "ynthetic" not in "".join(page(tmp_path / "b.html", synthetic=False).texts)


def test_a_model_below_a_baseline_is_said_to_be(tmp_path):
    model = ScoreRow("model", "test", {"BLEU_4": 0.2, "CIDEr": 0.1, "BLEU_4_full": 0.15, "METEOR": None})
    floor = ScoreRow("nearest", "test", {"BLEU_4": 0.125, "CIDEr": 0.3, "BLEU_4_full": 0.1, "METEOR": None}, True)
    other = ScoreRow("model", "val", {"BLEU_4": 0.9, "CIDEr": 0.9, "BLEU_4_full": 0.9, "METEOR": None})
    found = page(tmp_path / "report.html", scores=[other, model, floor], notes=["METEOR is missing: no java."])
    text = " ".join("".join(found.texts).split())
    assert "BLEU-4 test 0.200 above the better baseline, 0.125 (nearest)" in text
    assert "CIDEr test 0.100 not above the better baseline, 0.300 (nearest)" in text
    assert "METEOR test – ROUGE-L" in text and "METEOR is missing: no java." in text
    assert "Full references" in text and "0.150" in text
    # Above with <unk> and cut ends only, which a model that writes <unk> earns.
    floor.scores["BLEU_4_full"] = 0.2
    text = " ".join("".join(page(tmp_path / "report.html", scores=[other, model, floor]).texts).split())
    assert "above the better baseline, 0.125 (nearest), against cut references only" in text
    assert "tile-baseline below" in (tmp_path / "report.html").read_text()
    assert len(found.find("td", **{"class": "number best"})) == 3  # test BLEU-4, CIDEr, full BLEU-4


def test_intervals_and_clinical_scores_stand_in_tables_of_their_own(tmp_path):
    key = "ce_rule_f1_{}_14_uncertain_negative_full"
    model = ScoreRow(
        "model",
        "test",
        {
            "BLEU_4": 0.2,
            key.format("micro"): 0.4,
            "ce_chexbert_f1_macro_5_uncertain_negative_full": 0.9,
            "ce_rule_f1_micro_14_uncertain_positive": 0.987,
        },
        intervals={"BLEU_4": (0.1, 0.3), key.format("micro"): (0.35, 0.4554)},
    )
    floor = ScoreRow("nearest", "test", {"BLEU_4": 0.1, key.format("micro"): 0.5}, True)
    found = page(tmp_path / "report.html", scores=[model, floor, ScoreRow("model", "val", {"BLEU_4": 0.25})])
    text = " ".join("".join(found.texts).split())
    assert "Clinical F1 (rules) test 0.400 0.350 – 0.455 not above the better baseline, 0.500 (nearest)" in text
    assert "0.200 0.100 – 0.300" in text.replace("0.2000.100", "0.200 0.100")
    captions = text.split("Clinical efficacy against full references: ")[1:]
    assert [line.split(",")[0] for line in captions] == ["labels by rules", "labels by CheXbert"]
    assert "0.900" in text and "0.987" not in text
    # The validation row has none of these scores and is left out of their tables.
    assert " val " not in captions[0] + captions[1]


def test_references_seen_in_training_have_rows_of_their_own(tmp_path):
    parts = {
        kind: {"reports": count, "scores": {"model": {"BLEU_4": value, "BLEU_4_full": value / 2}}}
        for kind, count, value in (("seen", 277, 0.8), ("unseen", 313, 0.1))
    }
    text = "|".join(part.strip() for part in page(tmp_path / "a.html", by_reference=parts).texts if part.strip())
    assert (
        "BLEU-4|BLEU-4 (full)|model, 277 references seen|0.800|0.400|model, 313 references unseen|0.100|0.050" in text
    )
    parts["seen"] = {"reports": 0, "scores": {}}
    assert "word for word" not in "".join(page(tmp_path / "b.html", by_reference=parts).texts)


def test_a_class_without_any_report_has_no_score(tmp_path):
    line = {
        "class": "Edema",
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "reference_positives": 0,
        "generated_positives": 0,
    }
    found = page(
        tmp_path / "report.html", classes={"rule": [line, line | {"class": "Fracture", "reference_positives": 3}]}
    )
    text = "|".join(part.strip() for part in found.texts if part.strip())
    assert "Edema|–|–|–|0|0|Fracture|–|0.000|0.000|3|0" in text


def test_a_reader_meets_studies_then_scores_then_the_rest_and_every_part_is_in_the_contents(tmp_path):
    found = page(tmp_path / "report.html")
    headings = [attributes["id"] for tag, attributes in found.structure if tag == "h2"]
    assert headings == ["highlights", "scores", "samples", "training", "tables", "variety", "settings"]
    assert [attributes["href"] for attributes in found.find("a")] == [f"#{name}" for name in headings]
    text = " ".join("".join(found.texts).split())
    assert (
        "best plain plain view 2 found Edema missed Fracture uncertain Reference 1 word plain. Generated 2 words"
        in text
    )
    assert "1 of 9 test studies, spread evenly" in text
    assert "Edema (1 found, 0 missed, 0 invented)" in text and "Fracture (0 found, 1 missed, 0 invented)" in text


def test_without_labels_nothing_is_said_of_findings(tmp_path):
    def heading(name, **changes):
        text = " ".join("".join(page(tmp_path / name, **changes).texts).split())
        return text.partition("One study: ")[2].partition(" plain")[0]

    assert heading("a.html") == "what was found, missed and invented"
    unlabelled = sample("plain", findings=None)
    assert heading("b.html", highlights=[("best", unlabelled)]) == "best, middle and worst"
    assert (
        'class="finding' not in (tmp_path / "b.html").read_text().partition('id="scores"')[0].partition("</style>")[2]
    )


def test_words_that_differ_are_marked_inside_their_sentence(tmp_path):
    study = Sample("s", [], (), "the heart is large . no effusion .", "the heart is normal . no effusion .")
    page(tmp_path / "report.html", samples=[study], highlights=[])
    text = " ".join((tmp_path / "report.html").read_text().split())
    assert 'the heart is <mark class="only-reference">large</mark>.</span> <span class="sentence">no effusion.' in text
    assert 'the heart is <mark class="only-generated">normal</mark>.</span> <span class="sentence">no effusion.' in text
    assert "1 of 2 reference sentences and 83% of its words generated" in text


def test_values_of_every_epoch_can_be_pointed_at_and_read_in_a_table(tmp_path):
    found = page(tmp_path / "report.html", history=history(4))
    shown = [attributes for attributes in found.find("g", **{"class": "epoch"})]
    assert len(shown) == 4 * len(PANELS)
    texts = "|".join(part.strip() for part in found.texts if part.strip())
    assert "epoch 4|loss 0.75|nll 0.5" in texts
    assert "train loss|train nll" in texts and "|4|0.75|0.5" in texts


def test_a_page_without_samples_scores_or_history_is_still_a_page(tmp_path):
    found = page(tmp_path / "report.html", samples=[], scores=[], history=[], variety={}, highlights=[])
    assert not found.open and not found.find("img") and not found.find("input")


def test_curves_show_what_the_history_has():
    def names(rows):
        return [panel.name for panel, _ in drawn_panels(rows)]

    assert names(history()) == list(PANELS)
    assert names([{"epoch": 1, "train_loss": float("nan"), "val_BLEU_4": 0.1}]) == ["bleu"]
    # How many steps were skipped, or taken, is not a loss.
    assert names([{"epoch": 1, "train_skipped_steps": 7, "train_steps": 9}]) == []
    assert names([]) == [] and training_curves([]).startswith(b"\x89PNG")
    assert Image.open(io.BytesIO(training_curves(history()))).width > 1000
