"""RadGraph F1 (Jain et al., 2021; Delbrouck et al., 2022) by the package radgraph, in a separate Python.

The package needs transformers below 5, and this project a later one, so it runs as another process: make an
environment with ``pip install radgraph "transformers<5"`` and name its Python.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modules.evaluation.worker_process import WorkerError, ask_worker
from modules.runtime.errors import InputError
from modules.runtime.input_files import require_regular_folder

LEVELS = ("simple", "partial", "complete")  # entities; and whether they have relations; and which
_WORKER = Path(__file__).with_name("radgraph_worker.py")


class RadGraph:
    """Scorer with the model in folder ``path``: config.json, vocabulary/ and weights.th, as the package unpacks them.

    The folder's name says which model it is (radgraph, radgraph-xl, modern-radgraph-xl, echograph). ``python`` is the
    interpreter that has the package, "" for this one. InputError where the model cannot be loaded, which is tried at
    once.
    """

    def __init__(self, path: str, python: str = "") -> None:
        self._path, self._python, self._gpu = Path(path), python or sys.executable, False
        if not (self._path / "weights.th").is_file():
            raise InputError(
                f"--radgraph_path {path}: a folder such as radgraph-xl is needed, with config.json, "
                "vocabulary/ and weights.th"
            )
        require_regular_folder(path, "--radgraph_path")
        self._run([])

    def to(self, device: object) -> "RadGraph":
        """Choose the device of the next scores; returns itself."""
        self._gpu = str(device).startswith("cuda")
        return self

    def score(self, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, np.ndarray]:
        """F1 of N pairs by name (RadGraph_F1_simple, ...), (N, 1) float64 each; 0 where a text is empty. InputError."""
        pairs = list(zip(references, hypotheses, strict=True))
        rows = [row for row, pair in enumerate(pairs) if all(text.strip() for text in pair)]
        scores = np.zeros((len(pairs), len(LEVELS)))
        if rows:
            scores[rows] = self._run([pairs[row] for row in rows])
        return {f"RadGraph_F1_{level}": scores[:, [column]] for column, level in enumerate(LEVELS)}

    def _run(self, pairs: Sequence[tuple[str, str]]) -> list[list[float]]:
        """The worker's answer: a row for each pair."""
        request = {"folder": str(self._path.absolute()), "gpu": self._gpu, "pairs": pairs}
        try:
            return ask_worker(_WORKER, self._python, "--radgraph_python", request)
        except WorkerError as error:
            raise InputError(
                f"--radgraph_path {self._path}: radgraph did not run in {self._python}: {error} "
                '(it needs pip install radgraph "transformers<5"; see --radgraph_python)'
            ) from error
