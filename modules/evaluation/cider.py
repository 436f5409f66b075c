"""CIDEr-D (Vedantam et al., 2015), equal to pycocoevalcap's, with document frequencies of any corpus.

pycocoevalcap compares n-grams one by one in Python; here those of all texts are numbered and counted together.
Document frequencies of a resample stay those of all references, so that an interval is about the reports.

Shapes: N reports, T texts (the N hypotheses, then all references), P distinct n-grams of each text, one after another.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pycocoevalcap.cider.cider_scorer import precook

_ORDERS, _SIGMA = 4, 6.0  # n-grams of 1 to 4 words; the width of the penalty for another length


def per_report(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """(N, 1) CIDEr-D in [0, 10] of each report, with the document frequencies of ``references`` themselves."""
    return _scores(references, hypotheses, None, len(references))[:, None]


def document_frequencies(references: Sequence[Sequence[str]]) -> Counter:
    """In how many images' references each n-gram (n = 1..4) occurs."""
    frequencies: Counter = Counter()
    for texts in references:
        frequencies.update({ngram for text in texts for ngram in precook(text)})
    return frequencies


def cider_scores(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    frequencies: Mapping[tuple[str, ...], int],
    corpus_size: int,
) -> np.ndarray:
    """(N,) CIDEr-D of each hypothesis, with n-grams weighted by how many of ``corpus_size`` images have them."""
    return _scores(references, hypotheses, frequencies, corpus_size)


@dataclass(frozen=True)
class _Ngrams:
    """The n-grams of one n: each text's distinct ones, sorted by text and number."""

    text: np.ndarray  # (P,) which text
    number: np.ndarray  # (P,) which n-gram
    times: np.ndarray  # (P,) how often the text has it
    kinds: int  # how many different n-grams there are
    words: Sequence[tuple[str, ...]]  # of each n-gram; empty unless asked for


def _scores(
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    frequencies: Mapping[tuple[str, ...], int] | None,
    corpus_size: int,
) -> np.ndarray:
    count, per_image = len(hypotheses), np.array([len(texts) for texts in references])
    image = np.concatenate([np.arange(count), np.repeat(np.arange(count), per_image)])  # (T,)
    texts = [*hypotheses, *(text for own in references for text in own)]
    total = np.zeros(len(texts) - count)
    bigrams = np.zeros(len(texts))
    for order, ngrams in enumerate(_ngrams(texts, with_words=frequencies is not None), start=1):
        if order == 2:  # what pycocoevalcap takes for a text's length
            bigrams = np.bincount(ngrams.text, ngrams.times, minlength=len(texts))
        if frequencies is None:
            documents = _documents(ngrams, image, count)
        else:
            documents = np.array([frequencies.get(words, 0) for words in ngrams.words])
        weight = ngrams.times * (math.log(corpus_size) - np.log(np.maximum(documents, 1)))[ngrams.number]
        total += _similarities(ngrams, weight, image, count)
    longer = bigrams[image[count:]] - bigrams[count:]
    total *= np.exp(-(longer**2) / (2 * _SIGMA**2)) / _ORDERS
    return 10 * np.bincount(image[count:], total, minlength=count) / per_image


def _documents(ngrams: _Ngrams, image: np.ndarray, count: int) -> np.ndarray:
    """In how many images' references each n-gram occurs."""
    of_references = ngrams.text >= count
    pairs = image[ngrams.text[of_references]] * ngrams.kinds + ngrams.number[of_references]
    return np.bincount(np.unique(pairs) % max(ngrams.kinds, 1), minlength=ngrams.kinds)


def _similarities(ngrams: _Ngrams, weight: np.ndarray, image: np.ndarray, count: int) -> np.ndarray:
    """(T - N,) cosine of each reference's weights (P,) with its hypothesis's, which count at most as its own."""
    texts = len(image)
    norm = np.sqrt(np.bincount(ngrams.text, weight**2, minlength=texts))
    start = np.searchsorted(ngrams.text, count)  # the first n-gram of a reference
    own, wanted = (image[ngrams.text] * ngrams.kinds + ngrams.number)[:start], image[ngrams.text[start:]]
    wanted = wanted * ngrams.kinds + ngrams.number[start:]
    place = np.minimum(np.searchsorted(own, wanted), max(len(own) - 1, 0))
    shared = own[place] == wanted if len(own) else np.zeros(len(wanted), dtype=bool)
    both = np.minimum(weight[:start][place[shared]], weight[start:][shared]) * weight[start:][shared]
    found = np.bincount(ngrams.text[start:][shared] - count, both, minlength=texts - count)
    product = norm[image[count:]] * norm[count:]
    return np.divide(found, product, out=np.zeros(len(found)), where=product > 0)


def _ngrams(texts: Sequence[str], *, with_words: bool) -> Iterator[_Ngrams]:
    """The n-grams of all texts, for n = 1 to 4."""
    numbers: dict[str, int] = {}
    split = [text.split() for text in texts]
    words = np.array([numbers.setdefault(word, len(numbers)) for own in split for word in own], dtype=np.int64)
    lengths = np.array([len(own) for own in split])
    text = np.repeat(np.arange(len(texts)), lengths)
    end = np.repeat(np.cumsum(lengths), lengths)
    names, place, gram = list(numbers), np.arange(len(words)), words
    for order in range(1, _ORDERS + 1):
        if order > 1:
            inside = place + order <= end[place]
            place, gram = place[inside], gram[inside] * len(names) + words[place[inside] + order - 1]
        kinds, first, gram = np.unique(gram, return_index=True, return_inverse=True)
        pairs, times = np.unique(text[place] * max(len(kinds), 1) + gram, return_counts=True)
        own_words = [tuple(names[words[place[at] + n]] for n in range(order)) for at in first] if with_words else ()
        yield _Ngrams(pairs // max(len(kinds), 1), pairs % max(len(kinds), 1), times, len(kinds), own_words)
