"""Runs the package radeval on pairs of reports; radeval.py starts it in the Python that has the package.

Standard input: JSON with names of metrics, and pairs of a reference and a generated report. Standard output: JSON, the
value of each pair by the metrics' keys. Imports nothing of this project.
"""

import contextlib
import json
import os
import sys
import tempfile


def main() -> None:
    """Answer one request; exit with one line where a metric fails."""
    request = json.load(sys.stdin)
    references, hypotheses = (list(side) for side in zip(*request["pairs"]))  # noqa: B905 (older Pythons)
    found = {}
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # GREEN writes files where it runs
        for name in request["metrics"]:
            try:
                found.update(values_of(name, references, hypotheses))
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                sys.exit(f"{type(error).__name__}: {first}")
    json.dump({key: [float(value) for value in values] for key, values in found.items()}, sys.stdout)


def values_of(name, references, hypotheses):
    """The values of each pair by the metric's keys."""
    import nltk

    nltk.download = lambda *_, **__: False  # the package would, when it is imported
    if name == "sembscore":
        from radeval.metrics.RadCliQv1.semb_score import semantic_embedding_scores

        return {"sembscore": semantic_embedding_scores(references, hypotheses)}
    from radeval import RadEval

    return RadEval(metrics=[name], per_sample=True, show_progress=False)(refs=references, hyps=hypotheses)


if __name__ == "__main__":
    main()
