"""A whole synthetic data set in R2Gen's layout: plan, reports, drawings, and the truth beside them."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from modules.runtime.errors import InputError
from modules.runtime.input_files import read_bytes
from scripts.synthetic.anatomy import DEMO, Variation
from scripts.synthetic.findings import Finding, complete, sample_findings
from scripts.synthetic.findings_csv import write_findings, write_labels
from scripts.synthetic.render import render_study
from scripts.synthetic.reports import draw_style, write_report

SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}
SIGNATURE = "SYNTHETIC chest radiographs: drawings"
_DEMO_ORIGIN = f"{SIGNATURE} made by scripts/make_demo_data.py, no patients."
_IMAGES = ("0.png", "1.png")  # frontal, lateral
# Second numbers of the random keys (seed, study, purpose); the renderer counts from 1.
_FINDINGS, _REPORT = 0, 100


@dataclass(frozen=True)
class SyntheticStudy:
    """One study to be drawn; ``index`` keys everything random about it."""

    index: int
    id: str
    findings: tuple[Finding, ...]
    report: str
    split: str
    department: int | None = None  # whose films carry an identification plate at its usual place; None: no plate


def plan_studies(
    seed: int,
    number: int | None = None,
    normal_fraction: float = 0.6,
    findings: dict[str, tuple[Finding, ...]] | None = None,
    reports: dict[str, tuple[str, str]] | None = None,
    departments: bool = False,
) -> list[SyntheticStudy]:
    """Decide findings, report and split of every study.

    Either ``number`` studies are sampled, or ``findings`` (id -> findings, attributes may be empty) are taken.
    ``reports`` (id -> report, split or "") replaces the grammar; a study's own split wins over the random one.
    ``departments``: each imagined radiologist works in a department whose films can be told by their plate.
    """
    if findings is None:
        digits = max(4, len(str(number)))
        findings = {
            f"SYN{index + 1:0{digits}d}": sample_findings(_generator(seed, index, _FINDINGS), normal_fraction)
            for index in range(number)
        }
    splits = _random_splits(len(findings), seed)
    studies = []
    for index, (study_id, given) in enumerate(findings.items()):
        completed = tuple(
            complete(finding, _generator(seed, index, _FINDINGS, order)) for order, finding in enumerate(given)
        )
        report, split = (reports or {}).get(study_id, ("", ""))
        department = draw_style(_generator(seed, index, _REPORT)) if departments and not report else None
        report = report or write_report(completed, _generator(seed, index, _REPORT))
        studies.append(SyntheticStudy(index, study_id, completed, report, split or splits[index], department))
    return studies


def require_splits(studies: Iterable[SyntheticStudy], where: str) -> None:
    """InputError where a split would be empty: no training could read the data set. ``where``: what it comes from."""
    counts = Counter(study.split for study in studies)
    for split in SPLITS:
        if not counts[split]:
            raise InputError(
                f"{where}: split {split} would be empty, of {counts.total()} studies; give at least one "
                f"for each of {', '.join(SPLITS)}"
            )


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _random_splits(number: int, seed: int) -> list[str]:
    """70/10/20, at least one study in each split where there are three or more."""
    held_out = {split: round(SPLITS[split] * number) or int(number >= 3) for split in ("val", "test")}
    names = ["val"] * held_out["val"] + ["test"] * held_out["test"]
    names = ["train"] * (number - len(names)) + names
    splits = [""] * number
    for position, name in zip(_generator(seed).permutation(number), names, strict=True):
        splits[position] = name
    return splits


def _is_signed(readme: Path) -> bool:
    try:
        return read_bytes(readme).startswith(SIGNATURE.encode())
    except OSError:
        return False


def prepare_folder(out: Path) -> None:
    """Make ``out`` ready to be filled: empty, or a data set made here whose images are removed; else InputError."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        readme = out / "README.txt"
        if not _is_signed(readme):
            raise InputError(
                f"--out {out}: holds files that are not a synthetic data set; name an empty or a new folder"
            )
        _remove_old_images(out / "images")
        (out / "annotation.json").unlink(missing_ok=True)  # written last: where it is missing, a run was interrupted
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
        (out / "README.txt").write_text(f"{SIGNATURE}, unfinished\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error


def _remove_old_images(images: Path) -> None:
    foreign = [path for path in images.glob("**/*") if path.is_file() and path.name not in _IMAGES]
    if foreign:
        raise InputError(f"--out: {foreign[0]} is not a file of a synthetic data set; move it away first")
    for path in sorted(images.glob("**/*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def draw_images(
    out: Path, studies: list[SyntheticStudy], seed: int, size: int, workers: int, variation: Variation = DEMO
) -> Iterator[str]:
    """Draw both views of every study under ``out``/images, yielding each id when its files are written."""
    jobs = [
        (str(out / "images" / study.id), study.findings, (seed, study.index), size, variation, study.department)
        for study in studies
    ]
    if workers == 1:
        yield from map(_draw_study, jobs)
    else:
        with ProcessPoolExecutor(max_workers=workers) as pool:
            yield from pool.map(_draw_study, jobs, chunksize=4)


def _draw_study(job: tuple[str, tuple[Finding, ...], tuple[int, int], int, Variation, int | None]) -> str:
    folder, findings, key, size, variation, department = job
    films = render_study(findings, key, size, variation, department)
    os.makedirs(folder, exist_ok=True)
    for name, view in zip(_IMAGES, ("frontal", "lateral"), strict=True):
        Image.fromarray(films[view]).save(os.path.join(folder, name), optimize=False, compress_level=6)
    return os.path.basename(folder)


def write_tables(
    out: Path,
    studies: Iterable[SyntheticStudy],
    description: str,
    origin: str = _DEMO_ORIGIN,
    owners: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write README.txt (``origin``, which begins with SIGNATURE, then ``description``), findings.csv, labels.csv and,
    last, annotation.json; ``owners`` have the study_id and subject_id of records, by id, where these are known."""
    truth = {study.id: study.findings for study in studies}
    (out / "README.txt").write_text(f"{origin}\n\n{description}", encoding="utf-8")
    write_findings(out / "findings.csv", truth)
    write_labels(out / "labels.csv", truth)
    annotation: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for study in studies:
        annotation[study.split].append(
            {
                "id": study.id,
                **(owners or {}).get(study.id, {}),
                "report": study.report,
                "image_path": [f"{study.id}/{name}" for name in _IMAGES],
                "view": ["frontal", "lateral"],
                "split": study.split,
                "synthetic": True,
            }
        )
    unfinished = out / "annotation.json.part"
    unfinished.write_text(json.dumps(annotation, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(out / "annotation.json")
