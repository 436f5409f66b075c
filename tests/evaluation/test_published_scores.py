"""Published conventions: each names scores that exist, and what is printed says what has to be known."""

from pathlib import Path

import numpy as np
import pytest

from modules.evaluation.clinical_scores import clinical_scores
from modules.evaluation.published_scores import NOT_HARMONIC, PUBLISHED, published_lines

EVALUATION = Path(__file__).resolve().parents[2] / "docs" / "EVALUATION.md"


def scores(labeler):
    labels = np.random.default_rng(0).choice([1, 0, -1, np.nan], (2, 20, 14))
    return {f"{name}_full": value for name, value in clinical_scores(*labels, labeler).items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_convention_names_scores_that_exist(name):
    own = PUBLISHED[name]
    found = scores("chexbert")
    lines = published_lines(name, found, {}, "chexbert")
    for convention, line in zip(own.conventions, lines, strict=False):
        names = convention.names("chexbert")
        assert all(key in found for key in names.values())
        assert line == f"  {convention}: " + ", ".join(f"{ratio} {found[key]:.4f}" for ratio, key in names.items())
    row = next(line for line in EVALUATION.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    labeler = "rule" if own.labeler == "CheXpert" else "chexbert"
    assert own.conventions[0].names(labeler)["f1"] in row and all(str(each) in row for each in own.conventions)


def test_what_a_reader_has_to_know():
    lines = published_lines("PromptMRG", scores("rule"), {}, "rule")
    assert any("labels by CheXbert, these labels are by the rules" in line for line in lines)
    assert lines[-1].strip() == NOT_HARMONIC
    micro = published_lines("MLRG", scores("chexbert"), {}, "chexbert")
    assert not any("labels by" in line or NOT_HARMONIC in line for line in micro)
    key = PUBLISHED["MLRG"].conventions[0].names("chexbert")["f1"]
    assert "[0.1000, 0.2000]" in published_lines("MLRG", scores("chexbert"), {key: (0.1, 0.2)}, "chexbert")[0]
    missing = published_lines("MLRG", {}, {}, "chexbert")
    assert "f1 –" in missing[0]
