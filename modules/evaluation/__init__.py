"""Scores of generated reports, their intervals and tests, and the training-free baselines.

Nothing is shown here: pages does that. ``from modules.evaluation import score`` scores the reports of any system.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """``score``, imported when it is asked for: flags read this room's settings without any package."""
    if name == "score":
        from modules.evaluation.report_scores import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
