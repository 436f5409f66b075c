"""What a score's name says besides the metric: which references were used, and how reports were generated."""

from collections.abc import Mapping
from typing import Any

FULL = "_full"  # whole references
SELECTION = "selection"  # of a validation: what the best epoch is chosen by instead of the monitored score
TRUNCATED = "_truncated"  # references cut to max_seq_length, as in the R2Gen family; the same as no suffix


def tagged(name: str, tag: str) -> str:
    """A score's name with ``tag`` in it, if any: BLEU_4_<tag>; the suffix _full stays at the end."""
    if not tag:
        return name
    return f"{name.removesuffix(FULL)}_{tag}" + (FULL if name.endswith(FULL) else "")


def untagged(name: str, tag: str) -> str:
    """The inverse of ``tagged``."""
    return name.replace(f"_{tag}", "") if tag else name


def with_aliases(scores: Mapping[str, Any]) -> dict[str, Any]:
    """``scores`` with an alias ``<name>_truncated`` for each one that also has a ``_full`` form."""
    return {**scores, **{f"{name}{TRUNCATED}": value for name, value in scores.items() if f"{name}{FULL}" in scores}}
