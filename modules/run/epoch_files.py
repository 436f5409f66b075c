"""What a training writes after every epoch for people to look at: history.json, curves.png, TensorBoard."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modules.pages.plots import training_curves
from modules.runtime.records import private_folder, write_private, write_results


def epoch_writer(folder: Path, *, tensorboard: bool) -> Callable[[list[dict]], None]:
    """A function of the history that brings the files in ``folder`` up to date; ``tensorboard`` adds its own."""
    writer = _tensorboard(folder) if tensorboard else None

    def write(history: list[dict]) -> None:
        write_results(folder / "history.json", history)
        write_private(folder / "curves.png", training_curves(history))
        if writer is not None:
            row = history[-1]
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            writer.flush()

    return write


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # Its thread would print a traceback for a full disk; flush raises the same error here.
    print_it, threading.excepthook = (
        threading.excepthook,
        lambda found: None if isinstance(found.exc_value, OSError) else print_it(found),
    )
    return SummaryWriter(str(private_folder(folder / "tensorboard")))
