"""Paired tests of several systems against the first of them, each given by one or more runs (seeds)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modules.evaluation.bootstrap import Difference, compare, holm
from modules.evaluation.scored import Scored
from modules.runtime.errors import InputError


@dataclass(frozen=True)
class SystemTest:
    """A system's score next to the first system's, means over seeds, and the test of their difference.

    ``p_holm`` is corrected for all scores of all systems that were tested together.
    """

    system: str
    score: str
    first: float
    value: float
    change: Difference
    p_holm: float | None


def paired_tests(
    scored: Scored, systems: Mapping[str, Sequence[str]], shown: Callable[[str], bool]
) -> list[SystemTest]:
    """Every system against the first, in the scores whose names are ``shown``.

    ``systems``: the names of each system's runs in ``scored``, one or equally many seeds. InputError where a system has
    another number of seeds than the first.
    """
    first, *others = systems
    runs = {system: [scored.statistics[name] for name in names] for system, names in systems.items()}
    values = {name: statistics.scores() for name, statistics in scored.statistics.items()}
    tests = []
    for system in others:
        if len(runs[system]) != len(runs[first]):
            raise InputError(
                f"{system} has {len(runs[system])} seeds and {first} {len(runs[first])}: give equally many of each"
            )
        for name, change in compare(runs[system], runs[first]).items():
            if shown(name):
                means = [_mean([values[run][name] for run in systems[each]]) for each in (first, system)]
                tests.append((system, name, *means, change))
    corrected = holm({test[:2]: test[-1].p for test in tests})
    return [SystemTest(*test, p_holm=corrected[test[:2]]) for test in tests]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
