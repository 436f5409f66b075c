"""Bounds on the sizes that a description of a model may name, which come from files that others wrote."""

from collections.abc import Iterator
from typing import Any

MAX_NUMBER = 2**20  # lists of as many entries are made before the first layer is
# Entries that are no sizes: bases and scales of rotary positions, often above a million, and ids of tokens.
_NO_SIZES = ("rope_theta", "rope_scaling", "rope_parameters", "_token_id")


def require_moderate(description: Any) -> None:
    """ValueError for a size in JSON that no architecture has."""
    if (largest := max(_numbers(description), default=0)) > MAX_NUMBER:
        raise ValueError(f"a size of {largest}")


def _numbers(value: Any) -> Iterator[int]:
    """All whole numbers in JSON that may be sizes."""
    if isinstance(value, dict):
        value = [part for name, part in value.items() if not name.endswith(_NO_SIZES)]
    if isinstance(value, list):
        for part in value:
            yield from _numbers(part)
    elif type(value) is int:
        yield value
