"""What each report contributes to a run's scores: sums over reports give every score, of the split or a resample.

A table has one row per report. Its name is that of a sentence metric (modules.evaluation.metric_table), ``diversity``,
``nll``, a labeler's outcomes such as ``ce_rule_uncertain_negative``, or the one score that is the mean of its column:
over the reports that a second column counts, where it has one. A name that ends in ``_full`` is about whole references.
The numbers hold no text.

Shapes: N reports, R resamples, k columns of a table.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modules.evaluation.clinical_scores import (
    CLASS_SETS,
    FREQUENT,
    RATIOS,
    UNCERTAIN_POLICIES,
    averages,
    counted_as,
    frequent_classes,
    outcomes,
    ratios,
)
from modules.evaluation.metric_table import FULL, SENTENCE_METRICS, SentenceMetric, tagged
from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError
from modules.runtime.input_files import open_regular
from modules.runtime.records import write_private

_TAG, _UNITS = "tag", ("studies", "patients")
_DIGESTS, _TARGETS = ("references", "full_references"), "targets"
MAX_STATISTICS = 2**30  # bytes, unpacked; those of MIMIC-CXR's test split take a thousandth
_SENTENCE_METRICS = {metric.name: metric for metric in SENTENCE_METRICS}


@dataclass(frozen=True)
class ReportStatistics:
    """The tables (N, k) of one run's reports, in the order of its split.

    ``references`` and ``full_references`` are digests of the ids and the references as they were scored: only runs
    for which they agree can be compared, on cut or on whole references. ``tag`` is part of all names of
    scores: see modules.evaluation.metric_table. ``studies`` and ``patients`` (N,) number the study and the patient of
    each report, None where they are not known. ``targets`` is the digest of the tokens whose likelihood ``nll`` is,
    "" in older files.
    """

    tables: Mapping[str, np.ndarray]
    references: str
    full_references: str
    tag: str = ""
    studies: np.ndarray | None = None
    patients: np.ndarray | None = None
    targets: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.tables.values())))

    @property
    def units(self) -> tuple[str, np.ndarray]:
        """What is resampled as a whole, and the number (N,) of each report's unit: the highest level that is known.

        Reports of one study, and studies of one patient, depend on each other.
        """
        for name, numbers in (("patients", self.patients), ("studies", self.studies)):
            if numbers is not None:
                return name, numbers
        return "reports", np.arange(len(self))

    def columns(self) -> dict[str, np.ndarray]:
        """The tables as (N, k) float64 whose sums over reports ``scores_of_sums`` takes.

        With the clinical outcomes come those of the classes with MIN_POSITIVES reference positives, under names that
        contain min5.
        """
        columns = {}
        for name, table in self.tables.items():
            if not _counted(name, table).sum(axis=0).all():
                continue  # no report has four words, or every study a prior
            if not _is_clinical(name):
                columns[name] = table.astype(np.float64)
                continue
            columns[name] = _with_example_ratios(table)
            counts = table.reshape(len(table), 3, len(CLASSES))
            if (frequent := self._frequent(name)).any():
                columns[name.replace("_uncertain_", f"_{FREQUENT}_uncertain_")] = (
                    counts[:, :, frequent].reshape(len(table), -1).astype(np.float64)
                )
        return columns

    def without_interval(self) -> frozenset[str]:
        """Scores with a macro average over a class with fewer than MIN_POSITIVES reference positives.

        The bootstrap interval of such a score covers the true value far too rarely: a rare class is often missing from
        a resample, where its F1 is then 0 (docs/EVALUATION.md has the simulation).
        """
        found = set()
        for name in self.tables:
            if not _is_clinical(name):
                continue
            frequent = self._frequent(name)
            base, suffix = (name.removesuffix(FULL), FULL) if name.endswith(FULL) else (name, "")
            start, _, policy = base.partition("_uncertain_")
            for class_set, names in CLASS_SETS.items():
                if not frequent[_columns(names)].all():
                    for ratio in RATIOS:
                        score = f"{start}_{ratio}_macro_{class_set}_uncertain_{policy}{suffix}"
                        found.add(tagged(score, self.tag))
        return frozenset(found)

    def reference_side(self, name: str) -> np.ndarray:
        """What the column table ``name`` says of the references alone, (N, k): the classes that they state, or which
        reports are counted; nothing, (N, 0), where it does not tell.
        """
        if _is_clinical(name):
            counts = self._as_counted(name.replace(f"_{FREQUENT}_", "_"))
            return (counts[:, 0] + counts[:, 2]) > 0
        table = self.tables[name]
        return table[:, :0] if name in ("nll", "diversity") else _counted(name, table)

    def _frequent(self, name: str) -> np.ndarray:
        """(C,) bool: the classes with MIN_POSITIVES reference positives for the clinical table ``name``."""
        return frequent_classes(self._as_counted(name))

    def _as_counted(self, name: str) -> np.ndarray:
        """Outcomes (N, 3, C) of the policy that tells the reference positives of the clinical table ``name``."""
        start, mark, rest = name.partition("_uncertain_")
        policy = rest.removesuffix(FULL)
        counted = self.tables.get(f"{start}{mark}{counted_as(policy)}{rest.removeprefix(policy)}", self.tables[name])
        return counted.reshape(len(counted), 3, len(CLASSES))

    def scores(self, rows: np.ndarray | None = None) -> dict[str, float | None]:
        """The scores of the split, or of those reports that ``rows``, (N,) bool or (n,) indices, selects.

        CIDEr's document frequencies stay those of the whole split. A score that none of ``rows`` counts for is None.
        """
        chosen = self.columns() if rows is None else {name: table[rows] for name, table in self.columns().items()}
        count = len(next(iter(chosen.values())))
        sums = {name: table.sum(axis=0, keepdims=True) for name, table in chosen.items()}
        found = {tagged(name, self.tag): float(values[0]) for name, values in scores_of_sums(sums, count).items()}
        return {name: None if np.isnan(value) else value for name, value in found.items()}


def scores_of_sums(sums: Mapping[str, np.ndarray], count: int | np.ndarray) -> dict[str, np.ndarray]:
    """Scores by name, (R,) each, from the sums (R, k) of every table's columns over ``count`` (R,) reports.

    NaN where a score is the mean of what is counted, and nothing is.
    """
    scores: dict[str, np.ndarray] = {}
    for name, total in sums.items():
        base, suffix = (name.removesuffix(FULL), FULL) if name.endswith(FULL) else (name, "")
        if base in _SENTENCE_METRICS:
            found = _sentence_scores(_SENTENCE_METRICS[base], total, count)
        elif base == "diversity":
            found = {base: _ratio(total[:, :3], _counted(base, total)).prod(axis=1)}
        elif _is_clinical(name):
            found = _frequent_macro(base, total) if f"_{FREQUENT}_" in name else _clinical(base, total, count)
        else:
            found = {base: total[:, 0] / count if total.shape[1] == 1 else _ratio(total[:, 0], total[:, 1])}
        scores |= {f"{score}{suffix}": values for score, values in found.items()}
    return scores


def _counted(name: str, table: np.ndarray) -> np.ndarray:
    """The columns of a table that say what its score is a mean of; none where that is all reports."""
    if _is_clinical(name) or name.removesuffix(FULL) in _SENTENCE_METRICS:
        return table[:, :0]
    return table[:, 3:] if name == "diversity" else table[:, 1:]


def _ratio(total: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return np.divide(total, counted, out=np.full(total.shape, np.nan), where=counted != 0)


def _sentence_scores(metric: SentenceMetric, total: np.ndarray, count: int | np.ndarray) -> dict[str, np.ndarray]:
    from_sums = getattr(metric.load(), "from_sums", None)
    counts = np.broadcast_to(np.asarray(count, dtype=np.float64), len(total))
    values = total / counts[:, None] if from_sums is None else from_sums(total, counts)  # (R, scores)
    return {score.name: values[:, column] for column, score in enumerate(metric.scores)}


def join(parts: Sequence[ReportStatistics]) -> ReportStatistics:
    """Several test sets, such as the folds of a cross-validation, as one; only tables that all parts have.

    CIDEr's document frequencies stay those of each part. InputError where the names of scores differ.
    """
    if len(tags := sorted({part.tag for part in parts})) > 1:
        raise InputError(f"runs whose scores have {' or '.join(map(repr, tags))} in their names cannot be joined")
    tables = {
        name: np.concatenate([part.tables[name] for part in parts])
        for name in parts[0].tables
        if all(name in part.tables for part in parts)
    }
    return ReportStatistics(
        tables,
        digest([], [part.references for part in parts]),
        digest([], [part.full_references for part in parts]),
        parts[0].tag,
        _joined_numbers(parts, "studies"),
        _joined_numbers(parts, "patients"),
        digest([], targets) if all(targets := [part.targets for part in parts]) else "",
    )


def _joined_numbers(parts: Sequence[ReportStatistics], level: str) -> np.ndarray | None:
    """The numbers of all parts, none of which shares a study or patient with another; None where no part knows them.

    In a part that does not know the level its studies, else its reports, are units of their own.
    """
    if all(getattr(part, level) is None for part in parts):
        return None
    known = [part.units[1] if getattr(part, level) is None else getattr(part, level) for part in parts]
    starts = np.cumsum([0, *(numbers.max(initial=-1) + 1 for numbers in known[:-1])])
    return np.concatenate([numbers + start for numbers, start in zip(known, starts, strict=True)])


def numbered(names: Sequence[str]) -> np.ndarray:
    """(N,) int32: equal names have equal numbers, from 0 in the order of first appearance.

    The numbers say nothing else of the names, and resamples do not depend on how studies are called.
    """
    first: dict[str, int] = {}
    return np.array([first.setdefault(name, len(first)) for name in names], dtype=np.int32)


def digest(ids: Sequence[str], references: Sequence[str]) -> str:
    """SHA-256 of the references with their ids, in order."""
    return hashlib.sha256(json.dumps([list(ids), list(references)]).encode()).hexdigest()


def save_statistics(path: str | Path, systems: Mapping[str, ReportStatistics]) -> None:
    """Write the statistics of several systems (the model, the baselines) on one split as .npz, mode 0600."""
    first = next(iter(systems.values()))
    arrays = {
        f"{system}/{name}": table for system, statistics in systems.items() for name, table in statistics.tables.items()
    }
    arrays |= {f"{system}/{_TAG}": np.array(statistics.tag) for system, statistics in systems.items()}
    content = io.BytesIO()
    units = {name: numbers for name in _UNITS if (numbers := getattr(first, name)) is not None}
    digests = {name: getattr(first, name) for name in (*_DIGESTS, _TARGETS)}
    np.savez_compressed(content, **arrays, **units, **digests)
    write_private(path, content.getvalue())


def load_statistics(path: str | Path) -> dict[str, ReportStatistics]:
    """What ``save_statistics`` wrote, by system; InputError for a file that is missing, damaged or of another kind."""
    try:
        with open_regular(path) as file:
            stored = np.load(file, allow_pickle=False)
            if sum(member.file_size for member in stored.zip.infolist()) > MAX_STATISTICS:
                raise ValueError("too large")
            arrays = dict(stored)
        digests = [str(arrays.pop(key)) for key in _DIGESTS]
        # Older files have none of these.
        units, targets = {name: arrays.pop(name, None) for name in _UNITS}, str(arrays.pop(_TARGETS, ""))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; main_train.py and main_test.py write it with results.json") from None
    except Exception as error:  # damaged bytes lead the reader to all kinds of exceptions
        raise InputError(f"{path}: not the statistics of a run ({type(error).__name__})") from error
    systems: dict[str, dict[str, np.ndarray]] = {}
    for key, table in arrays.items():
        system, _, name = key.partition("/")
        systems.setdefault(system, {})[name] = table
    return {
        system: ReportStatistics(
            {name: table for name, table in tables.items() if name != _TAG},
            *digests,
            tag=str(tables[_TAG]),
            **units,
            targets=targets,
        )
        for system, tables in systems.items()
    }


def clinical_tables(references: np.ndarray, hypotheses: np.ndarray, labeler: str) -> dict[str, np.ndarray]:
    """(N, 42) of two (N, 14) label arrays, for each policy: true positives, false positives, false negatives."""
    tables = {}
    for policy in UNCERTAIN_POLICIES:
        found = outcomes(references, hypotheses, policy)
        counts = (found.true_positive, found.false_positive, found.false_negative)
        tables[f"ce_{labeler}_uncertain_{policy}"] = np.concatenate(counts, axis=1)
    return tables


def _is_clinical(name: str) -> bool:
    return name.startswith("ce_")


def _with_example_ratios(table: np.ndarray) -> np.ndarray:
    """(N, 42) outcomes, then each report's own precision, recall and F1 over each class set: example-based scores."""
    counts = table.reshape(-1, 3, len(CLASSES)).astype(np.float64)
    own = [
        values
        for names in CLASS_SETS.values()
        for values in ratios(*counts[:, :, _columns(names)].sum(axis=2).T).values()
    ]
    return np.column_stack([counts.reshape(len(counts), -1), *own])


def _clinical(name: str, total: np.ndarray, count: int | np.ndarray) -> dict[str, np.ndarray]:
    """Scores of sums (R, 42 + 6) under the keys of modules.evaluation.clinical_scores."""
    start, _, policy = name.partition("_uncertain_")
    counts, own = np.split(total, [3 * len(CLASSES)], axis=1)
    counts = counts.reshape(len(total), 3, -1).transpose(1, 0, 2)  # (3, R, 14)
    scores = {}
    for number, (class_set, names) in enumerate(CLASS_SETS.items()):
        found = averages(counts[:, :, _columns(names)])
        for column, ratio in enumerate(RATIOS):
            found[f"{ratio}_example"] = own[:, 3 * number + column] / count
        scores |= {f"{start}_{key}_{class_set}_uncertain_{policy}": values for key, values in found.items()}
    return scores


def _frequent_macro(name: str, total: np.ndarray) -> dict[str, np.ndarray]:
    """F1 macro of the sums (R, 3 * classes) of the frequent classes alone."""
    start, _, policy = name.partition(f"_{FREQUENT}_uncertain_")
    f1 = ratios(*total.reshape(len(total), 3, -1).transpose(1, 0, 2))["f1"]  # (R, classes)
    return {f"{start}_f1_macro_{FREQUENT}_uncertain_{policy}": f1.mean(axis=1)}


def _columns(names: Sequence[str]) -> list[int]:
    return [CLASSES.index(name) for name in names]
