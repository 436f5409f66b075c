"""Intervals and paired tests against arithmetic that can be done another way, and their speed."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest

from modules.evaluation.bootstrap import Spread, _Resampled, compare, holm, intervals, over_seeds
from modules.evaluation.clinical_scores import clinical_scores
from modules.evaluation.metric_table import FULL
from modules.evaluation.report_statistics import ReportStatistics, clinical_tables
from modules.runtime.errors import InputError


def means(values, cut="cut", whole="whole", name="ROUGE_L", **units):
    """Statistics of a score that is the mean of ``values``."""
    return ReportStatistics({name: np.asarray(values, dtype=float)[:, None]}, cut, whole, **units)


def test_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(0.3, 0.1, 900)
    low, high = intervals(means(values), seed=3)["ROUGE_L"]
    error = values.std() / 30
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=error / 5)
    narrow = intervals(means(values), level=0.5)["ROUGE_L"]
    assert low < narrow[0] < narrow[1] < high
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 * error, rel=0.1)


def test_intervals_repeat_with_the_seed_and_hold_a_constant():
    values = np.linspace(0, 1, 50)
    assert intervals(means(values), seed=5) == intervals(means(values), seed=5) != intervals(means(values), seed=6)
    assert intervals(means([0.25] * 8))["ROUGE_L"] == (0.25, 0.25)


def test_a_corpus_score_is_resampled_as_a_corpus():
    """nll is a ratio of sums: the mean of per-report ratios would be 5, the corpus's is 1.09."""
    statistics = ReportStatistics({"nll": np.array([[9.0, 1], [100.0, 100]] * 40)}, "", "")
    low, high = intervals(statistics)["nll"]
    assert 1 < low < statistics.scores()["nll"] < high < 1.2


def test_randomisation_equals_the_enumeration_of_all_exchanges():
    first, second = np.array([0.9, 0.5, 0.6, 0.7, 0.4]), np.array([0.5, 0.4, 0.7, 0.2, 0.3])
    change = first - second
    exact = np.mean(
        [abs(np.dot(change, signs)) >= abs(change.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=5)]
    )
    found = compare([means(first)], [means(second)], resamples=20_000)["ROUGE_L"]
    assert found.difference == pytest.approx(change.mean())
    assert found.p_randomisation == pytest.approx(exact, abs=0.015)


def test_a_small_steady_difference_is_seen_although_the_intervals_overlap():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 1, 400)
    first, second = means(hard + 0.02 + rng.normal(0, 0.05, 400)), means(hard)
    found = compare([first], [second])["ROUGE_L"]
    assert intervals(second)["ROUGE_L"][1] > intervals(first)["ROUGE_L"][0]
    assert 0 < found.low < found.difference < found.high
    assert found.p_bootstrap == pytest.approx(2 / 10_001) and found.p_randomisation == pytest.approx(1 / 10_001)
    back = compare([second], [first])["ROUGE_L"]
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low))


def test_equal_systems_differ_by_nothing():
    values = np.random.default_rng(0).uniform(0, 1, 30)
    found = compare([means(values)], [means(values)])["ROUGE_L"]
    assert (found.difference, found.low, found.high, found.p_bootstrap, found.p_randomisation) == (0, 0, 0, 1, 1)


def test_chance_differences_are_called_significant_as_often_as_the_level_says():
    rng = np.random.default_rng(7)
    pairs = rng.normal(0, 1, (200, 2, 60))
    found = [compare([means(a)], [means(b)], resamples=400)["ROUGE_L"] for a, b in pairs]
    for name in ("p_bootstrap", "p_randomisation"):
        assert 0.01 < np.mean([getattr(row, name) < 0.05 for row in found]) < 0.10, name


def paired_images(rng, studies=50):
    """The scores of two systems for two images each of ``studies`` studies, which differ by chance; their numbers."""
    hardness, taste = rng.normal(0, 0.3, studies), rng.normal(0, 0.3, (2, studies))
    values = np.repeat(hardness + taste, 2, axis=1) + rng.normal(0, 0.05, (2, 2 * studies))
    return values, np.repeat(np.arange(studies), 2)


def test_images_of_one_study_are_resampled_together():
    """Taken as independent they halve the variance: intervals cover too seldom, tests find too much."""
    rng, covered, found = np.random.default_rng(3), {"known": [], "unknown": []}, {"known": [], "unknown": []}
    for _ in range(200):
        (first, second), studies = paired_images(rng)
        for name, units in (("known", {"studies": studies}), ("unknown", {})):
            low, high = intervals(means(first, **units), resamples=300)["ROUGE_L"]
            covered[name].append(low <= 0 <= high)
            test = compare([means(first, **units)], [means(second, **units)], resamples=300)["ROUGE_L"]
            found[name].append([test.p_bootstrap < 0.05, test.p_randomisation < 0.05])
    assert np.mean(covered["known"]) > 0.91 and np.mean(covered["unknown"]) < 0.90
    assert max(np.mean(found["known"], axis=0)) < 0.09 and min(np.mean(found["unknown"], axis=0)) > 0.10


def test_patients_are_above_studies():
    values = np.random.default_rng(0).normal(0, 1, 12)
    studies, patients = np.arange(12) // 2, np.arange(12) // 6
    both = intervals(means(values, studies=studies, patients=patients))["ROUGE_L"]
    assert both == intervals(means(values, studies=patients))["ROUGE_L"] != intervals(means(values, studies=studies))
    # A file that was written before studies were kept is compared by those of the other run.
    known, unknown = means(values, studies=studies), means(values[::-1])
    assert compare([known], [unknown]) == compare([known], [dataclasses.replace(unknown, studies=studies)])


def test_differences_between_seeds_are_not_taken_for_differences_between_systems():
    rng, found = np.random.default_rng(5), []
    for _ in range(200):
        hardness = rng.normal(0, 0.3, 60)
        systems = hardness + rng.normal(0, 0.05, (2, 3, 1)) + rng.normal(0, 0.1, (2, 3, 60))
        test = compare(*[[means(seed) for seed in system] for system in systems], resamples=300)["ROUGE_L"]
        assert test.p == test.p_seeds
        found.append([test.p_seeds < 0.05, test.p_randomisation < 0.05])
    over_seeds_too, over_studies_only = np.mean(found, axis=0)
    assert over_seeds_too < 0.09 and over_studies_only > 0.3
    alone = compare([means([0.1, 0.2])], [means([0.1, 0.3])])["ROUGE_L"]
    assert alone.p_seeds is None and alone.p == alone.p_randomisation


def test_holm_by_hand():
    # Sorted: .01 x 4, .02 x 3, .03 x 2, .04 x 1, none below an earlier one.
    found = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert found == pytest.approx({"d": 0.06, "a": 0.04, "c": 0.06, "b": 0.06}) and list(found) == ["d", "a", "c", "b"]
    assert holm({"x": 0.7, "y": 0.6}) == {"x": 1.0, "y": 1.0} and holm({}) == {}


def test_a_macro_average_over_a_rare_class_has_no_interval():
    """Its percentile interval covers the true value in 64 of 100 test sets of 250 reports (docs/EVALUATION.md)."""
    outcomes = np.zeros((40, 3, 14), dtype=bool)
    outcomes[:20, 0] = True  # every class: 20 true positives
    table = {"ce_rule_uncertain_negative_full": outcomes.reshape(40, 42)}
    key = "ce_rule_{}_uncertain_negative_full"
    every = set(intervals(ReportStatistics(table, "", "")))
    assert {key.format("f1_macro_14"), key.format("f1_macro_min5")} < every
    outcomes[:, :, 3] = False
    outcomes[:4, 2, 3] = True  # one class has four positives, none of them found
    rare = ReportStatistics({name: outcomes.reshape(40, 42) for name in table}, "", "")
    gone = {key.format(f"{ratio}_macro_14") for ratio in ("precision", "recall", "f1")}
    assert set(intervals(rare)) == every - gone
    scores = rare.scores()
    assert scores[key.format("f1_macro_14")] == pytest.approx(13 / 14) and scores[key.format("f1_macro_min5")] == 1
    change = compare([rare], [rare])[key.format("f1_macro_14")]
    assert change.low is None and change.p_randomisation == 1


def test_several_seeds_are_averaged_in_every_resample():
    rng = np.random.default_rng(2)
    seeds, other = rng.uniform(0, 1, (3, 80)), rng.uniform(0, 1, (3, 80))
    found = compare([means(row) for row in seeds], [means(row) for row in other])["ROUGE_L"]
    alone = compare([means(seeds.mean(axis=0))], [means(other.mean(axis=0))])["ROUGE_L"]
    for name in ("difference", "low", "high", "p_bootstrap", "p_randomisation"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name)), name


def test_only_what_means_the_same_is_compared():
    tables = {name: np.ones((4, 1)) for name in ("CIDEr", "CIDEr_full")} | {"diversity": np.ones((4, 6))}
    first, other = ReportStatistics(tables, "cut at 60", "whole"), ReportStatistics(tables, "cut at 100", "whole")
    assert set(compare([first], [first])) == {"CIDEr", "CIDEr_full", "diversity"}
    assert set(compare([first], [other])) == {"CIDEr_full", "diversity"}
    without = ReportStatistics({"CIDEr": np.ones((4, 1))}, "cut at 60", "whole")
    assert set(compare([first], [without])) == {"CIDEr"}
    with pytest.raises(InputError, match="not tested on the same reports"):
        compare([means([1.0, 2.0])], [means([1.0, 2.0], whole="others")])
    with pytest.raises(InputError, match="'' or 'reflabels' in their names"):
        compare([first], [dataclasses.replace(first, tag="reflabels")])
    assert "CIDEr_reflabels" in intervals(dataclasses.replace(first, tag="reflabels"))
    with pytest.raises(InputError, match="1 runs cannot be compared with 2"):
        compare([means([1.0, 2.0])], [means([1.0, 2.0])] * 2)


def test_nll_is_left_out_where_it_is_of_other_tokens():
    """Captions are scored whole: their digests are the same whatever the models' vocabularies are."""

    def run(tokens, targets=""):
        tables = {"nll": np.array([[2.0, tokens], [3.0, 4]]), "CIDEr": np.ones((2, 1))}
        return ReportStatistics(tables, "captions", "captions", targets=targets)

    assert set(compare([run(5, "a")], [run(5, "a")], resamples=9)) == {"nll", "CIDEr"}
    assert set(compare([run(5, "a")], [run(5, "b")], resamples=9)) == {"CIDEr"}
    assert set(compare([run(5, "a"), run(5, "a")], [run(5, "a"), run(5, "b")], resamples=9)) == {"CIDEr"}
    # Older files have no digest of the tokens, but their numbers.
    assert set(compare([run(5)], [run(5, "a")], resamples=9)) == {"nll", "CIDEr"}
    assert set(compare([run(5)], [run(6)], resamples=9)) == {"CIDEr"}


def test_scores_whose_references_were_labelled_otherwise_are_left_out():
    """Another version of a labeler: with equal reports the difference would be the references'."""
    rng = np.random.default_rng(0)
    labels, generated = (np.where(rng.random((60, 14)) < 0.3, 1.0, np.nan) for _ in range(2))
    other = labels.copy()
    other[:25, 0] = 1.0
    rarer = labels.copy()
    rarer[:, 1] = np.nan  # one class fewer has five positives
    rouge = {"ROUGE_L": np.full((60, 1), 0.5)}
    first, *others = (
        ReportStatistics(clinical_tables(own, generated, "rule") | rouge, "cut", "whole")
        for own in (labels, other, rarer)
    )
    for second in others:
        assert list(compare([first], [second], resamples=50)) == ["ROUGE_L"]
        assert list(intervals(first, second, resamples=50)) == ["ROUGE_L"]
    assert "ce_rule_f1_micro_14_uncertain_ignored" in compare([first], [first], resamples=50)
    counted = [
        ReportStatistics({"comparison_rate": np.column_stack([row, row]), "ROUGE_L": np.ones((9, 1))}, "", "")
        for row in (np.ones(9), np.arange(9) % 2)
    ]
    assert list(compare(counted[:1], counted[1:], resamples=50)) == ["ROUGE_L"]


def test_runs_of_other_sizes_or_without_a_common_score_are_one_line():
    with pytest.raises(InputError, match="the runs have 8 and 9 reports each"):
        compare([means(np.ones(9))], [means(np.ones(8))])
    with pytest.raises(InputError, match="no score in common"):
        compare([means(np.ones(9))], [means(np.ones(9), name="CIDEr")])
    wide = ReportStatistics({"ROUGE_L": np.ones((9, 2))}, "cut", "whole")
    with pytest.raises(InputError, match="no score in common"):
        compare([means(np.ones(9))], [wide])


def test_resamples_without_a_counted_report_are_no_zeros():
    def run(said, counted):
        table = np.zeros((40, 2))
        table[:counted, 1], table[:said, 0] = 1, 1
        return ReportStatistics({"comparison_rate_full": table}, "", "")

    assert set(intervals(run(30, 30), resamples=200)) == {"comparison_rate_full"} and not intervals(run(1, 1))
    few = compare([run(1, 1)] * 2, [run(0, 1)] * 2, resamples=200)["comparison_rate_full"]
    assert few.difference == 1 and (few.low, few.p, few.p_bootstrap) == (None, None, None)
    assert compare([run(30, 30)], [run(0, 30)], resamples=200)["comparison_rate_full"].p < 0.01


def test_spread_over_seeds():
    runs = [
        {"BLEU_4": 0.1, "METEOR": None, "CIDEr": 0.5},
        {"BLEU_4": 0.2, "METEOR": 0.3, "CIDEr": 0.5},
        {"BLEU_4": 0.3, "METEOR": 0.2, "CIDEr": 0.5, "nll": 2.0},
    ]
    assert over_seeds(runs) == {"BLEU_4": Spread(pytest.approx(0.2), pytest.approx(0.1), 3), "CIDEr": Spread(0.5, 0, 3)}
    assert over_seeds(runs[:1]) == {"BLEU_4": Spread(0.1, None, 1), "CIDEr": Spread(0.5, None, 1)}


def test_two_thousand_resamples_of_a_split_of_mimics_size_give_every_interval():
    rng = np.random.default_rng(0)
    clinical = rng.integers(0, 2, (3858, 42)).astype(bool)
    tables = {
        "BLEU": rng.integers(1, 60, (3858, 10)),
        "CIDEr": rng.uniform(0, 1, (3858, 1)),
        **{
            f"ce_rule_uncertain_{policy}{suffix}": clinical
            for policy in ("negative", "positive")
            for suffix in ("", "_full")
        },
    }
    found = intervals(ReportStatistics(tables, "", ""))
    assert len(found) == 5 + 96 + 4


@pytest.mark.parametrize(("resamples", "level"), [(2000, 0.95), (37, 0.95), (1, 0.95), (200, 0.5), (401, 0.9)])
def test_limits_are_the_percentiles_of_all_resamples(resamples, level):
    values = np.random.default_rng(0).normal(size=resamples)
    kept = _Resampled(resamples, level, {"x": 0.3})
    for start in range(0, resamples, 200):
        kept.add({"x": values[start : start + 200]})
    share = (1 - level) / 2
    assert kept.interval("x") == pytest.approx(np.quantile(values, [share, 1 - share]), abs=1e-15)
    assert kept.variance("x") == pytest.approx(values.var(), abs=1e-12)
    smaller = min((values <= 0).sum(), (values >= 0).sum())
    assert kept.two_sided("x") == pytest.approx(min(1, 2 * (smaller + 1) / (resamples + 1)))


def test_memory_does_not_grow_with_the_number_of_resamples():
    rng = np.random.default_rng(0)
    table = {f"ce_rule_uncertain_negative{suffix}": rng.integers(0, 2, (400, 42)).astype(bool) for suffix in ("", FULL)}
    run, other = (ReportStatistics(table | {"CIDEr": rng.uniform(size=(400, 1))}, "", "") for _ in range(2))
    compare([run], [other], resamples=400)  # imports
    peaks = {}
    for resamples in (400, 8000):
        tracemalloc.start()
        intervals(run, resamples=resamples)
        compare([run], [other], resamples=resamples)
        peaks[resamples] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[8000] < 1.1 * peaks[400]


def clinical(references, generated):
    truth, claim = np.array(references, dtype=float), np.array(generated, dtype=float)
    return ReportStatistics(clinical_tables(truth, claim, "rule"), "", "")


def test_systems_are_averaged_over_the_same_classes_whatever_they_are_uncertain_about():
    """Class 3 has five reference positives; a system that is uncertain about one of them is still averaged over it."""
    truth = np.zeros((12, 14))
    truth[:5, 3] = truth[:6, 5] = 1
    sure, unsure, half = truth.copy(), truth.copy(), truth.copy()
    unsure[0, 3] = -1
    half[:3, 5] = 0
    name = "ce_rule_f1_macro_min5_uncertain_ignored"
    assert clinical_scores(truth, unsure)[name] == clinical(truth, unsure).scores()[name] == 1.0
    found = compare([clinical(truth, sure)], [clinical(truth, unsure)])
    assert found[name].difference == 0 and name in clinical(truth, unsure).scores()
    seeds = compare([clinical(truth, unsure), clinical(truth, sure)], [clinical(truth, half)] * 2)
    single = compare([clinical(truth, sure)], [clinical(truth, half)])
    for score in ("ce_rule_f1_macro_min5_uncertain_positive", name):
        assert seeds[score].difference == pytest.approx(single[score].difference) != 0
    assert unsure_intervals(truth, unsure) == unsure_intervals(truth, sure)


def unsure_intervals(truth, claim):
    return set(intervals(clinical(truth, claim), resamples=50))


def test_one_patient_has_neither_an_interval_nor_a_test():
    one, other = (means([value] * 3, patients=np.zeros(3, dtype=int)) for value in (0.4, 0.5))
    assert intervals(one) == {}
    for seeds in (1, 2):
        found = compare([one] * seeds, [other] * seeds)["ROUGE_L"]
        assert found.difference == pytest.approx(-0.1) and found.p is None
        assert (found.low, found.high, found.p_bootstrap, found.p_randomisation, found.p_seeds) == (None,) * 5
        assert all(map(np.isnan, found.over_seeds(0.9)))
    assert holm({"a": 0.02, "b": None, "c": 0.03}) == {"a": 0.04, "b": None, "c": 0.04}
