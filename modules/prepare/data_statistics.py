"""Statistics of a data set: reports, words, views, and what several splits share."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from modules.data.annotations import SPLITS, Study
from modules.data.tokenizers import clean_report

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
Splits = Mapping[str, Sequence[Study]]


def quantiles(values: Sequence[float]) -> list[float]:
    """The QUANTILES of ``values``, each of which is one of them; [] for no values."""
    return np.quantile(values, QUANTILES, method="nearest").tolist() if len(values) else []


def cleaned_reports(splits: Splits, cleaner: str) -> dict[str, list[str]]:
    """The cleaned reports by split, in its order."""
    return {split: [clean_report(study.report, cleaner) for study in studies] for split, studies in splits.items()}


def view_statistics(studies: Sequence[Study], expected: int) -> dict[str, Any]:
    """How many images the studies have, and how many studies have fewer or more than the ``expected`` number."""
    counts = Counter(len(study.image_paths) for study in studies)
    return {
        "studies": len(studies),
        "images": sum(views * times for views, times in counts.items()),
        "images_per_study": {str(views): counts[views] for views in sorted(counts)},
        "studies_with_fewer_views": sum(times for views, times in counts.items() if views < expected),
        "studies_with_more_views": sum(times for views, times in counts.items() if views > expected),
        "distinct_study_ids": len({study.study_id for study in studies}),
        "with_negative": sum(study.negative_report is not None for study in studies),
    }


def report_statistics(
    reports: Sequence[str], cleaned: Sequence[str], tokenizer: Any, max_seq_length: int
) -> dict[str, Any]:
    """Lengths in tokens with begin and end, what --max_seq_length cuts, <unk>s, and reports of the same cleaned text.

    The quantiles of the lengths are those of QUANTILES.
    """
    lengths, unknown = [], 0
    for report in reports:
        ids = tokenizer.encode(report)
        lengths.append(len(ids))
        unknown += ids.count(tokenizer.unk_id)
    total = sum(lengths)
    same = Counter(cleaned)
    commonest = same.most_common(1)[0][1] if same else 0
    return {
        "tokens": total - 2 * len(lengths),
        "length_quantiles": quantiles(lengths),
        "longer_than_max_seq_length": sum(length > max_seq_length for length in lengths),
        "tokens_cut": sum(max(0, length - 1 - max_seq_length) for length in lengths),
        "tokens_unknown": unknown,
        "different_reports": len(same),
        "sharing_their_text": sum(times for times in same.values() if times > 1),
        "commonest_report": commonest,
    }


def vocabulary_statistics(cleaned_train: Iterable[str], tokenizer: Any, threshold: int) -> dict[str, int]:
    """How many words of the training reports the vocabulary keeps, and how many are too rare for ``threshold``."""
    counts = Counter(word for text in cleaned_train for word in text.split())
    return {
        "vocabulary": tokenizer.vocab_size,
        "different_words": len(counts),
        "rarer_than_threshold": sum(times < threshold for times in counts.values()),
    }


def in_several_splits(keys: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """Key -> the splits that have it, for every key that more than one has; ``keys`` by split."""
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        for key in dict.fromkeys(keys.get(split, ())):
            found.setdefault(key, []).append(split)
    return {key: tuple(splits) for key, splits in found.items() if len(splits) > 1}


def shared_text(cleaned: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How many reports of val and test are, word for word, a training report too."""
    train = set(cleaned.get("train", ()))
    return {split: sum(text in train for text in cleaned[split]) for split in ("val", "test") if split in cleaned}
