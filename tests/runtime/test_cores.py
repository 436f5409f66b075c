"""Threads and processes by what a container grants, not by what the host has."""

import os
import subprocess
import sys

import pytest

from modules.flags import parse_flags, resolve_config
from modules.runtime import cores
from modules.runtime.environment import ROOT
from modules.runtime.errors import InputError, run_entry_point


@pytest.fixture
def group(tmp_path):
    """``group(files, own)``: the quota in a tree of control groups with these files, for a process in ``own``."""

    def quota(files, own="0::/a/b\n"):
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text)
        (tmp_path / "own").write_text(own)
        return cores.cpu_quota(tmp_path / "cgroup", tmp_path / "own")

    return quota


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", None),
        ({"a/b/cpu.max": "150000 100000\n"}, "0::/a/b\n", 1.5),
        ({"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "200000 100000\n"}, "0::/a/b\n", 2.0),  # the parent's is less
        ({"cpu.max": "300000 100000\n"}, "0::/host/name\n", 3.0),  # in a container, whose root is its own group
        ({"cpu.max": "300000 100000\n"}, "0::/../other\n", 3.0),
        ({"cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
         "4:memory:/x\n3:cpu,cpuacct:/a\n", 0.5),  # version 1
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpu:/\n", None),
        ({"cpu.max": "100000 0\n"}, "0::/\n", None),
        ({}, "", None),
        ({"a/b/cpu.max": "\x00nonsense\n"}, "nonsense\n0::/a/b\n", None),
    ],
)  # fmt: skip
def test_the_quota_is_the_least_of_all_groups(group, files, own, expected):
    assert group(files, own) == expected


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (1.5, 2), (4.0, 4), (64.0, 8)])
def test_cores_are_no_more_than_the_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(
    ("asked", "available", "processes", "expected"),
    [(0, 8, None, 0), (3, 1, None, 3), (-1, 8, None, 8), (-1, 64, None, 16), (-1, 64, "8", 8), (-1, 2, "4", 1)],
)
def test_auto_is_this_process_part_of_the_cores(monkeypatch, asked, available, processes, expected):
    monkeypatch.setattr(cores, "usable_cores", lambda: available)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores.worker_processes(asked) == expected


@pytest.mark.parametrize(("quota", "threads"), [(6.0, "6"), (None, None), (64.0, None)])
def test_programs_bound_their_threads_before_torch_is_imported(monkeypatch, quota, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(cores, "_threads_were_given", True)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that both are as before afterwards
        monkeypatch.delenv(name)
    seen = {}

    def main():
        seen.update(os.environ)
        cores.share_threads(3)

    with pytest.raises(SystemExit):
        run_entry_point(main)
    assert seen.get("OMP_NUM_THREADS") == threads and seen["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == ("2" if quota == 6 else "4")


def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setattr(cores, "_threads_were_given", False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    cores.choose_threads()
    cores.share_threads(2)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("5", "ACTIVE")


def test_auto_is_a_number_of_processes_for_one_flag_only():
    def read(*argv):
        return resolve_config(parse_flags(list(argv), "main_train.py", "")[0]).num_workers

    assert read("--num_workers", "auto") == cores.AUTO and read("--num_workers", "3") == 3
    with pytest.raises(InputError, match="--num_workers -2: must be at least 0"):
        read("--num_workers", "-2")
    said = subprocess.run(
        [sys.executable, "main_train.py", "--num_workers", "two"], capture_output=True, text=True, cwd=ROOT
    )
    assert said.returncode == 2 and "--num_workers: 'two' is neither auto nor a whole number" in said.stderr
