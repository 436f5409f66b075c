"""Encoders for comparison with what a text encoder finds: reports by their labels alone, and by nothing at all."""

from collections.abc import Sequence

import numpy as np

from modules.labels.study_labels import labels_by_rules

# Cosines of label sets come in steps of 7e-4 or more; among equal ones the choice is random, by less than that.
TIE_WIDTH, TIE_WEIGHT = 8, 0.01
RANDOM_WIDTH = 64


class LabelEncoder:
    """The 14 labels by rules, positive or uncertain, divided by their norm: the cosine is the overlap of two sets.

    None of the 14 (a finding that has no class) is a label too, so that such reports are alike.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""
        return {"features": "14 labels by rules, ties at random", "seed": self.seed}

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """(N, 23) float32 rows of norm 1."""
        labels = labels_by_rules(texts, progress)
        labels = np.hstack([labels, ~labels.any(axis=1, keepdims=True)])
        labels /= np.linalg.norm(labels, axis=1, keepdims=True)
        vectors = np.hstack([labels, TIE_WEIGHT * _directions(len(texts), TIE_WIDTH, self.seed)])
        return (vectors / np.sqrt(1 + TIE_WEIGHT**2)).astype(np.float32)


class RandomEncoder:
    """A direction drawn at random for each text: its neighbours are random texts."""

    def __init__(self, seed: int):
        self.seed = seed

    def describe(self) -> dict:
        """Settings, for the metadata of the index."""
        return {"features": "random directions", "seed": self.seed}

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """(N, 64) float32 rows of norm 1."""
        return _directions(len(texts), RANDOM_WIDTH, self.seed).astype(np.float32)


ENCODERS = {"labels": LabelEncoder, "random": RandomEncoder}


def _directions(count: int, width: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, width))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
