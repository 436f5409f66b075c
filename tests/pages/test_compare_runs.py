"""compare_runs.py on two small results folders: numbers against hand-made ones, ranking, refusals, closed output."""

import csv
import json
import stat
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from modules.evaluation.metrics import Metrics
from modules.evaluation.report_statistics import ReportStatistics, save_statistics
from modules.pages.comparison import plain, rank, report_scores, settings_that_differ, to_html, to_markdown, to_text
from modules.runtime.errors import InputError
from scripts.compare_runs import compare_folders, read_folder

REFERENCES = ["the heart is large .", "lungs are clear .", "no pneumothorax is seen .", "small effusion on the left ."]
FIRST = ["the heart is normal .", "lungs are clear .", "no pneumothorax is seen .", "the lungs are clear ."]
SECOND = ["the heart is large .", "lungs are clear .", "effusion .", "small effusion on the left ."]


def results_folder(path, generated, references=REFERENCES, config=None):
    path.mkdir()
    for name, reports in (("res.csv", generated), ("gts.csv", references)):
        with open(path / name, "w", newline="") as file:
            csv.writer(file).writerows([report] for report in reports)
    if config is not None:
        (path / "results.json").write_text(json.dumps({"config": config, "synthetic": True, "test": {"model": {}}}))
    return path


def keep_statistics(path, tables, references="cut", full="whole"):
    save_statistics(path / "statistics.npz", {"model": ReportStatistics(tables, references, full)})


@pytest.fixture
def runs(tmp_path):
    return (
        results_folder(tmp_path / "a", FIRST, config={"alpha": 0.1, "seed": 1, "device": "cpu"}),
        results_folder(tmp_path / "b", SECOND, config={"alpha": 0.01, "seed": 1, "device": "cuda"}),
    )


def compared(paths, **options):
    options = {"by": "ROUGE_L", "show": 2, "all_scores": False} | options
    return compare_folders(tuple(map(read_folder, paths)), **options)


def test_scores_are_those_of_the_metrics_and_reports_are_ranked(runs):
    comparison = compared(runs)
    with Metrics() as metrics:
        first, second = (metrics.compute(REFERENCES, texts, with_meteor=False) for texts in (FIRST, SECOND))
    lines = {line.name: line for line in comparison.scores}
    assert set(lines) == {"BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr"}
    for name, line in lines.items():
        assert (line.first, line.second) == (pytest.approx(first[name]), pytest.approx(second[name]))
        assert line.change.difference == pytest.approx(second[name] - first[name])
    assert [pair.number for pair in comparison.better] == [4, 1] and [pair.number for pair in comparison.worse] == [3]
    assert (comparison.better[0].first, comparison.better[0].second_score) == (FIRST[3], 1.0)
    assert (comparison.same, comparison.count, comparison.synthetic) == (1, 4, True)
    # Where a run computed says nothing about its scores.
    assert comparison.settings == [("alpha", "0.1", "0.01")]


def test_headers_are_no_reports_and_ids_say_which_belong_together(runs):
    """R2Gen's files as pandas writes them with a header, and with ids in another order."""
    plain = compared(runs)
    for name, texts, order in (("res.csv", SECOND, [2, 0, 3, 1]), ("gts.csv", REFERENCES, range(4))):
        rows = [["study_id", "report"], *([f"s{number}", texts[number]] for number in order)]
        with open(runs[1] / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    for name, texts in (("res.csv", FIRST), ("gts.csv", REFERENCES)):
        (runs[0] / name).write_text("\n".join(["report", *texts, ""]))
    found = compared(runs)
    assert found.count == 4 and found.scores == plain.scores and found.better == plain.better


def test_kept_statistics_are_used(runs):
    for path, values in zip(runs, ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.9, 0.4]), strict=True):
        keep_statistics(
            path,
            {
                "CIDEr": np.array(values)[:, None],
                "CIDEr_full": np.zeros((4, 1)),
                "ce_rule_uncertain_negative_full": np.zeros((4, 42), dtype=bool),
            },
        )
    comparison = compared(runs, by="CIDEr")
    assert not comparison.notes and [pair.number for pair in comparison.better] == [3] and not comparison.worse
    assert {line.name for line in comparison.scores} == {
        "CIDEr",
        "ce_rule_f1_micro_14_uncertain_negative_full",
        "ce_rule_f1_macro_14_uncertain_negative_full",
    }
    assert len(compared(runs, by="CIDEr", all_scores=True).scores) == 2 + 24
    with pytest.raises(InputError, match="--by METEOR: must be one of CIDEr, CIDEr_full, or a ce_"):
        compared(runs, by="METEOR")


def test_captions_are_compared_by_their_statistics(tmp_path):
    runs = [results_folder(tmp_path / name, ["a dog", ""], config={"dataset_name": "coco"}) for name in "ab"]
    for path, values in zip(runs, ([0.1, 0.2], [0.3, 0.2]), strict=True):
        (path / "gts.csv").write_text("A dog.,Dogs here,\nA cat,cats,two cats\n")
        with pytest.raises(InputError, match="statistics.npz is not there, by which captions"):
            read_folder(path)
        keep_statistics(path, {"CIDEr": np.array(values)[:, None]}, "same", "same")
    comparison = compared(runs, by="CIDEr")
    assert [line.name for line in comparison.scores] == ["CIDEr"]
    assert [pair.reference for pair in comparison.better] == ["A dog. / Dogs here"]


def test_runs_that_cut_references_differently_are_compared_on_whole_ones(runs):
    labels = np.zeros((4, 42), bool)
    for path, cut in zip(runs, ("cut at 60", "cut at 100"), strict=True):
        keep_statistics(
            path,
            {
                name: table
                for suffix in ("", "_full")
                for name, table in (
                    (f"CIDEr{suffix}", np.ones((4, 1))),
                    (f"ce_rule_uncertain_negative{suffix}", labels),
                )
            },
            references=cut,
        )
    comparison = compared(runs, by="CIDEr")
    assert comparison.by == "CIDEr_full"
    assert [line.name for line in comparison.scores] == [
        "CIDEr_full",
        *(f"ce_rule_f1_{average}_14_uncertain_negative_full" for average in ("micro", "macro")),
    ]
    assert "--max_seq_length" in comparison.notes[0]


@pytest.mark.parametrize(
    ("references", "part"),
    [(REFERENCES[:3], "4 and 3 reports"), ([*REFERENCES[:2], "other .", REFERENCES[3]], "first in row 3")],
)
def test_other_test_reports_are_refused_without_their_text(runs, tmp_path, references, part):
    other = results_folder(tmp_path / "c", SECOND[: len(references)], references)
    with pytest.raises(InputError, match=part) as error:
        compared((runs[0], other))
    assert "other ." not in str(error.value)


def test_same_texts_under_other_ids_are_refused(runs):
    for path, full in zip(runs, ("one", "two"), strict=True):
        keep_statistics(path, {"CIDEr": np.ones((4, 1))}, full=full)
    with pytest.raises(InputError, match="other ids"):
        compared(runs)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("res.csv", "a\nb\n", "res.csv has 2 reports and gts.csv 4"),
        ("res.csv", "a,b\nc,d\n", "has 2 columns and none called report"),
        ("res.csv", "a,b,c\n", "has 3 columns and none called report"),
        ("res.csv", 'a\n"b\n', "a quotation mark is never closed"),
        ("statistics.npz", "damaged", "not the statistics"),
        ("results.json", "{", "cannot be read"),
        ("res.csv", None, "there is no such file"),
    ],
)
def test_damaged_folders_get_one_line(runs, name, content, part):
    keep_statistics(runs[1], {"CIDEr": np.ones((4, 1))})
    keep_statistics(runs[0], {"CIDEr": np.ones((4, 1))})
    (runs[0] / name).unlink() if content is None else (runs[0] / name).write_text(content)
    with pytest.raises(InputError, match=part) as error:
        compared(runs)
    assert str(runs[0]) in str(error.value) and "\n" not in str(error.value)


def test_statistics_of_another_test_are_refused(runs):
    for path in runs:
        keep_statistics(path, {"CIDEr": np.ones((3, 1))})
    with pytest.raises(InputError, match="is not about the 4 reports"):
        compared(runs)


def test_a_reports_own_score_is_that_of_a_split_of_one():
    with Metrics() as metrics:
        _, tables = metrics.measure(REFERENCES, FIRST, with_meteor=False)
        alone = [
            metrics.compute([reference], [text], with_meteor=False)
            for reference, text in zip(REFERENCES, FIRST, strict=True)
        ]
    statistics = ReportStatistics(tables, "", "")
    for name in ("BLEU_4", "ROUGE_L"):
        assert report_scores(statistics, name) == pytest.approx([scores[name] for scores in alone])
    assert report_scores(statistics, "METEOR") is None
    marked = ReportStatistics(tables, "", "", tag="reference_labels")
    for name in ("ROUGE_L", "ROUGE_L_reference_labels"):
        assert report_scores(marked, name) == pytest.approx(report_scores(statistics, "ROUGE_L"))


def test_nll_of_other_tokens_is_left_out_with_a_note(runs):
    for path, tokens in zip(runs, (5, 6), strict=True):
        keep_statistics(path, {"CIDEr": np.ones((4, 1)), "nll": np.tile([1.0, tokens], (4, 1))})
    comparison = compared(runs, by="CIDEr")
    assert [line.name for line in comparison.scores] == ["CIDEr"] and "nll is left out" in comparison.notes[0]
    with pytest.raises(InputError, match="--by nll: must be one of CIDEr"):
        compared(runs, by="nll")


def test_scores_of_references_labelled_otherwise_are_left_out_with_a_note(runs):
    for path, counted in zip(runs, (np.ones(4), np.array([1.0, 0, 1, 1])), strict=True):
        rate = {"comparison_rate_full": np.column_stack([counted, counted])}
        keep_statistics(path, {"CIDEr": np.ones((4, 1))} | rate)
    comparison = compared(runs, by="CIDEr")
    assert [line.name for line in comparison.scores] == ["CIDEr"]
    assert comparison.notes[0].startswith("Left out are 1 scores, such as comparison_rate_full:")


def test_a_report_with_more_errors_has_not_gained(runs):
    for path, devices in zip(runs, ([0, 0, 1, 0], [3, 0, 0, 0]), strict=True):
        keep_statistics(path, {"hallucinated_devices_full": np.array(devices, dtype=float)[:, None]})
    comparison = compared(runs, by="hallucinated_devices_full")
    assert [pair.number for pair in comparison.better] == [3] and [pair.number for pair in comparison.worse] == [1]


def test_rank_leaves_out_what_has_not_changed():
    assert rank(np.array([0.0, 0.5, -0.1, 0.5, 0.2]), 3) == ([1, 3, 4], [2])
    assert rank(np.array([np.nan, -1.0, 1.0, np.nan]), 1) == ([2], [1])
    assert rank(np.zeros(3), 3) == ([], []) and rank(np.array([1.0, -1.0]), 0) == ([], [])


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)


def test_hostile_text_stays_text(tmp_path):
    bad = "<script>alert(1)</script> | `x` [a](b) \x1b[31m red\u202e"
    paths = [results_folder(tmp_path / name, [text], ["fine ."]) for name, text in (("a", "fine ."), ("b", bad))]
    comparison = compared(paths)
    page = to_html(comparison)
    assert not {"script", "a", "img"} & Tags(page).found and "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert "<script>" not in to_markdown(comparison) and r"\[a\]\(b\)" in to_markdown(comparison)
    assert "\x1b" not in to_text(comparison) and "\u202e" not in to_text(comparison) + to_markdown(comparison)
    assert plain("a\tb\n c\x07") == "a b c"


def test_settings_that_differ():
    assert settings_that_differ({"a": 1, "b": 2, "c": [1]}, {"a": 1, "b": 3, "d": 4}, frozenset("c")) == [
        ("b", "2", "3"),
        ("d", "–", "4"),
    ]


def test_the_command(runs, tmp_path):
    def call(*arguments):
        return subprocess.run(
            [sys.executable, "scripts/compare_runs.py", *map(str, arguments)], capture_output=True, text=True
        )

    done = call(*runs, "--html", "--markdown", "--show", 1)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC" in done.stdout and FIRST[3] in done.stdout and "differs: alpha: 0.1 | 0.01" in done.stdout
    for written in runs[1].glob("comparison_with_*"):
        assert stat.S_IMODE(written.stat().st_mode) == 0o600 and "synthetic" in written.read_text().lower()
    assert len(list(runs[1].glob("comparison_with_*"))) == 2 and not list(runs[0].glob("comparison_with_*"))
    assert FIRST[0] not in call(*runs, "--show", 0).stdout
    wrong = call(runs[0], tmp_path / "none")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "no such folder" in wrong.stderr
