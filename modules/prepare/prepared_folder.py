"""What every preparation leaves in its folder beside the images: annotation.json and dataset.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.data.annotations import SPLITS
from modules.data.dataset_specs import write_description
from modules.runtime.errors import InputError
from modules.runtime.output_files import Annotation, write_annotation


def write_prepared(
    folder: Path, annotation: Annotation, facts: Mapping[str, Any], *, image_dir: Path | None, hint: str = ""
) -> str:
    """Write both, ``facts`` those of dataset.json, and return the line that ends a preparation.

    ``image_dir`` is what the flag of that name has to be, None where no images were given. InputError as in
    write_annotation.
    """
    path = folder / "annotation.json"
    done = write_annotation(path, annotation, hint)
    write_description(folder, **facts)
    return f"{done}: {path}; " + (f"--image_dir {image_dir}" if image_dir else "no images (--images)")


def require_splits(path: Path, splits: Mapping[str, Sequence]) -> None:
    """InputError where one of the ``splits`` that are to be written to ``path`` has no record."""
    if empty := [split for split in SPLITS if not splits[split]]:
        counts = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        raise InputError(
            f"{path}: not written, no record is left for split {empty[0]} ({counts}), and training needs all three; "
            "look for what was left out, or give or draw another split"
        )
