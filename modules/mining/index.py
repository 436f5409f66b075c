"""Prior hard negatives (ITHN, Sec. 3.2): the nearest other training reports of each training report, kept in a file."""

import hashlib
import json
import shlex
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modules.data.annotations import Annotation
from modules.runtime.errors import InputError
from modules.runtime.input_files import open_safetensors
from modules.runtime.records import write_private

if TYPE_CHECKING:
    from scipy import sparse

FORMAT = "ithn-hard-negatives-1"


@dataclass(frozen=True)
class HardNegativeIndex:
    """Hard negatives of the N training records of an annotation, by row in its train split."""

    neighbours: np.ndarray  # (N, k) int32, -1 = none
    similarity: np.ndarray  # (N, k) float32 cosine, best first, -inf where there is no neighbour
    metadata: dict  # ann_path, train_sha256, flags (of the mining script), encoder, provenance
    path: str = "hard-negative index"

    def save(self, path: str | Path) -> None:
        """Write one safetensors file of mode 0600, whole or not at all; InputError where that fails."""
        from safetensors.numpy import save

        metadata = json.dumps(self.metadata)
        content = save(
            {"neighbours": self.neighbours, "similarity": self.similarity},
            {"format": FORMAT, "metadata": metadata, "sha256": self._checksum(metadata)},
        )
        write_private(path, content)

    @classmethod
    def load(cls, path: str | Path) -> "HardNegativeIndex":
        """Read what ``save`` wrote; InputError for a missing, truncated, altered or other file."""
        from safetensors import SafetensorError

        if not Path(path).is_file():
            raise InputError(f"{path}: no such hard-negative index; scripts/mine_hard_negatives.py makes one")
        try:
            with open_safetensors(path) as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a hard-negative index, or damaged ({_one_line(error)})") from error
        if header.get("format") != FORMAT or set(tensors) != {"neighbours", "similarity"}:
            raise InputError(f"{path}: not a hard-negative index of this version; mine it again")
        try:
            index = cls(**tensors, metadata=json.loads(header["metadata"]), path=str(path))
            intact = header["sha256"] == index._checksum(header["metadata"]) and index._well_formed()
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: the hard-negative index is damaged; mine it again") from error
        if not intact:
            raise InputError(f"{path}: the hard-negative index is damaged; mine it again")
        return index

    def check(self, annotation: Annotation, reading: Callable[[], Mapping[str, object]] = dict) -> None:
        """InputError unless this index was mined from the training reports of ``annotation``, in their order.

        Its command mines as this index was, over which go the flags of ``reading()``, which read the annotation.
        """
        if self.metadata["train_sha256"] != annotation.train_sha256:
            flags = {"ann_path": annotation.path, "out": self.path} | self.metadata["flags"] | dict(reading())
            words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
            command = shlex.join(["python", "scripts/mine_hard_negatives.py", *words])
            raise InputError(
                f"{self.path}: mined from other training reports ({self.metadata['ann_path']}) than those of "
                f"{annotation.path}; mine again: {command}"
            )

    def _checksum(self, metadata: str) -> str:
        digest = hashlib.sha256(metadata.encode())
        for array in (self.neighbours, self.similarity):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _well_formed(self) -> bool:
        """Whether every neighbour is a row or -1, and flags have names: the file may come from anywhere."""
        rows = self.neighbours
        return (
            rows.dtype == np.int32
            and rows.ndim == 2
            and rows.shape[1] > 0
            and rows.shape == self.similarity.shape
            and bool(((rows >= -1) & (rows < len(rows))).all())
            and isinstance(self.metadata, dict)
            and {"train_sha256", "flags", "ann_path"} <= set(self.metadata)
            and isinstance(self.metadata["flags"], dict)
        )


def group_ids(keys: Iterable[Hashable]) -> np.ndarray:
    """(N,) int64, equal where the keys are equal, numbered by first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def mine_neighbours(
    vectors: "np.ndarray | sparse.csr_matrix",
    text: np.ndarray,
    k: int,
    *,
    text_group: np.ndarray | None,
    study_group: np.ndarray | None,
    label_group: np.ndarray | None = None,
    device: str = "cpu",
    memory_mb: int = 256,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest admissible records of each of N records: rows (N, k) int32, -1 = none, and cosines (N, k) float32.

    vectors (T, D) of norm 1 embed the T distinct texts, text (N,) says which is whose. Records with the same
    text_group (identical cleaned text), study_group or, where it is given, label_group (equal for equal texts) are not
    negatives of each other. None lifts the rule for texts or studies; a record is never its own negative. Of equal
    similarities the earlier record comes first.
    """
    from modules.mining.cosine_search import top_k_cosine

    study = _binding_studies(text, text_group, study_group)
    # Records of one text and one study have the same neighbours and are admissible together: one unit of the search.
    unit, first = _number(np.stack([text, study], axis=1))
    exclusions = [] if text_group is None else [text_group[first]]
    if label_group is not None:
        exclusions.append(label_group[first])
    unit_study = study[first]
    exclusions.append(np.where(unit_study < 0, -1 - np.arange(len(first)), unit_study))
    if not np.array_equal(text[first], np.arange(vectors.shape[0])):
        vectors = vectors[text[first]]
    nearest, similarity = top_k_cosine(vectors, k, exclusions, device=device, memory_mb=memory_mb, progress=progress)
    rows, similarity = _expand(nearest, similarity, _members(unit, len(first), k))
    return rows[unit].astype(np.int32), similarity[unit]


def _binding_studies(text, text_group, study_group):
    """(N,) study of each record, -1 where the rule for texts already excludes every record of that study."""
    if study_group is None:
        study_group = np.arange(len(text))
    if text_group is None:
        return study_group
    pairs = np.unique(np.stack([study_group, text_group], axis=1), axis=0)
    texts_of_study = np.bincount(pairs[:, 0])
    return np.where(texts_of_study[study_group] > 1, study_group, -1)


def _number(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) number of each row of pairs (N, 2) by first appearance, and the (U,) rows where the numbers appear first."""
    _, first, inverse = np.unique(pairs, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse.reshape(-1)], first[order]


def _members(unit: np.ndarray, count: int, k: int) -> np.ndarray:
    """(U, M) the first records of each unit, at most k, -1 beyond its end."""
    order = np.argsort(unit, kind="stable")
    sizes = np.bincount(unit, minlength=count)
    position = np.arange(len(unit)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members = np.full((count, min(k, sizes.max())), -1, dtype=np.int64)
    kept = position < members.shape[1]
    members[unit[order][kept], position[kept]] = order[kept]
    return members


def _expand(nearest: np.ndarray, similarity: np.ndarray, members: np.ndarray, block: int = 4096):
    """Records (U, k) of the nearest units (U, k), best first, ties to the earlier record, and their similarities."""
    rows, values = np.empty_like(nearest), np.empty_like(similarity)
    for start in range(0, len(nearest), block):
        part = slice(start, start + block)
        records = np.where(nearest[part, :, None] < 0, -1, members[nearest[part]])  # (b, k, M)
        cosines = np.where(records < 0, -np.inf, similarity[part, :, None]).astype(np.float32)
        records, cosines = (array.reshape(len(array), -1) for array in (records, cosines))  # (b, k * M)
        order = np.lexsort((records, -cosines), axis=1)[:, : nearest.shape[1]]
        rows[part] = np.take_along_axis(records, order, axis=1)
        values[part] = np.take_along_axis(cosines, order, axis=1)
    return rows, values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
