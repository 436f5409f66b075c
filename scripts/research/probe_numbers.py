"""Numbers of the probes, one JSON file for the checkpoints of several calls: what draw_mechanism.py draws."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules.runtime.errors import InputError
from modules.runtime.input_files import MAX_ANNOTATION, read_bytes
from modules.runtime.output_files import Output, check_outputs, contains
from modules.runtime.records import write_private

Row = dict[str, Any]  # "checkpoint", "epoch" and what the probe found


def check_numbers(path: Path | None, probe: str) -> None:
    """Raise InputError where ``path`` is there and is not a file of ``probe``; before the work."""
    check_outputs([Output("--numbers", path, f"numbers of {probe}", contains(f'"probe": "{probe}"'))])


def read_numbers(path: Path, probe: str) -> list[Row]:
    """The rows of ``path``; InputError for a file that another program wrote."""
    try:
        content = json.loads(read_bytes(path, MAX_ANNOTATION))
        rows = content["rows"] if content["probe"] == probe else None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError):
        rows = None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"checkpoint", "epoch"} <= set(row) for row in rows
    ):
        raise InputError(f"{path}: not a file that {probe}.py --numbers wrote")
    return rows


def keep_numbers(path: Path, probe: str, rows: Sequence[Row]) -> None:
    """Write ``rows``; those of other checkpoints that are there stay."""
    new = {row["checkpoint"] for row in rows}
    before = read_numbers(path, probe) if path.exists() else []
    lines = [json.dumps(row) for row in [*(row for row in before if row["checkpoint"] not in new), *rows]]
    write_private(path, f'{{"probe": "{probe}",\n"rows": [\n' + ",\n".join(lines) + "\n]}\n")
