"""Freed memory is kept within the context, and given back after it."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from modules.runtime.memory import freed_memory_kept

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")

# A process of its own: what other tests have freed would be taken first.
FAULTS = r"""
import resource
from modules.runtime.memory import freed_memory_kept

def faults(blocks):
    "Page faults of filling that many blocks of 40 MiB, one after the other."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for n in range(blocks):
        bytes([n + 1]) * (40 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(4))
with freed_memory_kept():
    faults(1)
    print(faults(4))
print(faults(4))
"""


def test_large_blocks_are_faulted_in_once():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    outside, within, after = map(int, done.stdout.split())
    assert within < outside / 20 and after > outside / 2  # what is freed is the system's again


def test_another_c_library_changes_nothing(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with freed_memory_kept():
        pass
