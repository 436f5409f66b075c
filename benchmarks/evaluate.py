"""Time of scoring a test split of synthetic reports, by part, and the number of Java processes that it takes.

What main_test.py does after generation, and scripts/score.py with files: every score against references as published
codes cut them and against whole ones, labels by rules, confidence intervals. METEOR works in a Java process, whose
seconds are counted with it. The memory of the intervals is what 2,000 and 20,000 resamples add at their peak.

  python benchmarks/evaluate.py                            3,858 reports, as many as MIMIC-CXR's test split has
  python benchmarks/evaluate.py --reports 590 3858 --rounds 3 --out evaluate.json
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import now, parser_of, prepare, print_header, print_row, save
from benchmarks.reference_figures import print_reference
from modules.runtime.errors import run_entry_point

CUT = 60  # words of a reference that published codes keep, at most
RESAMPLES = (2_000, 20_000)  # whose memory is compared


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=1)
    parser.add_argument("--reports", type=int, nargs="+", default=[3858], help="default 3858")
    return parser


def synthetic_reports(count: int, seed: int) -> list[str]:
    """Cleaned reports of made-up studies, two of which have the length of one of MIMIC-CXR's."""
    from modules.data.tokenizers import clean_report
    from scripts.synthetic.dataset import plan_studies

    texts = [clean_report(study.report, "mimic_cxr") for study in plan_studies(seed, 2 * count)]
    return [f"{first} {second}" for first, second in zip(texts[::2], texts[1::2], strict=True)]


class Evaluation:
    """One evaluation of ``generated`` against ``references``, part by part."""

    def __init__(self, references: list[str], generated: list[str], clock: str):
        from modules.evaluation.metrics import Metrics

        self.metrics, self.clock = Metrics(), clock
        self.whole, self.generated = references, generated
        self.cut = [" ".join(report.split()[:CUT]) for report in references]
        self.tables: dict[str, Any] = {}

    def words(self) -> None:
        """BLEU, ROUGE-L and CIDEr, twice; keeps what the intervals are computed from."""
        from modules.evaluation.metrics import measure

        _, self.tables = measure(self.metrics, self.cut, self.whole, self.generated, with_meteor=False)

    def meteor(self) -> None:
        """METEOR and each report's statistics of it, twice, by one process."""
        for references in (self.cut, self.whole):
            self.metrics.meteor.per_report([[text] for text in references], self.generated)

    def labels(self) -> None:
        """The 14 classes of the references, in both forms, and of the generated reports."""
        from modules.evaluation.clinical_scores import clinical_scores
        from modules.evaluation.report_statistics import clinical_tables
        from modules.labels.labeler import label_reports

        cut, whole, generated = (label_reports(texts) for texts in (self.cut, self.whole, self.generated))
        for references, suffix in ((cut, ""), (whole, "_full")):
            clinical_scores(references, generated, "rule")
            tables = clinical_tables(references, generated, "rule")
            self.tables |= {f"{name}{suffix}": table for name, table in tables.items()}

    def intervals(self) -> None:
        """Bootstrap intervals of all scores."""
        from modules.evaluation.bootstrap import intervals
        from modules.evaluation.report_statistics import ReportStatistics

        intervals(ReportStatistics(self.tables, "", "", tag=""))

    def interval_memory(self, resamples: int) -> float:
        """MiB that so many resamples need at their peak."""
        import tracemalloc

        from modules.evaluation.bootstrap import intervals
        from modules.evaluation.report_statistics import ReportStatistics

        tracemalloc.start()
        intervals(ReportStatistics(self.tables, "", "", tag=""), resamples=resamples)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak / 2**20

    def run(self) -> dict[str, float]:
        """Seconds of every part."""
        parts: dict[str, Callable[[], None]] = {
            "BLEU, ROUGE-L, CIDEr": self.words,
            "METEOR": self.meteor,
            "labels by rules": self.labels,
            "confidence intervals": self.intervals,
        }
        seconds = {}
        for name, work in parts.items():
            began = self._now()
            work()
            seconds[name] = self._now() - began
        return seconds

    def _now(self) -> float:
        java = self.metrics.meteor.process
        return now(self.clock, "cpu") + (processor_seconds(java.pid) if self.clock == "cpu" and java else 0.0)


def processor_seconds(process: int) -> float:
    """What a running process has used of the processor."""
    import os

    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_reports(count: int, rounds: int, clock: str) -> dict[str, Any]:
    """Seconds by part over the rounds; every round has its own Java process, as every run has."""
    references, generated = synthetic_reports(count, 0), synthetic_reports(count, 1)
    seconds: dict[str, list[float]] = {}
    starts = []
    for _ in range(rounds):
        evaluation = Evaluation(references, generated, clock)
        for name, took in evaluation.run().items():
            seconds.setdefault(name, []).append(took)
        starts.append(evaluation.metrics.meteor.starts)
        evaluation.metrics.close()
    memory = {str(resamples): evaluation.interval_memory(resamples) for resamples in RESAMPLES}
    seconds["all"] = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    seconds["all but METEOR"] = [
        every - meteor for every, meteor in zip(seconds["all"], seconds["METEOR"], strict=True)
    ]
    words = statistics.mean(len(report.split()) for report in references)
    return {"reports": count, "words": words, "seconds": seconds, "java_starts": max(starts), "interval_mib": memory}


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    _, made_by = prepare(arguments, ("reports",))
    results = []
    for count in arguments.reports:
        results.append(measure_reports(count, arguments.rounds, arguments.clock))
        result = results[-1]
        whole = statistics.median(result["seconds"]["all"])
        print_header(
            f"{count:,} synthetic reports of {result['words']:.0f} words, both forms of the references; "
            f"Java processes: {result['java_starts']}",
            "share",
            "reports/s",
        )
        for name, seconds in result["seconds"].items():
            median = statistics.median(seconds)
            print_row(name, seconds, f"{median / whole:.0%}", f"{count / median:,.0f}")
        memory = ", ".join(f"{mib:.1f} MiB with {resamples}" for resamples, mib in result["interval_mib"].items())
        print(f"peak memory of the intervals, by resamples: {memory}")
        save(arguments.out, {"benchmark": "evaluate", **made_by, "results": results})
    print_reference("evaluate")


if __name__ == "__main__":
    run_entry_point(main)
