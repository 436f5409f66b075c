"""The run's log and its progress: what ended a run, and lines instead of bars in a file."""

import logging
import os

import pytest

from modules.runtime import run_log
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.run_log import Bar, log_to, start_log


@pytest.fixture
def log(tmp_path):
    start_log()
    log_to(tmp_path / "train.log")
    yield tmp_path / "train.log"
    for handler in logging.getLogger("ithn").handlers:
        handler.close()
    logging.getLogger("ithn").handlers.clear()


@pytest.mark.parametrize(
    ("error", "code", "said", "traceback"),
    [
        (InputError("--lr x: is\nwrong"), 2, "ERROR ended by an error: --lr x: is wrong", False),
        (KeyboardInterrupt(), 130, "ERROR ended by an error: KeyboardInterrupt", False),
        (ZeroDivisionError("a bug"), None, "ERROR ended by an error: a bug", True),
    ],
)
def test_a_run_that_fails_leaves_its_error_in_its_log(log, capsys, error, code, said, traceback):
    def main():
        logging.getLogger("ithn").info("started")
        raise error

    with pytest.raises(SystemExit if code else ZeroDivisionError) as ended:
        run_entry_point(main)
    assert code is None or ended.value.code == code
    text = log.read_text()
    assert said in text and ("Traceback" in text) is traceback and "started" in text
    assert "ended by an error" not in capsys.readouterr().out  # the terminal has its own line


class Clock:
    """time.monotonic, moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(run_log.time, "monotonic", lambda: self.now)


@pytest.fixture
def lines(capsys):
    """What stderr got, which pytest replaces by a file, as nohup and SLURM do."""

    def read():
        text = capsys.readouterr().err
        assert "\r" not in text
        return text.splitlines()

    return read


def test_in_a_file_progress_is_a_line_every_half_minute(monkeypatch, lines):
    clock = Clock(monkeypatch)
    bar = Bar(range(100), "epoch 2")
    for number in bar:
        if number == 50:
            bar.show({"loss": 1.23456})
        clock.now += 1
    found = lines()
    assert len(found) == 4
    assert found[0] == "epoch 2: 30 of 100, 0:00:30 so far, 0:01:10 to go"
    assert found[1] == "epoch 2: 60 of 100, loss 1.23, 0:01:00 so far, 0:00:40 to go"
    assert found[3] == "epoch 2: 100 of 100, loss 1.23, 0:01:40 so far"


def test_values_that_make_a_line_long_are_left_out(monkeypatch, lines):
    clock = Clock(monkeypatch)
    with Bar(description="epoch 2", total=1000) as bar:
        bar.show({"loss": 1.0} | {f"retrieval_accuracy_{number}": 0.123 for number in range(9)})
        clock.now += 30
        bar.advance(300)
    found = lines()[0]
    assert found.startswith("epoch 2: 300 of 1,000, loss 1, retrieval_accuracy_0 0.123, ") and len(found) <= 120
    assert found.endswith(", 0:00:30 so far, 0:01:10 to go")


def test_what_is_done_in_a_moment_leaves_no_line(monkeypatch, lines):
    Clock(monkeypatch)
    assert list(Bar(iter("abc"), "images")) == ["a", "b", "c"]
    with Bar(description="embed", start=5, total=10) as bar:
        bar.advance(5)
    assert lines() == []


def test_resumed_work_is_estimated_from_what_was_done_now(monkeypatch, lines):
    clock = Clock(monkeypatch)
    with Bar(description="embed", start=900, total=1000) as bar:
        clock.now += 60
        bar.advance(50)
    assert lines()[0] == "embed: 950 of 1,000, 0:01:00 so far, 0:01:00 to go"


def test_values_are_due_now_and_then(monkeypatch, lines):
    clock = Clock(monkeypatch)
    bar = Bar(range(3), "epoch 1")
    assert not bar.due()
    clock.now += 30
    assert bar.due()
    bar.show({"loss": 1.0})
    assert not bar.due()


def test_other_processes_and_unwanted_bars_say_nothing(monkeypatch, lines):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(run_log, "process_number", lambda: 1)
    silent = [Bar(range(2), "epoch 1")]
    monkeypatch.setattr(run_log, "process_number", lambda: 0)
    for bar in [*silent, Bar(range(2), "embed", shown=False)]:
        for _ in bar:
            clock.now += 60
    assert lines() == []


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_the_log_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "train.log")
    start_log()
    with pytest.raises(InputError, match=r"train\.log' cannot be written"):
        log_to(tmp_path / "train.log")
