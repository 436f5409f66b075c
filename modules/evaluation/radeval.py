"""Scores of the package radeval (Xu et al., 2025) for each report, in a separate Python that has it.

Its requirements are many: make an environment with ``pip install radeval`` and name its Python. Weights are looked for
where the package's own downloads put them, and nothing is downloaded. RadCliQ-v1 is given for each report, lower is
better, and averaged; the package's own total is one over that mean.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modules.evaluation.metric_table import RADEVAL
from modules.evaluation.worker_process import WorkerError, ask_worker
from modules.runtime.errors import InputError, did_you_mean

_WORKER = Path(__file__).with_name("radeval_worker.py")
_TRIAL = ("No pleural effusion.", "There is no effusion.")  # loads everything that a metric needs


class RadEval:
    """Scorer with the metrics ``names``, keys of RADEVAL separated by commas.

    ``python`` is the interpreter that has the package, "" for this one; ``weights`` a folder like ~/.cache, where the
    package looks. InputError where one of the metrics cannot run, which is tried at once.
    """

    def __init__(self, names: str, python: str = "", weights: str = "") -> None:
        self._names = [name.strip().lower() for name in names.split(",") if name.strip()]
        for name in self._names:
            if name not in RADEVAL:
                raise InputError(f"--radeval {name}: must be one of {', '.join(RADEVAL)}{did_you_mean(name, RADEVAL)}")
        if weights and not Path(weights).is_dir():
            raise InputError(
                f"--radeval_weights {weights}: no such folder; give one like ~/.cache with radeval's weights"
            )
        self._python, self._weights, self._gpu = python or sys.executable, weights, False
        for name in self._names:
            self._run([name], [_TRIAL])

    def to(self, device: object) -> "RadEval":
        """Choose the device of the next scores; returns itself."""
        self._gpu = str(device).startswith("cuda")
        return self

    def score(self, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, np.ndarray]:
        """Each report's own scores (N, 1) float64 by their names in RADEVAL; InputError."""
        found = self._run(self._names, list(zip(references, hypotheses, strict=True)))
        return {
            score.name: np.array(found[key], dtype=np.float64)[:, None]
            for name in self._names
            for key, score in RADEVAL[name].items()
        }

    def _run(self, names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, list[float]]:
        environment = {} if self._gpu else {"CUDA_VISIBLE_DEVICES": ""}
        if self._weights:
            folder = os.path.abspath(self._weights)
            environment |= {"XDG_CACHE_HOME": folder, "HF_HOME": os.path.join(folder, "huggingface")}
        try:
            return ask_worker(
                _WORKER, self._python, "--radeval_python", {"metrics": list(names), "pairs": list(pairs)}, environment
            )
        except WorkerError as error:
            where = self._weights or "~/.cache"
            raise InputError(
                f"--radeval {names[0]}: did not run in {self._python}: {error} (it needs pip install radeval in that "
                f"Python, and its weights in {where}; see --radeval_python and --radeval_weights)"
            ) from error
