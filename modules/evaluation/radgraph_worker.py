"""Runs the package radgraph on pairs of reports; radgraph.py starts it in the Python that has the package.

Standard input: JSON with the model's folder, whether to use the GPU, and pairs of a reference and a generated report.
Standard output: JSON, the F1 of each pair at radgraph's three levels. Imports nothing of this project.
"""

import contextlib
import json
import sys
from pathlib import Path


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    folder = Path(request["folder"])
    with contextlib.redirect_stdout(sys.stderr):  # the package prints
        from radgraph import F1RadGraph

        scorer = F1RadGraph(
            reward_level="all",
            model_type=folder.name,
            model_cache_dir=str(folder.parent),
            cuda=0 if request["gpu"] else -1,
        )
        rows = []
        if request["pairs"]:
            references, hypotheses = (list(side) for side in zip(*request["pairs"]))  # noqa: B905 (older Pythons)
            _, levels, _, _ = scorer(hyps=hypotheses, refs=references)
            rows = [[float(value) for value in row] for row in zip(*levels)]  # noqa: B905
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
