"""Clinical labels are refused where the reports are in another language, or about another part of the body."""

import pytest

from modules.evaluation.labeler_fit import misfit

CHEST = [
    "the heart is normal in size . the lungs are clear .",
    "No acute cardiopulmonary disease.",
    "Mild cardiomegaly. Small left pleural effusion, unchanged.",
    "lungs clear . heart size normal .",
    "",
]
OTHERS = {
    "Spanish": ["El corazon es de tamaño normal . Sin derrame pleural .", "Cardiomegalia . Atelectasia basal ."],
    "French": ["Le coeur est de taille normale .", "Pas d'épanchement pleural ni de pneumothorax ."],
    "Chinese": ["心影大小正常。双肺纹理清晰。", "左侧胸腔积液。"],
    "abdomen and brain": [
        "CT of the abdomen shows a cyst in the left kidney . the liver has fatty infiltration .",
        "there is an enhancing mass with edema in the right frontal lobe of the brain .",
        "small bowel obstruction with dilated loops in the lower abdomen .",
        "the fracture of the skull base is stable .",
    ],
}


@pytest.mark.parametrize(("name", "reason"), [(name, "English") for name in ("Spanish", "French", "Chinese")])
def test_another_language(name, reason):
    assert f"{reason}, and 100% of the references are not" in misfit(OTHERS[name])


def test_another_part_of_the_body():
    assert (
        misfit(OTHERS["abdomen and brain"])
        == "the labelers know the chest, and 100% of the references do not mention it"
    )


def test_chest_reports_fit_also_among_a_few_others():
    assert misfit(CHEST) is None and misfit(CHEST + OTHERS["abdomen and brain"][:3]) is None
    assert "no reference reports" in misfit(["", " "])
