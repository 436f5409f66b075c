"""Studies on the report page: which words and findings differ, which studies are shown first, and what filters do."""

import re

import numpy as np
import pytest

from modules.labels.rules import CLASSES
from modules.pages.curves import HEIGHT, WIDTH, svg_curves
from modules.pages.findings import agreement, best_middle_worst, compare_labels
from modules.pages.sentences import compare_captions, compare_sentences, split_sentences
from modules.pages.studies import Sample, browser, shown_study


def labels(**values):
    row = np.full(len(CLASSES), np.nan)
    for name, value in values.items():
        row[CLASSES.index(name.replace("_", " "))] = value
    return row


def spelled(sentences):
    """Sentences with the words that are not shared in brackets."""
    return [
        "".join((run.text if run.shared else f"[{run.text}]") + run.after for run in each.runs) for each in sentences
    ]


def test_sentences_are_compared_whatever_their_order_and_case():
    reference, generated = compare_sentences(
        "The heart is normal. A 1.5 cm nodule. No effusion. No effusion.",
        "no effusion . the  heart is normal . clear .",
    )
    assert [each[:2] for each in reference] == [
        ("The heart is normal", True),
        ("A 1.5 cm nodule", False),
        ("No effusion", True),
        ("No effusion", False),
    ]
    assert [each[:2] for each in generated] == [("no effusion", True), ("the  heart is normal", True), ("clear", False)]
    assert split_sentences(" . . a .b . ") == ["a .b"]
    assert compare_sentences("", "") == ([], [])


def test_words_are_compared_within_the_sentences_that_are_most_alike():
    reference, generated = compare_sentences(
        "There is a small left effusion. The heart is mildly enlarged. Old rib fracture.",
        "the heart is normal . there is a large left effusion . lungs clear .",
    )
    assert spelled(reference) == [
        "There is a [small] left effusion",
        "The heart is [mildly enlarged]",
        "[Old rib fracture]",
    ]
    assert spelled(generated) == ["the heart is [normal]", "there is a [large] left effusion", "[lungs clear]"]
    assert [each.shared_words for each in reference] == [5, 3, 0]


def test_marks_around_words_do_not_count():
    reference, generated = compare_sentences(
        "No effusion, edema (or nodule) 1.5 cm", "no effusion edema or nodule 1.5 mm"
    )
    assert spelled(reference) == ["No effusion, edema (or nodule) 1.5 [cm]"]
    assert spelled(generated) == ["no effusion edema or nodule 1.5 [mm]"]


def test_words_in_another_order_are_not_shared():
    reference, _ = compare_sentences("a b c d", "d a b c")
    assert spelled(reference) == ["a b c [d]"]


def test_characters_are_compared_where_words_have_no_spaces():
    reference, generated = compare_sentences("心影增大。左侧少量胸腔积液。", "左侧大量胸腔积液。")
    assert spelled(reference) == ["[心影增大]", "左侧[少]量胸腔积液"]
    assert spelled(generated) == ["左侧[大]量胸腔积液"] and generated[0].words == 8


def test_a_caption_is_compared_with_the_one_most_like_it():
    captions, generated = compare_captions(["A dog runs on grass.", "two cats"], "a dog sits on grass .")
    assert spelled(captions) == ["A dog [runs] on grass", "[two cats]"]
    assert spelled(generated) == ["a dog [sits] on grass [.]"]


def test_findings_are_found_missed_or_invented_and_doubt_is_named():
    found = compare_labels(
        labels(Edema=1, Fracture=1, Pneumonia=-1, Atelectasis=1, Consolidation=0),
        labels(Edema=1, Fracture=-1, Pneumonia=1, Consolidation=1),
    )
    assert [tuple(each) for each in found.found] == [("Edema", "")]
    assert [tuple(each) for each in found.missed] == [
        ("Atelectasis", ""),
        ("Fracture", "uncertain in the generated report"),
    ]
    assert [tuple(each) for each in found.invented] == [
        ("Consolidation", ""),
        ("Pneumonia", "uncertain in the reference"),
    ]


def test_the_studies_shown_first_are_ranked_by_findings_then_words():
    normal, edema, both = labels(No_Finding=1), labels(Edema=1), labels(Edema=1, Fracture=1)
    references = np.stack([normal, edema, edema, both, edema])
    generated = np.stack([normal, edema, normal, edema, edema])
    assert agreement(references, generated) == pytest.approx([1, 1, 0, 2 / 3, 1])
    words = np.array([0.9, 0.2, 0.5, 0.1, 0.4])
    chosen, how = best_middle_worst(references, generated, words)
    assert chosen == [("best", 4), ("middle", 3), ("worst", 2)]  # 4 and 1 have all findings, 4 more of the words
    assert how == "Of 4 studies with a finding, by F1 of the findings, then word score."
    assert best_middle_worst(None, None, words)[0] == [("best", 0), ("middle", 4), ("worst", 3)]
    assert best_middle_worst(None, None, words[:1])[0] == [("best", 0)]
    assert best_middle_worst(references[:1], generated[:1], words[:1])[0] == [("best", 0)]  # no study has a finding
    assert best_middle_worst(None, None, words[:0])[0] == []


def studies():
    pairs = [(labels(Edema=1), labels(Edema=1)), (labels(Edema=1), labels()), (labels(), labels(Fracture=1))]
    values = ({"ROUGE_L": 0.5, "nll": 1.0}, {"ROUGE_L": 0.25, "nll": 3.0}, {"ROUGE_L": 0.75, "nll": 2.0})
    return [
        shown_study(Sample(f"s{i}", [], (), "a .", "b .", findings=compare_labels(*pair), scores=own))
        for i, (pair, own) in enumerate(zip(pairs, values, strict=True))
    ]


def test_studies_are_sorted_worst_first_by_rules_of_numbers_alone():
    found = browser(studies())
    places = re.findall(
        r"has\(\.by-(\d)\S+ \.samples > :nth-child\((\d)\) \{ order: calc\(var\(--way\) \* (\d)\)", found.style
    )
    # ROUGE-L: study 2 is the worst. The likelihood's negative logarithm: the largest is.
    assert {key: [row for _, row in sorted((place, row) for k, row, place in places if k == key)] for key in "01"} == {
        "0": ["2", "1", "3"],
        "1": ["2", "3", "1"],
    }
    assert found.scores == ["ROUGE-L", "nll"]
    assert "s0" not in found.style and not re.search(r"[<>\"'\\]", re.sub(r" > ", "", found.style))


def test_studies_are_filtered_by_class_outcome_and_quarter():
    found = browser(studies())
    edema, fracture = CLASSES.index("Edema"), CLASSES.index("Fracture")
    own = [set(study["classes"].split()) for study in found.studies]
    assert own[0] >= {"found", f"found-{edema}"} and own[1] >= {"missed", f"missed-{edema}", "low-0", "low-1"}
    assert own[2] >= {"invented", f"invented-{fracture}", "high-0"} and "low-0" not in own[0] | own[2]
    assert found.classes == [(edema, "Edema", [1, 1, 0]), (fracture, "Fracture", [0, 0, 1])]
    hidden = f".browse:has(.class-{edema}:checked):has(.missed-only:checked) .samples > :not(.missed-{edema})"
    assert f"{hidden} {{ display: none; }}" in found.style


def test_studies_without_labels_or_scores_have_no_filters():
    found = browser([shown_study(Sample("s", [], (), "a .", "b ."))])
    assert not found.scores and not found.classes and ":nth-child" not in found.style
    assert not browser([]).studies


def test_a_curve_stays_inside_its_drawing_and_breaks_where_a_value_is_missing():
    rows = [{"epoch": e, "train_loss": v, "lr_ed": 10.0**-e} for e, v in enumerate([4.0, None, 2.0, 1.0], start=1)]
    loss, rate = svg_curves(rows, best_epoch=3)
    assert loss["paths"][0].count("M") == 2 and rate["paths"][0].count("M") == 1
    numbers = [
        tuple(map(float, point)) for point in re.findall(r"[ML](\S+) (\S+)", " ".join(loss["paths"] + rate["paths"]))
    ]
    assert len(numbers) == 7 and all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in numbers)
    assert loss["best"] == numbers[1][0]
    # Equal ratios are equal steps on the logarithmic axis.
    heights = [y for _, y in numbers[3:]]
    assert np.diff(heights) == pytest.approx([np.diff(heights)[0]] * 3, abs=0.2)
    assert [line for _, line in loss["epochs"][1]["lines"]] == ["loss –"]
    for at in loss["epochs"] + rate["epochs"]:
        assert at["box"][0] >= 0 and at["box"][0] + at["box"][2] <= WIDTH


def test_one_epoch_of_equal_values_is_drawn():
    [panel] = svg_curves([{"epoch": 1, "train_loss": 0.0}])
    [[(x, y)]] = panel["points"]
    assert 0 < x < WIDTH and 0 < y < HEIGHT and panel["y_ticks"]
