"""Variety of generated reports, within each and between them: has the model collapsed?"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from modules.data.tokenizers import UNKNOWN

# Above this share of a single report, scores say little about the images.
COLLAPSE_SHARE = 0.5
# From this share of <unk> on, scores against references with <unk> say little about the words.
UNK_SHARE = 0.05


def ngram_counts(reports: Sequence[str], sizes: Sequence[int] = (2, 3, 4)) -> np.ndarray:
    """(N, 2 * len(sizes)) int32: the number of different n-grams of each report for every n, then of all n-grams."""
    rows = []
    for report in reports:
        words = report.split()
        ngrams = [_ngrams(words, n) for n in sizes]
        rows.append([len(set(found)) for found in ngrams] + [len(found) for found in ngrams])
    return np.array(rows, dtype=np.int32)


def repetition(reports: Sequence[str], n: int) -> float | None:
    """rep-n of SimCTG (Su et al., 2022), in percent: 100 (1 - unique n-grams / n-grams).

    n-grams are unique within their report; both counts are summed over the reports. None where no report has n words.
    """
    unique, total = ngram_counts(reports, [n]).sum(axis=0).tolist()
    return 100 * (1 - unique / total) if total else None


def diversity(reports: Sequence[str]) -> float | None:
    """Diversity of SimCTG in [0, 1]: the product of 1 - rep-n / 100 for n = 2, 3, 4; None where rep-4 is undefined."""
    product = 1.0
    for n in (2, 3, 4):
        repeated = repetition(reports, n)
        if repeated is None:
            return None
        product *= 1 - repeated / 100
    return product


def distinct(reports: Sequence[str], n: int) -> float | None:
    """distinct-n (Li et al., 2016) in [0, 1]: different n-grams of all reports together, over all n-grams.

    It falls as reports become more, so compare it between equally many. None where no report has n words.
    """
    ngrams = [ngram for report in reports for ngram in _ngrams(report.split(), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


def collapse_statistics(reports: Sequence[str]) -> dict[str, float | int | None]:
    """Describe N >= 1 reports: number of different ones, share of the commonest, mean length, and n-gram variety.

    Texts are compared with normalised white space; shares are fractions of N; repetition_n is in percent, within
    reports; unk_share is the fraction of words that are ``<unk>``.
    """
    counts = Counter(" ".join(report.split()) for report in reports)
    return {
        "num_reports": len(reports),
        "unique_reports": len(counts),
        "unique_share": len(counts) / len(reports),
        "commonest_share": max(counts.values()) / len(reports),
        "mean_length": sum(len(report.split()) for report in reports) / len(reports),
        "unk_share": unk_share(reports),
        "diversity": diversity(reports),
        **{f"repetition_{n}": repetition(reports, n) for n in (2, 3, 4)},
        **{f"distinct_{n}": distinct(reports, n) for n in (1, 2, 3)},
    }


def unk_share(reports: Sequence[str]) -> float:
    """The fraction of all words that are ``<unk>``, in [0, 1]; 0 where there are no words."""
    words = [word for report in reports for word in report.split()]
    return words.count(UNKNOWN) / len(words) if words else 0.0


def unk_warning(generated: float, references: float) -> str | None:
    """One line where either share of ``<unk>``, in generated texts or in their references, is UNK_SHARE or more."""
    if max(generated, references) < UNK_SHARE:
        return None
    remedies = [] if generated < UNK_SHARE else ["--suppress_unk true keeps it from being written"]
    remedies += [] if references < UNK_SHARE else ["a lower --threshold keeps more words"]
    return (
        f"{generated:.1%} of the generated words and {references:.1%} of the references' words are {UNKNOWN}, which "
        f"counts as a hit in scores against cut references: read those against whole ones; {'; '.join(remedies)}"
    )


def collapse_warning(statistics: dict[str, float | int | None]) -> str | None:
    """One line where at least half of two or more reports are the same text, else None."""
    if statistics["num_reports"] < 2 or statistics["commonest_share"] < COLLAPSE_SHARE:
        return None
    return (
        f"collapse: one and the same report was generated for {statistics['commonest_share']:.0%} of "
        f"{statistics['num_reports']} samples ({statistics['unique_reports']} different reports in all)"
    )


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
