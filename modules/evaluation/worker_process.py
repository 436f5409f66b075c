"""Runs a package in a Python of its own: a worker script answers one request in JSON.

The libraries of a worker fetch nothing and run no pickles.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.runtime.errors import InputError

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}


class WorkerError(Exception):
    """The worker ended without an answer; the message is its last line."""


def ask_worker(
    worker: Path,
    python: str,
    python_flag: str,
    request: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Any:
    """The answer of the script ``worker`` to ``request``, run by ``python`` with ``environment`` added to its own.

    InputError, which names ``python_flag``, where that cannot be run; WorkerError where the worker fails.
    """
    try:
        # Isolated (-I): the worker's folder has files with the names of packages.
        done = subprocess.run(
            [python, "-I", str(worker)],
            input=json.dumps(request),
            text=True,
            capture_output=True,
            env=os.environ | _ENVIRONMENT | (environment or {}),
        )
    except OSError as error:
        raise InputError(f"{python_flag} {python}: cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise WorkerError(lines[-1][:300])
    return json.loads(done.stdout)
