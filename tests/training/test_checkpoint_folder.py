"""Whatever moment a run is killed at, two checkpoints and the best are there, whole, and the latest is found."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch

from modules.runtime.errors import InputError
from modules.training import checkpoint, checkpoint_folder
from modules.training.checkpoint import RESUMED, checksum_file, load_checkpoint, require_whole
from modules.training.checkpoint_folder import BEST, CURRENT, LOCK, PREVIOUS, CheckpointFolder


def state(step: int) -> dict:
    position = {"epoch": 1, "trained": False, "batches": step}
    return {name: kind() for name, kind in RESUMED.items()} | {
        "state_dict": {"w": torch.full((40_000,), float(step))},
        "position": position,
    }


def step_of(path) -> int:
    return load_checkpoint(path)["position"]["batches"]


def filled(path, steps=(1, 2, 3), best=2) -> CheckpointFolder:
    folder = CheckpointFolder(path)
    for step in steps:
        folder.save(state(step), best=step == best)
    return folder


def kept(path) -> dict[str, int]:
    return {name: step_of(path / name) for name in (CURRENT, PREVIOUS, BEST) if (path / name).is_file()}


def test_the_last_two_and_the_best_are_kept_with_checksums_that_sha256sum_reads(tmp_path):
    filled(tmp_path)
    assert kept(tmp_path) == {CURRENT: 3, PREVIOUS: 2, BEST: 2}
    for name in (CURRENT, PREVIOUS, BEST):
        subprocess.run(["sha256sum", "--check", "--strict", f"{name}.sha256"], cwd=tmp_path, check=True)
    assert {entry.stat().st_mode & 0o777 for entry in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 6


def test_epochs_are_kept_on_demand_and_move_aside_with_the_rest(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save(state(step), best=False)
        folder.keep_epoch(step)
        folder.keep_epoch(step)  # saved again after validation
    assert [step_of(tmp_path / f"epoch_000{step}.pth") for step in (1, 2, 3)] == [1, 2, 3]
    assert kept(tmp_path) == {CURRENT: 3, PREVIOUS: 2}
    subprocess.run(["sha256sum", "--check", "--strict", "epoch_0002.pth.sha256"], cwd=tmp_path, check=True)
    aside = folder.move_aside()
    assert step_of(aside / "epoch_0001.pth") == 1 and not list(tmp_path.glob("epoch_*"))


def killed_at(number: int, work) -> bool:
    """Run ``work`` in a process that is killed at its ``number``-th call that touches the disk; whether it was."""
    pid = os.fork()
    if pid == 0:
        calls = 0

        def counted(function):
            def call(*arguments, **keywords):
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **keywords)

            return call

        for name in ("open", "replace", "link", "fsync", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint._Hashed.write = counted(checkpoint._Hashed.write)
        work()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.thorough
def test_a_kill_at_any_call_of_a_save_leaves_everything_whole(tmp_path):
    number, seen = 0, set()
    while True:
        number += 1
        path = tmp_path / str(number)
        path.mkdir()
        folder = filled(path)
        killed = killed_at(number, lambda folder=folder: folder.save(state(4), best=True))
        for found in folder.present():
            require_whole(found)
        now = kept(path)
        seen.add(tuple(now.values()))
        again = CheckpointFolder(path)
        again.sweep()
        assert again.newest_valid()[1]["position"]["batches"] == now[CURRENT] and not again.problems
        assert {entry.suffix for entry in path.iterdir()} == {".pth", ".sha256"}
        assert len({now[CURRENT], now[PREVIOUS]}) == 2 and now[BEST] in (2, 4)
        again.save(state(5), best=False)
        assert kept(path) == {CURRENT: 5, PREVIOUS: now[CURRENT], BEST: now[BEST]}
        if not killed:
            break
    assert number > 30
    # current, previous, best: the new one takes its place first, then what it replaced, then the best.
    assert seen == {(3, 2, 2), (4, 2, 2), (4, 3, 2), (4, 3, 4)}


@pytest.mark.parametrize("number", range(1, 12))
def test_a_kill_in_the_first_save_leaves_nothing_or_a_whole_one(tmp_path, number):
    folder = CheckpointFolder(tmp_path)
    killed_at(number, lambda: folder.save(state(1), best=False))
    folder.sweep()
    found = folder.newest_valid()
    assert found is None or found[1]["position"]["batches"] == 1


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0])
def test_a_flipped_bit_is_named_and_the_one_before_is_taken(tmp_path, place):
    filled(tmp_path)
    content = bytearray((tmp_path / CURRENT).read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    (tmp_path / CURRENT).write_bytes(content)
    folder = CheckpointFolder(tmp_path)
    path, found = folder.newest_valid()
    assert (path.name, found["position"]["batches"]) == (PREVIOUS, 2)
    assert len(folder.problems) == 1 and f"{CURRENT}: damaged, " in folder.problems[0]
    # The damaged one is not what is kept.
    folder.save(state(4), best=False)
    assert kept(tmp_path) == {CURRENT: 4, PREVIOUS: 2, BEST: 2}


def test_the_later_of_previous_and_best_is_taken(tmp_path):
    filled(tmp_path, (1, 2, 3), best=3)
    (tmp_path / CURRENT).unlink()
    path, found = CheckpointFolder(tmp_path).newest_valid()
    assert (path.name, found["position"]["batches"]) == (BEST, 3)


def test_no_checkpoint_is_none_and_damaged_ones_are_an_error(tmp_path):
    assert CheckpointFolder(tmp_path).newest_valid() is None
    filled(tmp_path)
    for name in (CURRENT, PREVIOUS, BEST):
        os.truncate(tmp_path / name, 1000)
    with pytest.raises(InputError, match="no checkpoint in .* can be used: .*current.*; .*previous.*; .*best") as error:
        CheckpointFolder(tmp_path).newest_valid()
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_a_checksum_is_read(tmp_path):
    filled(tmp_path)
    checksum_file(tmp_path / CURRENT).unlink()
    assert step_of(tmp_path / CURRENT) == 3
    CheckpointFolder(tmp_path).save(state(4), best=False)
    assert kept(tmp_path) == {CURRENT: 4, PREVIOUS: 3, BEST: 2}


@pytest.mark.parametrize("damage", ["byte", "empty", "folder"])
def test_a_damaged_checksum_file_is_named_and_discards_no_checkpoint(tmp_path, caplog, damage):
    filled(tmp_path)
    place = checksum_file(tmp_path / CURRENT)
    text = place.read_text()
    place.unlink()
    if damage == "folder":
        place.mkdir()
    else:
        place.write_text("" if damage == "empty" else text.replace(text[5], "f" if text[5] != "f" else "e", 1))
    folder = CheckpointFolder(tmp_path)
    path, content = folder.newest_valid()
    assert (path.name, content["position"]["batches"]) == (CURRENT, 3) and not folder.problems
    assert f"{CURRENT}.sha256 does not belong to it or is damaged" in caplog.text
    if damage != "folder":
        folder.sweep()
        assert place.read_text() == text


def test_a_folder_that_was_deleted_is_said_to_be_gone(tmp_path):
    (tmp_path / "run").mkdir()
    folder = filled(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(InputError, match="its folder is gone, and with it this run's checkpoints") as error:
        folder.save(state(4), best=True)
    assert "intact" not in str(error.value)


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_a_run_made_and_left_empty_is_removed(tmp_path, fails):
    folder = CheckpointFolder(tmp_path / "new" / "run")
    with contextlib.suppress(InputError), folder.locked():
        assert folder.path.is_dir()
        if fails:
            raise InputError("an input is missing")
        folder.save(state(1), best=False)
    assert (tmp_path / "new").exists() is not fails


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(tmp_path):
    folder = filled(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written .*the previous one is intact") as error:
            folder.save(state(4), best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert kept(tmp_path) == {CURRENT: 3, PREVIOUS: 2, BEST: 2}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    folder.save(state(4), best=True)
    assert kept(tmp_path) == {CURRENT: 4, PREVIOUS: 3, BEST: 4}


@pytest.mark.parametrize("failing", ["write_checkpoint", "_link", "_sync_folder"])
def test_any_failure_of_the_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, failing):
    folder = filled(tmp_path)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_folder, failing, fail)
    with pytest.raises(InputError, match="Input/output error"):
        folder.save(state(4), best=True)
    assert {step_of(path) for path in folder.present()} >= {2, 3}
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_does_not_read_back_is_not_taken(tmp_path, monkeypatch):
    folder = filled(tmp_path)
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(InputError, match="does not read back"):
        folder.save(state(4), best=True)
    monkeypatch.undo()
    assert kept(tmp_path) == {CURRENT: 3, PREVIOUS: 2, BEST: 2}


def test_without_hard_links_the_files_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    filled(tmp_path)
    assert kept(tmp_path) == {CURRENT: 3, PREVIOUS: 2, BEST: 2}
    assert (tmp_path / BEST).stat().st_nlink == 1 and (tmp_path / BEST).stat().st_mode & 0o777 == 0o600


def test_what_another_run_left_is_moved_aside_whole(tmp_path):
    assert CheckpointFolder(tmp_path).move_aside() is None
    for name in ("hard_negatives.safetensors", "history.json", "results.json", "train.log"):
        (tmp_path / name).write_text(name)
    folder = filled(tmp_path)
    assert folder.move_aside() == tmp_path / "earlier_1"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["earlier_1", "hard_negatives.safetensors"]
    assert kept(tmp_path / "earlier_1") == {CURRENT: 3, PREVIOUS: 2, BEST: 2}
    assert (tmp_path / "earlier_1" / "results.json").read_text() == "results.json"
    filled(tmp_path, steps=[7])
    assert folder.move_aside() == tmp_path / "earlier_2"


def test_a_second_training_is_kept_out(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with folder.locked():
        pid = os.fork()  # a lock is between processes
        if pid == 0:
            try:
                with CheckpointFolder(tmp_path).locked():
                    os._exit(0)
            except InputError as error:
                os._exit(7 if "another training is writing there" in str(error) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with folder.locked():
        pass


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_the_lock_does_not_block(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(InputError, match="cannot be written"), CheckpointFolder(tmp_path).locked():
        pass


def test_a_folder_that_something_else_is_in_by_now_stays(tmp_path):
    """The lock made results/ and results/a; a cache of features was written beside meanwhile."""
    with pytest.raises(InputError, match="a mistake"), CheckpointFolder(tmp_path / "results" / "a").locked():
        (tmp_path / "results" / "features").mkdir()
        raise InputError("a mistake")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["features"]
