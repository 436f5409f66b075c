"""The tiled search against a full sort of the whole similarity matrix."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from modules.mining import cosine_search
from modules.mining.cosine_search import top_k_cosine


def full_sort(vectors: np.ndarray, k: int, exclusions: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    similarity = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    for ids in exclusions:
        similarity[ids[:, None] == ids] = -np.inf
    similarity = np.pad(similarity, ((0, 0), (0, k)), constant_values=-np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(similarity, order, axis=1)
    return np.where(values > -np.inf, order, -1), values


def unit_rows(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(cosine_search, "LARGEST_TILE", 64)


@pytest.mark.parametrize("count", [1, 2, 31, 64, 65, 300])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_equals_a_full_sort(small_tiles, count, k):
    rng = np.random.default_rng(count)
    vectors = unit_rows(rng, count, 12)
    exclusions = [np.arange(count), rng.integers(0, count, count)]
    index, similarity = top_k_cosine(vectors, k, exclusions)
    expected, values = full_sort(vectors, k, exclusions)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(similarity, values, atol=1e-6)


@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_equal_similarities_go_to_the_smaller_index(small_tiles, seed, as_sparse):
    # Small integers: every product is exact, and nearly every similarity occurs many times, zero with both signs.
    rng = np.random.default_rng(seed)
    count, k = int(rng.integers(100, 250)), int(rng.integers(1, 30))
    vectors = rng.integers(-1, 2, (count, 3)).astype(np.float32)
    exclusions = [rng.integers(0, 40, count)]
    index, _ = top_k_cosine(sparse.csr_matrix(vectors) if as_sparse else vectors, k, exclusions)
    np.testing.assert_array_equal(index, full_sort(vectors, k, exclusions)[0])


def test_a_group_larger_than_a_tile_is_excluded_in_full(small_tiles):
    rng = np.random.default_rng(0)
    vectors = unit_rows(rng, 200, 8)
    vectors[:150] = vectors[0]
    group = np.where(np.arange(200) < 150, 0, np.arange(200))
    index, _ = top_k_cosine(vectors, 3, [group])
    assert (index[:150] >= 150).all()
    everything, similarity = top_k_cosine(vectors, 3, [np.zeros(200, dtype=np.int64)])
    assert (everything == -1).all() and (similarity == -np.inf).all()


def test_the_memory_bound_changes_nothing_but_the_tiles():
    vectors = unit_rows(np.random.default_rng(3), 700, 16)
    ample, tight = (top_k_cosine(vectors, 4, [np.arange(700)], memory_mb=memory) for memory in (256, 1))
    np.testing.assert_array_equal(ample[0], tight[0])
    assert cosine_search._tile_shape(1, 4, 16)[0] < 700 < cosine_search._tile_shape(256, 4, 16)[0]


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_no_tensor_is_larger_than_the_budget():
    # The whole similarity matrix would be 9 MiB; the embeddings themselves are 0.1 MiB.
    vectors = unit_rows(np.random.default_rng(4), 1500, 16)
    with LargestTensor() as largest:
        top_k_cosine(vectors, 5, [np.arange(1500)], memory_mb=1)
    assert largest.bytes <= 2**20


def test_only_half_of_the_products_are_computed(small_tiles):
    count, width, side = 640, 16, 64
    vectors = unit_rows(np.random.default_rng(5), count, width)
    with FlopCounterMode(display=False) as counter:
        top_k_cosine(vectors, 2, [np.arange(count)])
    assert counter.get_total_flops() == count * (count + side) * width  # of 2 * count * count * width
