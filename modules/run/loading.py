"""Reads a trained model from what --load names: a checkpoint, or a folder of scripts/export.py, here or on the hub."""

from pathlib import Path
from typing import Any

from modules.config import EXPORTED
from modules.inference.hub_format import CARD, VOCABULARY, WEIGHTS, read_hub_folder
from modules.inference.study_files import SETTINGS
from modules.runtime.hub import HUB, download_files
from modules.training.checkpoint import FORMAT, load_checkpoint


def load_trained(path: str) -> tuple[dict[str, Any], Path]:
    """The content of a checkpoint, and the file that its weights are in; a folder reads like the checkpoint it is from.

    ``path``: a .pth file of this project or of a published code, a folder, or hf://owner/name, which is downloaded
    unless it is here already. InputError where it cannot be read. What a folder does not hold, a test of it takes from
    the flags: paths, and the history of the training.
    """
    folder = Path(path)
    if path.startswith(HUB):
        folder = download_files(path, (WEIGHTS, SETTINGS, VOCABULARY, CARD), flag="--load")
    if not folder.is_dir():
        return load_checkpoint(path), folder
    return read_hub_folder(folder, EXPORTED) | {"format": FORMAT, "history": []}, folder / WEIGHTS
