"""Exact nearest neighbours by cosine similarity, one square tile of the similarity matrix at a time.

Shape legend: N rows (reports), D features, k neighbours. A tile holds R rows by C columns; its columns form G groups
of ``group``; L rows of a tile are live, that is, may still find a better neighbour in it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from modules.runtime import distributed
from modules.runtime.run_log import Bar

LARGEST_TILE = 2048  # the matrix product is at its full rate there, and the tile still fits a processor's cache
LARGEST_GROUP = 32
_INDEX_BITS = 0x7FFFFFFF
_NOTHING = float("-inf")


def top_k_cosine(
    vectors: np.ndarray | sparse.csr_matrix,
    k: int,
    exclusions: Sequence[np.ndarray],
    *,
    device: str = "cpu",
    memory_mb: int = 256,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar other rows of each row: indices (N, k) int64 and cosines (N, k) float32, best first.

    vectors (N, D), dense float32 or scipy CSR, have rows of norm 1 (or 0). A pair (i, j) is left out where an array
    (N,) of ``exclusions`` has the same integer at i and j. Of equal similarities the smaller index comes first, as in a
    stable sort of the whole row; -1 with -inf fills rows with fewer than k admissible others. Only tiles on and above
    the diagonal are computed, each for its rows and its columns; ``memory_mb`` (MiB) bounds the memory of one. Sparse
    vectors are multiplied on the CPU whatever the device. Several processes divide the tiles among them; all return the
    whole result, the same as of one process.
    """
    count = vectors.shape[0]
    device = torch.device("cpu" if sparse.issparse(vectors) else device)
    multiply = _sparse_product(vectors) if sparse.issparse(vectors) else _dense_product(vectors, device)
    ids = [torch.as_tensor(array, device=device) for array in exclusions]
    side, group = _tile_shape(memory_mb, k, bytes_per_similarity=32 if sparse.issparse(vectors) else 16)
    nothing = _encode(torch.tensor(_NOTHING), torch.tensor(_INDEX_BITS))
    best = torch.full((count, k), nothing.item(), dtype=torch.int64, device=device)  # (N, k) keys, best first
    spans = [slice(start, min(start + side, count)) for start in range(0, count, side)]
    tiles = [(row, column) for i, row in enumerate(spans) for column in spans[i:]]
    tiles = tiles[distributed.rank() :: distributed.world_size()]
    for row, column in Bar(tiles, "search", shown=progress):
        tile = multiply(row, column)  # (R, C)
        for array in ids:
            _exclude(tile, array[row], array[column])
        if tile.shape[0] % group or tile.shape[1] % group:  # R and C become multiples of the group
            tile = F.pad(tile, (0, -tile.shape[1] % group, 0, -tile.shape[0] % group), value=_NOTHING)
        _merge(best[row], tile, tile.unflatten(1, (-1, group)).amax(2), column.start)
        if row != column:
            # The maxima are taken in the tile's own memory order: reducing its transpose is 30 times slower.
            _merge(best[column], tile.T, tile.unflatten(0, (-1, group)).amax(1).T, row.start)
    if distributed.is_distributed():  # the keys order all there is, so what merges the shares is exact
        best = distributed.gather(best.unsqueeze(0)).transpose(0, 1).flatten(1).topk(k, dim=1).values
    similarity, index = _decode(best)
    index = torch.where(similarity > _NOTHING, index, -1)
    return index.cpu().numpy(), similarity.cpu().numpy()


def _dense_product(vectors: np.ndarray, device: torch.device) -> Callable[[slice, slice], Tensor]:
    matrix = torch.from_numpy(vectors).to(device)
    return lambda row, column: matrix[row] @ matrix[column].T


def _sparse_product(vectors: sparse.csr_matrix) -> Callable[[slice, slice], Tensor]:
    return lambda row, column: torch.from_numpy((vectors[row] @ vectors[column].T).toarray())


def _tile_shape(memory_mb: int, k: int, bytes_per_similarity: int) -> tuple[int, int]:
    """(side, group): the largest side whose tile and candidates (44 bytes each) fit; few candidates for large k."""
    group = LARGEST_GROUP
    while group > 4 and group * k > 192:
        group //= 2
    for side in range(LARGEST_TILE, LARGEST_GROUP, -LARGEST_GROUP):
        if side * side * bytes_per_similarity + side * min(k * group, side) * 44 <= memory_mb * 2**20:
            break
    else:
        side = LARGEST_GROUP
    return side, group


def _exclude(tile: Tensor, row_ids: Tensor, column_ids: Tensor) -> None:
    """Set tile (R, C) to -inf where the ids agree; only rows whose id occurs among the columns are touched."""
    rows = torch.isin(row_ids, column_ids).nonzero().squeeze(1)
    tile[rows] = tile[rows].masked_fill_(row_ids[rows, None] == column_ids, _NOTHING)


def _merge(best: Tensor, tile: Tensor, group_maxima: Tensor, offset: int) -> None:
    """Update best (R, k), keys of the best so far, with a tile (>= R, C) whose first column is ``offset``.

    The k best of a row lie in the k groups with the largest maxima, ties to the earlier group: any other group has
    k better elements ahead of it. So G maxima and k groups of candidates are sorted, never C similarities.
    """
    group_maxima = group_maxima[: best.shape[0]]  # (R, G)
    k, groups, group = best.shape[1], group_maxima.shape[1], tile.shape[1] // group_maxima.shape[1]
    rows = (group_maxima.amax(1) >= _decode(best[:, -1])[0]).nonzero().squeeze(1)  # (L,)
    keys = _encode(group_maxima[rows], torch.arange(groups, device=tile.device))
    chosen = _decode(keys.topk(min(k, groups), dim=1).values)[1]  # (L, K)
    values = tile.unflatten(1, (groups, group))[rows[:, None], chosen]  # (L, K, group)
    columns = offset + chosen[:, :, None] * group + torch.arange(group, device=tile.device)
    candidates = torch.cat([best[rows], _encode(values, columns).flatten(1)], dim=1)
    best[rows] = candidates.topk(k, dim=1).values


def _encode(similarity: Tensor, index: Tensor) -> Tensor:
    """int64 keys that order like (similarity, -index): the float's bits made monotone above, the index below."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they tie
    ordered = bits ^ ((bits >> 31) & _INDEX_BITS)
    return (ordered.long() << 32) | (_INDEX_BITS - index)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(similarity float32, index int64) of keys made by ``_encode``."""
    ordered = (keys >> 32).int()
    similarity = (ordered ^ ((ordered >> 31) & _INDEX_BITS)).view(torch.float32)
    return similarity, _INDEX_BITS - (keys & 0xFFFFFFFF)
