"""How far a score can be trusted: bootstrap intervals, paired tests between two systems, and spread over seeds.

Whole units are resampled (patients, else studies, else reports: the highest level that is known), and sums of
their reports are rescored: see modules.evaluation.report_statistics. Resamples depend on the seed and the number of
units alone, so that two systems meet the same ones.

Shapes: U units, R resamples, S runs (seeds) of a system, K columns of all tables.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modules.evaluation.metric_table import FULL, tagged
from modules.evaluation.report_statistics import ReportStatistics, scores_of_sums
from modules.runtime.errors import InputError

RESAMPLES = 2000  # of an interval
TEST_RESAMPLES = 10_000  # of a test: no p value is below 1 / 10,001, so that a correction for many tests leaves some
LEVEL = 0.95
_BLOCK = 200  # resamples at a time: U * 200 float64 numbers


@dataclass(frozen=True)
class Difference:
    """First minus second: the difference of a score, its interval, and the two-sided p values of three paired tests.

    ``low`` and ``high`` are None where no interval can be trusted, ``p_seeds`` where a system has a single seed, and
    all of them, with ``error`` NaN, where nothing can be tested. ``error`` is the standard error over reports and
    seeds, ``freedom`` the degrees of freedom of its t distribution.
    """

    difference: float
    low: float | None
    high: float | None
    p_bootstrap: float | None
    p_randomisation: float | None
    p_seeds: float | None = None
    error: float = 0.0
    freedom: float = np.inf

    def over_seeds(self, level: float) -> tuple[float, float]:
        """The interval of the difference between all seeds' models on all such reports, as p_seeds tests it."""
        from scipy.special import stdtrit

        margin = self.error * float(stdtrit(self.freedom, (1 + level) / 2))
        return self.difference - margin, self.difference + margin

    @property
    def p(self) -> float | None:
        """The p value to report: p_seeds where there are several seeds, else approximate randomisation's."""
        return self.p_randomisation if self.p_seeds is None else self.p_seeds


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the standard deviation with n - 1 in the denominator; None for one seed."""

    mean: float
    sd: float | None
    seeds: int


def intervals(
    *runs: ReportStatistics, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval (Efron, 1979) of every score that has a trustworthy one.

    It covers the choice of the test patients or studies, not of the training seed. Of several runs (seeds) on the same
    test reports it is the interval of their mean score. Macro averages over rare classes have none: see
    ReportStatistics.without_interval; neither has a score that counts so few reports that a resample has none of them;
    with one unit no score has one. InputError where the runs are not about the same reports.
    """
    sums = _Sums(runs, _comparable(runs), _units(runs))
    if sums.units < 2:
        return {}
    left_out = runs[0].without_interval()
    drawn = _Resampled(resamples, level)
    for counts in _resamples(sums.units, resamples, seed):
        drawn.add({name: values for name, values in _mean(sums.scores(counts)).items() if name not in left_out})
    return {name: drawn.interval(name) for name in drawn.names if drawn.defined(name)}


def compare(
    first: Sequence[ReportStatistics],
    second: Sequence[ReportStatistics],
    *,
    resamples: int = TEST_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare two systems unit by unit, each given by one or more runs (seeds), whose scores are averaged.

    - p_bootstrap: paired bootstrap (Koehn, 2004), twice the smaller share of resamples on either side of 0.
    - p_randomisation: approximate randomisation (Noreen, 1989; Riezler and Maxwell, 2005), the share of random
      exchanges of the two systems' units that differ at least as much.
    - p_seeds: the only test that is about other seeds too. To the bootstrap variance over units comes the variance of
      each system's mean over its S seeds, and the difference is referred to Student's t with the degrees of freedom of
      Welch (1947) and Satterthwaite. Resampling the few seeds themselves finds too much: docs/EVALUATION.md.

    Each p counts the observation itself, so none is below 1 / (R + 1); of one unit nothing can be tested, nor a score
    that counts so few reports that a resample has none of them. Scores on cut references are left out where the runs
    cut differently (another vocabulary or --max_seq_length), nll where it is of other tokens, and scores whose side of
    the references was labelled or counted in another way. InputError where the runs are not about the same test
    reports, or not equally many.
    """
    names = _comparable([*first, *second])
    if len(first) != len(second):
        raise InputError(f"{len(first)} runs cannot be compared with {len(second)}: equally many seeds are needed")
    units = _units([*first, *second])
    sides = [_Sums(runs, names, units) for runs in (first, second)]
    count = sides[0].units
    by_seed = [side.scores(np.ones((1, count))) for side in sides]  # (S, 1)
    observed = _subtract(*map(_mean, by_seed))
    untested = (None, None, None, None, None, np.nan)
    if count < 2:
        return {name: Difference(float(value), *untested) for name, [value] in observed.items()}
    bootstrap = _Resampled(resamples, level, {name: float(value) for name, [value] in observed.items()})
    for counts in _resamples(count, resamples, seed):
        bootstrap.add(_subtract(*(_mean(side.scores(counts)) for side in sides)))
    # Exchanging reports that are alike changes the order of summation and with it the last digit.
    beyond = dict.fromkeys(observed, 0)
    for swapped in _coin_flips(count, resamples, seed):
        for name, values in _subtract(*_exchange(sides, swapped)).items():
            beyond[name] += int((~(np.abs(values) < abs(observed[name][0]) - 1e-12)).sum())  # with those not defined
    left_out = first[0].without_interval()
    found = {}
    for name, [difference] in observed.items():
        if not bootstrap.defined(name):
            found[name] = Difference(float(difference), *untested)
            continue
        limits = (None, None) if name in left_out else bootstrap.interval(name)
        by_system = [scores[name][:, 0] for scores in by_seed]
        found[name] = Difference(
            float(difference),
            *limits,
            bootstrap.two_sided(name),
            _share(beyond[name], resamples),
            *_with_seeds(difference, bootstrap.variance(name), by_system),
        )
    return found


def holm(p_values: Mapping[Any, float | None]) -> dict[Any, float | None]:
    """Holm's (1979) correction: adjusted p values of tests that are made together, by the same names; None stays."""
    made = {name: p for name, p in p_values.items() if p is not None}
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(made, key=made.__getitem__)):
        largest = max(largest, min(1.0, (len(made) - rank) * made[name]))
        adjusted[name] = largest
    return {name: adjusted.get(name) for name in p_values}


def p_text(p: float | None) -> str:
    """A p value as tables show it."""
    return "–" if p is None else f"{p:.4f}"


def over_seeds(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    """Mean and standard deviation over runs that differ in their seed, of every score that all of them have."""
    names = [name for name in runs[0] if all(run.get(name) is not None for run in runs)]
    values = {name: np.array([run[name] for run in runs], dtype=float) for name in names}
    return {
        name: Spread(float(found.mean()), float(found.std(ddof=1)) if len(runs) > 1 else None, len(runs))
        for name, found in values.items()
    }


class _Sums:
    """The columns of a system's runs, summed over the reports of each unit, so that one product sums all of them."""

    def __init__(self, runs: Sequence[ReportStatistics], names: Sequence[str], unit: np.ndarray):
        columns = [run.columns() for run in runs]
        self.names, self.tag = list(names), runs[0].tag
        self.ends = np.cumsum([columns[0][name].shape[1] for name in names])[:-1]
        self.units = int(unit.max()) + 1
        self.reports = np.bincount(unit).astype(np.float64)  # (U,) reports of each unit
        self.matrices = []
        for table in columns:
            together = np.concatenate([table[name] for name in names], axis=1)  # (N, K)
            summed = np.zeros((self.units, together.shape[1]))
            np.add.at(summed, unit, together)
            self.matrices.append(summed)  # (U, K)

    def scores(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (S, R) of resamples that hold unit u ``counts[r, u]`` times."""
        return self.scores_of([counts @ matrix for matrix in self.matrices], counts @ self.reports)

    def scores_of(self, sums: Sequence[np.ndarray], reports: np.ndarray) -> dict[str, np.ndarray]:
        """Scores (S, R) of each run's sums (R, K) over ``reports`` (R,) reports."""
        runs = [
            scores_of_sums(dict(zip(self.names, np.split(total, self.ends, axis=1), strict=True)), reports)
            for total in sums
        ]
        return {tagged(name, self.tag): np.stack([run[name] for run in runs]) for name in runs[0]}


def _with_seeds(
    difference: float, over_units: float, by_seed: Sequence[np.ndarray]
) -> tuple[float | None, float, float]:
    """Two-sided p, standard error and degrees of freedom of a difference, from its variance over units and each
    system's scores (S,); p is None for one seed.
    """
    from scipy.special import stdtr

    runs = len(by_seed[0])
    if runs == 1:
        return None, float(np.sqrt(over_units)), np.inf
    seeds = [scores.var(ddof=1) / runs for scores in by_seed]
    total = over_units + sum(seeds)
    if total == 0:
        return (1.0 if difference == 0 else 0.0), 0.0, np.inf
    square = sum(variance**2 for variance in seeds) / (runs - 1)
    freedom = total**2 / square if square else np.inf
    return float(2 * stdtr(freedom, -abs(difference) / np.sqrt(total))), float(np.sqrt(total)), float(freedom)


def _exchange(sides: Sequence[_Sums], swapped: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Mean scores (R,) of both systems after they exchanged the units with ``swapped[r, u]`` = 1, in all runs alike."""
    first, second = sides
    moved = [swapped @ (theirs - own) for own, theirs in zip(first.matrices, second.matrices, strict=True)]
    reports = np.full(len(swapped), first.reports.sum())
    return [
        _mean(
            side.scores_of(
                [own.sum(axis=0) + sign * change for own, change in zip(side.matrices, moved, strict=True)], reports
            )
        )
        for side, sign in ((first, 1), (second, -1))
    ]


def _comparable(runs: Sequence[ReportStatistics]) -> list[str]:
    """Columns that all runs have and that mean the same in all of them."""
    if len({run.full_references for run in runs}) > 1:
        raise InputError("the runs were not tested on the same reports, in the same order: they cannot be compared")
    if len(tags := sorted({run.tag for run in runs})) > 1:
        raise InputError(f"runs whose scores have {' or '.join(map(repr, tags))} in their names cannot be compared")
    if len(counts := sorted({len(run) for run in runs})) > 1:
        raise InputError(f"the runs have {' and '.join(map(str, counts))} reports each: they cannot be compared")
    cut_alike = len({run.references for run in runs}) == 1
    columns = [run.columns() for run in runs]
    names = [name for name in columns[0] if all(name in own for own in columns)]
    names = [name for name in names if len({own[name].shape for own in columns}) == 1 and _same_side(name, runs)]
    if not _same_targets(runs):
        names = [name for name in names if name != "nll"]
    names = [name for name in names if cut_alike or name.endswith(FULL) or name == "diversity"]
    if not names:
        raise InputError("the runs have no score in common that can be compared")
    return names


def _same_side(name: str, runs: Sequence[ReportStatistics]) -> bool:
    """Whether the references' side of the table ``name`` is the same in all runs: another version of a labeler gives
    the same references other labels, and other rules count other reports.
    """
    sides = [run.reference_side(name) for run in runs]
    return all(np.array_equal(sides[0], side) for side in sides)


def _same_targets(runs: Sequence[ReportStatistics]) -> bool:
    """Whether ``nll`` is of the same tokens in all runs, as far as is known: older files have their numbers alone.

    Captions are scored whole, so that their references are the same whatever a model's vocabulary cuts and replaces.
    """
    counts = [run.tables["nll"][:, 1] for run in runs if "nll" in run.tables]
    alike = all(np.array_equal(counts[0], own) for own in counts)
    return alike and len({run.targets for run in runs} - {""}) <= 1


def _units(runs: Sequence[ReportStatistics]) -> np.ndarray:
    """(N,) the unit of each report, from the run that knows the highest level; others may be older files."""
    for level in ("patients", "studies"):
        for run in runs:
            if (numbers := getattr(run, level)) is not None:
                return np.unique(numbers, return_inverse=True)[1].reshape(-1)
    return np.arange(len(runs[0]))


def _resamples(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (<= _BLOCK, U) of how often each unit was drawn when ``count`` are drawn with replacement."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _coin_flips(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        yield rng.integers(2, size=(min(_BLOCK, resamples - start), count)).astype(np.float64)


def _mean(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(R,) over the runs of scores (S, R)."""
    return {name: values.mean(axis=0) for name, values in scores.items()}


def _subtract(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: first[name] - second[name] for name in first}


class _Resampled:
    """What is kept of a score's values in R resamples: their tails, where the limits lie, and their signs and moments.

    All R values of all scores would grow with R to more than everything else. ``centres`` are the observed values,
    around which the variance is summed up.
    """

    def __init__(self, resamples: int, level: float, centres: Mapping[str, float] | None = None):
        self._resamples, self._share = resamples, (1 - level) / 2
        self._kept = min(resamples, int((resamples - 1) * self._share) + 2)
        self._centres = centres or {}
        self._tails: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._sums: dict[str, np.ndarray] = {}  # values of at most 0, of at least 0, sum, sum of squares

    @property
    def names(self) -> list[str]:
        """The scores that were added."""
        return list(self._tails)

    def add(self, scores: Mapping[str, np.ndarray]) -> None:
        """Take a block of values (B,) of each score."""
        for name, values in scores.items():
            low, high = self._tails.get(name, (values[:0], values[:0]))
            low, high = (np.sort(np.concatenate([tail, values])) for tail in (low, high))
            self._tails[name] = (low[: self._kept].copy(), high[-self._kept :].copy())
            apart = values - self._centres.get(name, 0.0)
            new = np.array([(values <= 0).sum(), (values >= 0).sum(), apart.sum(), (apart**2).sum()])
            self._sums[name] = self._sums.get(name, 0.0) + new

    def defined(self, name: str) -> bool:
        """Whether every resample has the score; without a report that it counts it is NaN."""
        return not np.isnan(self._sums[name]).any()

    def interval(self, name: str) -> tuple[float, float]:
        """The percentiles that numpy would find among all values."""
        low, high = self._tails[name]
        place = (self._resamples - 1) * self._share
        below, rest = int(place), place - int(place)
        lower = np.quantile(low[below : below + 2], rest)
        place = (self._resamples - 1) * (1 - self._share)
        below, rest = int(place), place - int(place)
        first = len(high) - self._resamples + below
        return float(lower), float(np.quantile(high[first : first + 2], rest))

    def two_sided(self, name: str) -> float:
        """Twice the smaller share of values on either side of 0."""
        return min(1.0, 2 * min(_share(int(hits), self._resamples) for hits in self._sums[name][:2]))

    def variance(self, name: str) -> float:
        """The variance of the values, with R in the denominator."""
        mean, squares = self._sums[name][2:] / self._resamples
        return max(float(squares - mean**2), 0.0)


def _share(hits: int, of: int) -> float:
    return (hits + 1) / (of + 1)
