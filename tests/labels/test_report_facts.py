"""Facts of reports by the labeler's parse: comparisons, devices, sides, contradictions; and errors counted of them."""

import pytest

from modules.evaluation.metric_table import REPORT_ERRORS, is_main, smaller_is_better
from modules.evaluation.report_errors import report_errors
from modules.labels.report_facts import LATERAL, OTHER_DEVICE, report_facts


@pytest.mark.parametrize(
    ("text", "compares"),
    [
        ("The effusion is unchanged.", True),
        ("Compared with the prior study the edema has improved.", True),
        ("stable cardiomegaly .", True),
        ("no interval change .", True),
        ("New right basal opacity.", True),
        ("The opacity persists.", True),
        ("The lungs are clear. Heart size is normal.", False),
        ("Comparison: none. Findings: The lungs are clear.", False),
        ("Small effusion on the left.", False),
    ],
)
def test_comparisons(text, compares):
    assert report_facts(text).compares is compares


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("ETT and NG tube in place.", {"endotracheal tube", "feeding tube"}),
        ("A right PICC ends in the SVC. Pacemaker leads are seen.", {"central line", "pacemaker"}),
        ("Lines and tubes are in place.", {OTHER_DEVICE}),
        ("The pigtail catheter was removed.", set()),
        ("No chest tube is seen.", set()),
        ("The lungs are clear.", set()),
    ],
)
def test_devices(text, devices):
    assert report_facts(text).devices == devices


@pytest.mark.parametrize(
    ("text", "finding", "sides"),
    [
        ("Small left pleural effusion.", "Pleural Effusion", {"left"}),
        ("Left and right effusions.", "Pleural Effusion", {"left", "right"}),
        ("bilateral effusions , left greater than right .", "Pleural Effusion", {"left", "right"}),
        ("Small effusion on the left, right pneumothorax.", "Pneumothorax", {"right"}),
        ("Small effusion on the left, right pneumothorax.", "Pleural Effusion", {"left"}),
        ("left lower lobe atelectasis and effusion .", "Pleural Effusion", {"left"}),
        ("A small effusion.", "Pleural Effusion", set()),
    ],
)
def test_sides(text, finding, sides):
    assert report_facts(text).sides[finding] == sides


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("No effusion. Small left pleural effusion.", 1),
        ("no pneumothorax . no pneumothorax is seen . apical pneumothorax .", 2),
        ("No left effusion. Small right effusion.", 0),
        ("No new consolidation. Consolidation in the right lower lobe.", 0),
        ("No large effusion. Small effusion.", 0),
        ("Heart size is normal. Cardiomegaly.", 1),
        ("No infiltrate. Scar at the left base.", 0),
        ("No effusion. No pneumothorax. The lungs are clear.", 0),
    ],
)
def test_contradictions(text, count):
    assert report_facts(text).contradictions == count


def counted(reference, generated):
    return {name: values[0, 0] for name, values in report_errors([reference], [generated]).items()}


def test_errors_are_of_what_the_reference_does_not_say():
    none = dict.fromkeys((score.name for score in REPORT_ERRORS), 0)
    assert counted("Small left effusion. PICC in place.", "small left effusion . picc in place .") == none
    assert counted("Small left effusion.", "small right effusion .") == none | {"laterality_conflicts": 1}
    assert counted("Bilateral effusions.", "small right effusion .") == none
    assert counted("Clear lungs.", "unchanged effusion .") == none | {"comparison_rate": 1}
    assert counted("Stable effusion.", "unchanged effusion .") == none
    two = "ett in place . ng tube in place ."
    assert counted("Clear lungs.", two) == none | {"hallucinated_devices": 2}
    assert counted("Endotracheal tube in place.", two) == none | {"hallucinated_devices": 1}
    assert counted("Support devices in place.", two) == none
    assert counted("Endotracheal tube in place.", "tubes and lines in place .") == none
    assert counted("Effusion.", "no effusion . effusion .") == none | {"contradictions": 1}


def test_a_prior_of_the_annotation_decides_where_it_is_known():
    texts = ["unchanged effusion .", "unchanged effusion .", "effusion ."]
    found = report_errors(["Stable effusion.", "Effusion.", "Effusion."], texts, [False, True, False])
    assert found["comparison_rate"].tolist() == [[1, 1], [0, 0], [0, 1]]  # comparisons, and which are counted
    assert report_errors(["Stable effusion.", "Effusion."], texts[:2])["comparison_rate"].tolist() == [[0, 0], [1, 1]]


def test_fewer_errors_are_better_and_are_shown():
    assert len(LATERAL) == 9
    for score in REPORT_ERRORS:
        assert smaller_is_better(f"{score.name}_full") and is_main(f"{score.name}_full")
