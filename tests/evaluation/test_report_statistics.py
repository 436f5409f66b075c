"""Sums of per-report statistics give exactly the scores of the published tools, of a split and of any resample."""

import dataclasses
import os
import stat

import numpy as np
import pytest

from modules.evaluation.clinical_scores import clinical_scores
from modules.evaluation.diversity import diversity, ngram_counts
from modules.evaluation.meteor import weighted_counts
from modules.evaluation.metrics import Metrics, measure
from modules.evaluation.report_statistics import (
    ReportStatistics,
    clinical_tables,
    digest,
    join,
    load_statistics,
    save_statistics,
)
from modules.evaluation.system_scorer import units_of
from modules.labels.labeler import label_reports
from modules.runtime.errors import InputError

REFERENCES = [
    "the heart is normal in size . the lungs are clear .",
    "there is a small left pleural effusion . no pneumothorax .",
    "mild cardiomegaly . the lungs are hyperinflated with no focal consolidation .",
    "a right sided chest tube ends at the apex . there is no pneumothorax .",
    "no acute disease .",
]
# One empty, one equal to its reference (METEOR counts no chunk of it), one longer, one that repeats itself.
HYPOTHESES = [
    "the heart size is normal . lung fields are clear .",
    "no pleural effusion . no pleural effusion . no pleural effusion .",
    "",
    "a chest tube is seen on the right . a small apical pneumothorax remains . there may be edema .",
    "no acute disease .",
]


@pytest.fixture(scope="module")
def metrics():
    with Metrics(timeout=600) as opened:
        yield opened


def statistics_of(metrics, references, hypotheses):
    """Scores as the run writes them, and the statistics that must give the same."""
    scores, tables = measure(metrics, [text[:30] for text in references], references, hypotheses)
    truth, claim = label_reports(references), label_reports(hypotheses)
    scores |= clinical_scores(truth, claim) | {"diversity": diversity(hypotheses)}
    tables |= clinical_tables(truth, claim, "rule") | {"diversity": ngram_counts(hypotheses)}
    return scores, ReportStatistics(tables, "cut", "whole")


@pytest.mark.thorough
def test_sums_give_every_score_exactly(metrics):
    scores, statistics = statistics_of(metrics, REFERENCES, HYPOTHESES)
    assert statistics.scores() == pytest.approx(scores, abs=1e-15)
    assert len(scores) == 2 * 7 + 72 + 1 and len(statistics) == 5


def test_joined_parts_are_scored_as_one_test_set(metrics):
    """CIDEr apart, whose document frequencies are those of each part."""
    whole, _ = statistics_of(metrics, REFERENCES, HYPOTHESES)
    parts = [statistics_of(metrics, REFERENCES[part], HYPOTHESES[part])[1] for part in (slice(0, 2), slice(2, 5))]
    joined = join(parts)
    found = joined.scores()
    for name in ("CIDEr", "CIDEr_full"):
        whole[name] = np.average([part.scores()[name] for part in parts], weights=[2, 3])
    assert len(joined) == 5 and found == pytest.approx(whole, abs=1e-15)
    # Only the same parts, in the same order, can be compared.
    named = [dataclasses.replace(part, full_references=name) for name, part in zip("ab", parts, strict=True)]
    assert join(named).full_references != join(named[::-1]).full_references
    targets = [dataclasses.replace(part, targets=name) for name, part in zip("ab", parts, strict=True)]
    assert join(targets).targets != join(targets[::-1]).targets and join([targets[0], parts[1]]).targets == ""


def test_joining_keeps_what_all_parts_have_and_refuses_other_names(metrics):
    _, one = statistics_of(metrics, REFERENCES, HYPOTHESES)
    other = dataclasses.replace(one, tables={"BLEU": one.tables["BLEU"]})
    assert list(join([one, other]).tables) == list(join([other, one]).tables) == ["BLEU"]
    with pytest.raises(InputError, match="cannot be joined"):
        join([one, dataclasses.replace(one, tag="truncated_60")])


def test_joining_keeps_the_patients_of_the_parts_that_know_them():
    """One fold without a subject_id must not turn the others' reports into patients of their own."""
    table = {"ROUGE_L": np.ones((4, 1))}
    known = ReportStatistics(table, "", "", studies=np.arange(4), patients=np.array([0, 0, 1, 1]))
    studies = ReportStatistics(table, "", "", studies=np.array([0, 0, 1, 2]))
    nothing = ReportStatistics(table, "", "")
    level, numbers = join([nothing, known, studies]).units
    assert level == "patients" and numbers.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8]
    assert join([nothing, studies]).units[0] == "studies" and join([nothing, nothing]).units[0] == "reports"


def test_a_report_without_a_subject_is_of_its_studys_patient():
    studies, patients = units_of(["s1", "s1", "s2", "s3", "s3"], ["", "p1", "p1", "", ""])
    assert patients.tolist() == [0, 0, 0, 1, 1] and studies.tolist() == [0, 0, 1, 2, 2]
    assert units_of(None, ["p1", "", ""])[1].tolist() == [0, 1, 2]
    assert units_of(["s1"], [""])[1] is None


@pytest.mark.parametrize("rows", [[0, 0, 3, 1], [2], [4], [4, 4], [2, 4]])
def test_chosen_rows_give_the_scores_of_the_chosen_reports(metrics, rows):
    """CIDEr apart, whose document frequencies are those of all references on purpose."""
    _, whole = statistics_of(metrics, REFERENCES, HYPOTHESES)
    chosen = ReportStatistics({name: table[rows] for name, table in whole.tables.items()}, "", "").scores()
    expected, _ = statistics_of(metrics, [REFERENCES[i] for i in rows], [HYPOTHESES[i] for i in rows])
    for name, value in expected.items():
        if not name.startswith("CIDEr") and value is not None:
            assert chosen[name] == pytest.approx(value, abs=1e-12), name


def test_nll_is_the_mean_over_tokens():
    table = np.array([[2.0, 1], [1.0, 5]])
    assert ReportStatistics({"nll": table}, "", "").scores() == {"nll": 3.0 / 6}


def test_a_score_that_nothing_is_counted_for_is_none():
    tables = {
        "comparison_rate_full": np.array([[0.0, 0], [0, 0], [1, 1], [0, 1]]),  # the first two have a prior
        "diversity": np.array([[0.0] * 6, [1, 0, 0, 1, 0, 0], [2, 1, 1, 2, 1, 1], [4, 3, 2, 5, 4, 3]]),
    }
    statistics = ReportStatistics(tables, "", "")
    assert statistics.scores(np.array([0, 1])) == {"comparison_rate_full": None, "diversity": None}
    assert statistics.scores(np.array([1, 2])) == {"comparison_rate_full": 1.0, "diversity": 1.0}
    assert statistics.scores()["comparison_rate_full"] == 0.5
    without = ReportStatistics({name: table[:2] for name, table in tables.items()}, "", "")
    assert without.columns() == {}


def test_meteor_lines_by_hand():
    # 3 words against 4, of which 1 and 2 are function words; "the ." matched: one word of each kind, in 2 chunks.
    line = "3 4 1 2 1 1 1 1 " + "0 " * 12 + "2 2 2"
    counts = weighted_counts(np.array([[float(number) for number in line.split()]]))
    [[length, reference_length, matches, reference_matches, chunks, matched]] = counts
    assert (length, reference_length) == pytest.approx((0.75 * 2 + 0.25, 0.75 * 2 + 0.25 * 2))
    assert (matches, reference_matches, chunks, matched) == pytest.approx((1.0, 1.0, 2, 2))


def test_the_file_brings_everything_back_and_is_the_owners_alone(metrics, tmp_path):
    statistics = dataclasses.replace(statistics_of(metrics, REFERENCES, HYPOTHESES)[1], targets="tokens")
    path = tmp_path / "run" / "statistics.npz"
    save_statistics(path, {"model": statistics, "commonest training report": statistics})
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    found = load_statistics(path)
    assert list(found) == ["model", "commonest training report"]
    assert found["model"].scores() == statistics.scores()
    assert (found["model"].references, found["model"].full_references) == ("cut", "whole")
    assert found["model"].targets == "tokens"
    with np.load(path) as stored:
        np.savez(path, **{name: array for name, array in stored.items() if name != "targets"})
    assert load_statistics(path)["model"].targets == ""  # of an older file
    save_statistics(path, {"model": dataclasses.replace(statistics, tag="reflabels")})
    tagged = load_statistics(path)["model"].scores()
    assert tagged["BLEU_4_reflabels_full"] == statistics.scores()["BLEU_4_full"] and "BLEU_4" not in tagged
    content = path.read_bytes()
    assert not any(word.encode() in content for word in ("heart", "effusion", "pneumothorax"))


def test_digest_is_of_ids_texts_and_their_order():
    digests = {
        digest(["a", "b"], ["x", "y"]),
        digest(["b", "a"], ["y", "x"]),
        digest(["a", "c"], ["x", "y"]),
        digest(["a", "b"], ["x", "z"]),
        digest(["a"], ["b", "x", "y"]),
    }
    assert len(digests) == 5 and digest(["a", "b"], ["x", "y"]) in digests


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04"])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "statistics.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="statistics.npz: (no such file|not the statistics)"):
        load_statistics(path)


def test_another_archive_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(InputError, match="not the statistics"):
        load_statistics(tmp_path / "other.npz")


def test_reports_without_four_words_have_no_diversity():
    for reports, known in ((["a b c", "a b"], False), (["a b c d", "a"], True)):
        statistics = ReportStatistics({"diversity": ngram_counts(reports), "ROUGE_L": np.ones((2, 1))}, "", "")
        assert ("diversity" in statistics.scores()) == known == (diversity(reports) is not None)
