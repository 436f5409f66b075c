"""Diversity by hand, the collapse detector's threshold, and the two training-free baselines."""

import numpy as np
import pytest

from modules.evaluation.baselines import commonest_report_baseline, nearest_image_baseline
from modules.evaluation.diversity import (
    collapse_statistics,
    collapse_warning,
    distinct,
    diversity,
    ngram_counts,
    repetition,
    unk_share,
    unk_warning,
)


def test_repetition_counts_within_a_report_and_sums_over_reports():
    reports = ["a b a b a", "a b c"]
    # Bigrams: ab ba ab ba (2 of 4 unique) and ab bc (2 of 2): 4 of 6.
    assert repetition(reports, 2) == pytest.approx(100 * (1 - 4 / 6))
    # Trigrams: aba bab aba (2 of 3) and abc: 3 of 4. Four-grams: abab baba: 2 of 2.
    assert repetition(reports, 3) == pytest.approx(25)
    assert repetition(reports, 4) == pytest.approx(0)
    assert diversity(reports) == pytest.approx(4 / 6 * 3 / 4)


def test_equal_reports_do_not_lower_simctgs_diversity_and_stutter_does():
    assert diversity(["the lungs are clear ."] * 9) == 1.0
    assert diversity(["no no no no no no"]) == pytest.approx(1 / 5 * 1 / 4 * 1 / 3)


def test_diversity_of_nothing_is_not_a_number():
    assert diversity(["", "two words"]) is None
    assert repetition([""], 2) is None


def test_distinct_counts_over_all_reports_where_repetition_counts_within_each():
    reports = ["no effusion .", "no effusion ."]
    assert repetition(reports, 2) == 0 and distinct(reports, 2) == 2 / 4 and distinct(reports, 1) == 3 / 6
    assert distinct(["", "one"], 2) is None
    # Per report: different bigrams, trigrams, four-grams; then all of them.
    assert ngram_counts(["a b a b a", "", "a"]).tolist() == [[2, 2, 2, 4, 3, 2], [0] * 6, [0] * 6]


def test_statistics_and_the_warning_at_one_half():
    statistics = collapse_statistics(["the lungs are clear .", "the  lungs are clear .", "effusion .", ""])
    # Of 12 words 6 differ, of 9 bigrams 5 ("the lungs" ... "clear .", "effusion ."), of 6 trigrams 3.
    assert statistics == {
        "num_reports": 4,
        "unique_reports": 3,
        "unique_share": 0.75,
        "commonest_share": 0.5,
        "mean_length": 3.0,
        "unk_share": 0.0,
        "diversity": 1.0,
        "repetition_2": 0.0,
        "repetition_3": 0.0,
        "repetition_4": 0.0,
        "distinct_1": 6 / 12,
        "distinct_2": 5 / 9,
        "distinct_3": 3 / 6,
    }
    assert "50% of 4 samples (3 different" in collapse_warning(statistics)
    assert collapse_warning(collapse_statistics(["a", "a", "b", "c", "d"])) is None
    assert collapse_warning(collapse_statistics(["only one"])) is None


def test_unknown_words_are_named_from_five_percent_on():
    assert unk_share(["a <unk> b", "<unk>"]) == 0.5 and unk_share(["", ""]) == 0.0
    assert unk_warning(0.049, 0.049) is None
    line = unk_warning(0.05, 0.01)
    assert "5.0% of the generated words and 1.0% of the references' words" in line
    assert "--suppress_unk" in line and "--threshold" not in line
    assert "--threshold" in unk_warning(0.0, 0.41) and "--suppress_unk" not in unk_warning(0.0, 0.41)


def test_commonest_report_is_the_first_of_equals():
    assert commonest_report_baseline(["x", "b", "a", "a", "b"], 3) == ["b"] * 3


def test_nearest_image_is_by_direction_not_by_length_in_any_block_size():
    train = np.array([[1, 0], [0, 100], [3, 3.1], [0, 0]], dtype=np.float32)
    queries = np.array([[50, 1], [0.01, 0.5], [2, 2], [0, 0]], dtype=np.float32)
    for block_size in (1, 3, 1024):
        found = nearest_image_baseline(train, ["right", "up", "both", "none"], queries, block_size=block_size)
        assert found == ["right", "up", "both", "right"]  # no direction: the first
