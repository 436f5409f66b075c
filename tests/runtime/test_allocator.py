"""Freed memory is kept within the context, and given back after it."""

import ctypes
import resource

import pytest
import torch

from modules.runtime.allocator import freed_memory_kept

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")


def faults(blocks):
    """Page faults of filling that many blocks of 40 MiB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_blocks_are_faulted_in_once():
    outside = faults(4)
    with freed_memory_kept():
        faults(1)
        assert faults(4) < outside / 20
    assert faults(4) > outside / 2  # what is freed is the system's again


def test_another_c_library_changes_nothing(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with freed_memory_kept():
        pass
