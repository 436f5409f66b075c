"""How far a score can be trusted: bootstrap intervals, paired tests between two systems, and spread over seeds.

Reports are resampled, not rescored: see modules.evaluation.report_statistics. Resamples depend on the seed and on the
number of reports alone, so that two systems meet the same ones.

Shapes: N reports, R resamples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modules.evaluation.report_statistics import ReportStatistics, scores_of_sums
from modules.evaluation.score_names import FULL, tagged
from modules.runtime.errors import InputError

RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 200  # resamples at a time: N * 200 float64 numbers


@dataclass(frozen=True)
class Difference:
    """First minus second: the difference of a score, its interval, and the two-sided p-values of two paired tests."""

    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_randomisation: float


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the standard deviation with n - 1 in the denominator; None for one seed."""

    mean: float
    sd: float | None
    seeds: int


def intervals(
    *runs: ReportStatistics, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of every score (Efron, 1979): what other test reports of this kind would give.

    Of several runs (seeds) on the same test reports it is the interval of their mean score. It covers the choice of
    the test reports, not that of the training seed. InputError where the runs are not about the same reports.
    """
    columns = _Columns(runs, _comparable(runs))
    drawn = _stack(columns.scores(counts) for counts in _resamples(len(runs[0]), resamples, seed))
    return {name: _interval(values, level) for name, values in drawn.items()}


def compare(
    first: Sequence[ReportStatistics],
    second: Sequence[ReportStatistics],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare two systems report by report, each given by one or more runs (seeds), whose scores are averaged.

    Paired bootstrap (Koehn, 2004): the interval of the difference, and p = twice the smaller share of resamples on
    either side of 0. Approximate randomisation (Noreen, 1989; Riezler and Maxwell, 2005): the share of random
    exchanges of the two systems' reports that differ at least as much. Each p counts the observation itself, so none
    is below 1 / (R + 1). Scores on cut references are left out where the runs cut differently (another vocabulary or
    --max_seq_length). InputError where the runs are not about the same test reports, or not equally many.
    """
    names = _comparable([*first, *second])
    if len(first) != len(second):
        raise InputError(f"{len(first)} runs cannot be compared with {len(second)}: equally many seeds are needed")
    sides = [_Columns(runs, names) for runs in (first, second)]
    count = len(first[0])
    observed = _subtract(*(side.scores(np.ones((1, count))) for side in sides))
    bootstrap = _stack(
        _subtract(*(side.scores(counts) for side in sides)) for counts in _resamples(count, resamples, seed)
    )
    exchanged = _stack(_subtract(*_exchange(sides, swapped)) for swapped in _coin_flips(count, resamples, seed))
    found = {}
    for name, [difference] in observed.items():
        low, high = _interval(bootstrap[name], level)
        # Exchanging reports that are alike changes the order of summation and with it the last digit.
        beyond = np.abs(exchanged[name]) >= abs(difference) - 1e-12
        found[name] = Difference(float(difference), low, high, _two_sided(bootstrap[name]), _share(beyond))
    return found


def over_seeds(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    """Mean and standard deviation over runs that differ in their seed, of every score that all of them have."""
    names = [name for name in runs[0] if all(run.get(name) is not None for run in runs)]
    values = {name: np.array([run[name] for run in runs], dtype=float) for name in names}
    return {
        name: Spread(float(found.mean()), float(found.std(ddof=1)) if len(runs) > 1 else None, len(runs))
        for name, found in values.items()
    }


class _Columns:
    """The columns of one or more runs of a system side by side, so that one product sums all of them."""

    def __init__(self, runs: Sequence[ReportStatistics], names: Sequence[str] | None = None):
        tables = [run.columns() for run in runs]
        self.names = list(tables[0] if names is None else names)
        self.widths = [tables[0][name].shape[1] for name in self.names]
        self.count, self.tag = len(runs[0]), runs[0].tag
        self.matrices = [np.concatenate([table[name] for name in self.names], axis=1) for table in tables]  # (N, K)

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (R,), averaged over the runs, of resamples that hold report n ``counts[r, n]`` times."""
        return self.scores_of([counts @ matrix for matrix in self.matrices])

    def scores_of(self, sums: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Scores (R,), averaged over the runs, of each run's sums (R, K)."""
        ends = np.cumsum(self.widths)[:-1]
        runs = [
            scores_of_sums(dict(zip(self.names, np.split(total, ends, axis=1), strict=True)), self.count)
            for total in sums
        ]
        return {tagged(name, self.tag): np.mean([run[name] for run in runs], axis=0) for name in runs[0]}


def _exchange(sides: Sequence[_Columns], swapped: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Scores of both systems after they have exchanged the reports with ``swapped[r, n]`` = 1, in all runs alike."""
    first, second = sides
    moved = [swapped @ (theirs - own) for own, theirs in zip(first.matrices, second.matrices, strict=True)]
    return [
        first.scores_of([own.sum(axis=0) + change for own, change in zip(first.matrices, moved, strict=True)]),
        second.scores_of([own.sum(axis=0) - change for own, change in zip(second.matrices, moved, strict=True)]),
    ]


def _comparable(runs: Sequence[ReportStatistics]) -> list[str]:
    """Tables that all runs have and that mean the same in all of them."""
    if len({run.full_references for run in runs}) > 1:
        raise InputError("the runs were not tested on the same reports, in the same order: they cannot be compared")
    if len(tags := sorted({run.tag for run in runs})) > 1:
        raise InputError(f"runs whose scores have {' or '.join(map(repr, tags))} in their names cannot be compared")
    cut_alike = len({run.references for run in runs}) == 1
    names = [name for name in runs[0].tables if all(name in run.tables for run in runs)]
    return [name for name in names if cut_alike or name.endswith(FULL) or name == "diversity"]


def _resamples(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (<= _BLOCK, N) of how often each report was drawn when ``count`` are drawn with replacement."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _coin_flips(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        yield rng.integers(2, size=(min(_BLOCK, resamples - start), count)).astype(np.float64)


def _stack(blocks: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    found = list(blocks)
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


def _subtract(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: first[name] - second[name] for name in first}


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _two_sided(differences: np.ndarray) -> float:
    return min(1.0, 2 * min(_share(differences <= 0), _share(differences >= 0)))


def _share(hits: np.ndarray) -> float:
    return (int(hits.sum()) + 1) / (len(hits) + 1)
