"""What scripts/score.py runs: files of anybody's reports are read, joined, scored, and written as a tested run's."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.data.report_files import ReportFile, align, read_reports
from modules.evaluation.baselines import COMMONEST
from modules.evaluation.metric_table import FULL
from modules.evaluation.report_scores import COCO, MODEL, as_json, score, tokenisation
from modules.evaluation.report_statistics import save_statistics
from modules.evaluation.scored import Scored
from modules.evaluation.settings import ScoringSettings
from modules.pages.html_report import write_report
from modules.pages.html_scores import CAPTIONS, REPORTS, ScoreRow
from modules.run.shown_studies import highlights, samples_without_images
from modules.runtime.environment import choose_device, file_sha256, provenance
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder, write_report_tables, write_results

_GIVEN = {"": "References as they were given"}


@dataclass(frozen=True)
class Inputs:
    """The files to score and how they are read; ``systems`` are the files of each system, several for its seeds."""

    references: str
    systems: Mapping[str, Sequence[str]]
    training: str = ""
    cleaner: str = "none"
    max_seq_length: int = 0
    threshold: int = 0
    references_column: str = ""
    generated_column: str = ""

    @property
    def runs(self) -> dict[str, str]:
        """The file of each run: a system, or one of its seeds."""
        return {
            name: path
            for system, paths in self.systems.items()
            for name, path in zip(self.names(system), paths, strict=True)
        }

    def names(self, system: str) -> list[str]:
        """The names of a system's runs."""
        count = len(self.systems[system])
        return [system] if count == 1 else [f"{system} seed {number}" for number in range(1, count + 1)]


@dataclass(frozen=True)
class FileScores:
    """What was read and what it scored."""

    inputs: Inputs
    references: ReportFile
    generated: Mapping[str, ReportFile]  # by run, in the references' order
    scored: Scored
    settings: ScoringSettings

    @property
    def systems(self) -> dict[str, list[str]]:
        """The runs of each system."""
        return {system: self.inputs.names(system) for system in self.inputs.systems}


def systems_of(given: Sequence[str]) -> dict[str, list[str]]:
    """Files by system of arguments FILE or NAME=FILE; a name that comes again adds a seed. InputError for two alike.

    Files without a name are called by their own, or their folder's, where that tells them apart.
    """
    pairs = [_name_and_file(text) for text in given]
    bare = [Path(path) for name, path in pairs if not name]
    for path in bare:
        if bare.count(path) > 1:
            raise InputError(f"--res {path}: is given twice; NAME=FILE gives seeds of one system a name")
    forms: Sequence[Callable[[Path], str]] = (
        lambda path: path.stem,
        lambda path: path.parent.name,
        lambda path: "/".join(path.with_suffix("").parts[-2:]),
        str,
    )
    shown = next(form for form in forms if len({form(path) for path in bare} - {""}) == len(bare))
    named = {name for name, _ in pairs if name}
    for path in bare:
        if shown(path) in named:
            raise InputError(
                f"--res {path}: would be called {shown(path)}, a name that another file has; NAME=FILE gives it "
                "another, or the same one where they are seeds of one system"
            )
    found: dict[str, list[str]] = {}
    for name, path in pairs:
        found.setdefault(name or shown(Path(path)), []).append(path)
    for name in found:
        if name in (COMMONEST, "references"):
            raise InputError(f"--res {name}=...: this name is taken; give the system another one")
    return found


def _name_and_file(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not sign or not name or Path(text).exists():
        return "", text
    if not path:
        raise InputError(f"--res {text}: NAME=FILE names no file")
    return name, path


def score_files(inputs: Inputs, settings: ScoringSettings, device: str = "auto") -> FileScores:
    """Read, join and score the files; InputError where one cannot be read, or ids do not agree."""
    captions = inputs.cleaner == COCO
    references = read_reports(inputs.references, "gts", column=inputs.references_column, captions=captions)
    generated = {
        name: align(references, read_reports(path, "res", column=inputs.generated_column, captions=captions))
        for name, path in inputs.runs.items()
    }
    training: list[str] = []
    if inputs.training:
        found = read_reports(inputs.training, "gts", column=inputs.references_column, split="train", captions=captions)
        training = [texts[0] for texts in found.texts]
    # Without an encoder torch is not imported, which takes longer than a small file's scores.
    needs_device = settings.chexbert_path or settings.bertscore_path or settings.radgraph_path or settings.radeval
    scored = score(
        references.texts if captions else [texts[0] for texts in references.texts],
        {name: [texts[0] for texts in file.texts] for name, file in generated.items()},
        ids=references.ids,
        study_ids=references.studies,
        subject_ids=references.subjects,
        with_prior=references.with_prior,
        cleaner=inputs.cleaner,
        training=training,
        max_seq_length=inputs.max_seq_length,
        threshold=inputs.threshold,
        settings=settings,
        device=choose_device(device) if needs_device else "cpu",
    )
    return FileScores(inputs, references, generated, scored, settings)


def write_run(folder: Path, found: FileScores, run: str, samples: int) -> None:
    """Write what main_test.py leaves of a test: results.json, res.csv, gts.csv, statistics.npz and report.html."""
    scored, inputs = found.scored, found.inputs
    private_folder(folder)
    files = {"gts": inputs.references, "res": inputs.runs[run], "train": inputs.training}
    about = provenance() | {
        "files_sha256": {name: file_sha256(path) for name, path in files.items() if path and Path(path).is_file()}
    }
    config = {
        "exp_name": run,
        "dataset_name": COCO if inputs.cleaner == COCO else "",
        "cleaner": inputs.cleaner,
        "max_seq_length": inputs.max_seq_length,
        "threshold": inputs.threshold,
    }
    write_results(
        folder / "results.json",
        as_json(scored, run) | {"tokenisation": tokenisation(inputs.cleaner), "config": config, "provenance": about},
    )
    captions = inputs.cleaner == COCO
    if captions:
        write_report_tables(folder, scored.reports[run], found.references.texts)
    else:  # as they were scored, so that the folder gives the same scores again
        write_report_tables(folder, scored.words[run], scored.references)
    save_statistics(
        folder / "statistics.npz",
        {MODEL: scored.statistics[run]} | {n: s for n, s in scored.statistics.items() if n == COMMONEST},
    )
    _write_page(folder / "report.html", found, run, samples, config, about)


def folder_name(run: str) -> str:
    """The name of a run's folder: its own, without signs that a path gives a meaning to."""
    return re.sub(r"[^\w.-]+", "_", run).strip("._") or "system"


def _write_page(
    path: Path, found: FileScores, run: str, samples: int, config: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    scored, captions = found.scored, found.inputs.cleaner == COCO
    chosen = {run: run} | ({COMMONEST: COMMONEST} if COMMONEST in scored.scores else {})
    forms = CAPTIONS if captions else REPORTS if scored.cut else _GIVEN
    shown = dict if scored.cut else _in_one_form
    results = as_json(scored, run, run)
    file = found.references
    studies = samples_without_images(scored, run, file.ids, file.texts, captions=captions)
    count, (first, chosen_by) = min(samples, len(studies)), highlights(scored, run)
    write_report(
        path,
        title=f"{run}, scored",
        subtitle=f"{len(found.references.texts)} reports of {found.inputs.runs[run]} against {found.inputs.references}",
        synthetic=False,
        scores=[
            ScoreRow(
                name, "test", shown(scored.scores[name]), name == COMMONEST, intervals=shown(scored.intervals[name])
            )
            for name in chosen
        ],
        classes=scored.class_tables(run),
        history=[],
        best_epoch=None,
        variety={name: values for name, values in results["variety"].items() if name != COMMONEST},
        warnings=scored.warnings(run),
        references=forms,
        by_reference=results["by_reference"],
        notes=[
            f"Small: 95 % interval, {scored.intervals_are}; it does not cover other seeds.",
            f"Texts were split into words by: {tokenisation(found.inputs.cleaner)}.",
            *(f"{name} is missing: {reason}." for name, reason in scored.missing.items()),
        ],
        highlights=[(rank, studies[row]) for rank, row in first] if count else [],
        chosen_by=chosen_by,
        samples=[studies[number * len(studies) // count] for number in range(count)],  # spread evenly
        total=len(studies),
        flags=config,
        provenance=about,
    )


def _in_one_form(values: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the only form of the references under plain names; clinical ones have a table of their own."""
    return {name if name.startswith("ce_") else name.removesuffix(FULL): value for name, value in values.items()}
