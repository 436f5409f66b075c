"""report.html of a tested model: what modules.pages shows is gathered here from a run's parts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from modules.config import Config
from modules.data.dataset_specs import data_title
from modules.data.datasets import ReportDataset
from modules.evaluation.baselines import COMMONEST
from modules.evaluation.metric_table import SELECTION, untagged
from modules.pages.findings import compare_labels
from modules.pages.html_report import write_report
from modules.pages.html_scores import CAPTIONS, REPORTS, ScoreRow
from modules.pages.studies import Sample
from modules.run.data import Data, image_folder
from modules.run.shown_studies import highlights, labels_of, own_scores
from modules.run.tested import MODEL, Tested
from modules.runtime.errors import InputError


def write_page(path: Path, tested: Tested, dataset: ReportDataset) -> None:
    """Write the page; ``dataset`` is the test split, whose images it shows."""
    config, data, tag = tested.config, tested.data, tested.tag
    sample = _sample_maker(dataset, tested)
    first, chosen_by = highlights(tested.scored, MODEL)
    total = len(tested.found.ids)
    count = min(config.report_samples, total)
    write_report(
        path,
        title=f"{config.exp_name or config.model_name} on {_data_name(tested)}",
        subtitle="; ".join(filter(None, (_method(config, data), f"{total} test samples", _best_epoch(tested)))),
        synthetic=data.annotation.synthetic,
        scores=_score_rows(tested),
        classes=tested.scored.class_tables(MODEL),
        history=tested.history,
        best_epoch=tested.best_epoch or None,
        variety={
            f"{name} ({tag})" if tag and name == MODEL else name: values
            for name, values in tested.variety.items()
            if name != COMMONEST  # one report, which does not vary
        },
        warnings=tested.warnings,
        references=CAPTIONS if tested.captions else REPORTS,
        by_reference=_by_reference(tested),
        notes=_notes(tested),
        highlights=[(rank, sample(row)) for rank, row in first] if count else [],
        chosen_by=chosen_by,
        samples=(sample(i * total // count) for i in range(count)),  # spread evenly over the split
        total=total,
        flags=dataclasses.asdict(config),
        provenance=tested.provenance,
    )


def _data_name(tested: Tested) -> str:
    """The data set's own name, else that of the folder of its annotation."""
    path = Path(tested.config.ann_path)
    known = data_title(tested.config.dataset_name, str(path), tested.data.annotation.synthetic)
    return known or path.absolute().parent.name


def _best_epoch(tested: Tested) -> str:
    """Nothing where no history came with the checkpoint."""
    return f"best epoch {tested.best_epoch} of {len(tested.history)}" if tested.history else ""


def _by_reference(tested: Tested) -> dict[str, dict[str, Any]]:
    """As ``tested`` has them, with plain names: the page's columns hold model and baselines."""
    return {
        kind: {
            "reports": part["reports"],
            "scores": {
                system: {untagged(name, tested.tag): value for name, value in scores.items()}
                for system, scores in part["scores"].items()
            },
        }
        for kind, part in tested.by_reference.items()
    }


def _notes(tested: Tested) -> list[str]:
    missing = [f"{name} is missing: {reason}." for name, reason in tested.scored.missing.items()]
    return [
        f"Small: 95 % interval, {tested.scored.intervals_are}; it does not cover other seeds.",
        f"Texts were split into words by: {tested.tokenisation}.",
        *missing,
    ]


def _score_rows(tested: Tested) -> list[ScoreRow]:
    """The page's rows, with the tag in the row's name: a model then has the same columns as the baselines."""
    rows, tag = [], tested.tag
    for name, values in tested.scored.scores.items():
        own_tag = tag if name == MODEL else ""
        limits = {untagged(score, own_tag): found for score, found in tested.scored.intervals[name].items()}
        rows.append(ScoreRow(name, "test", values, is_baseline=name != MODEL, tag=own_tag, intervals=limits))
    if validation := tested.validation:
        plain = {untagged(name, tag): value for name, value in validation.items() if name != SELECTION}
        rows.append(ScoreRow(MODEL, "val", plain, tag=tag if plain.keys() - validation.keys() else ""))
    return rows


def _method(config: Config, data: Data) -> str:
    guided = f", decoded with guidance {config.guidance:g}" if config.guidance else ""
    how = guided + (", JPEG files read as drafts" if config.jpeg_draft else "")
    if data.trained_with == "unknown":
        return f"a checkpoint of another program{how}"
    stage = f"self-critical with reward {config.scst_reward}, " if config.self_critical else ""
    if data.trained_with == "off":
        return f"{stage}plain backbone, no ITHN{how}"
    method = f"ITHN with strategy {data.trained_with} ({config.ithn_variant} variant), alpha {config.alpha:g}"
    return f"{stage}{method}{how}"


def _image_reader(config: Config, dataset: ReportDataset) -> Callable[[str], Image.Image | None]:
    """Reads an image; with detection features, where images need not be there, None for one that cannot be read."""
    if config.shards:
        return dataset.read_image
    if not config.detection_features:
        return image_folder(config)

    def read(path: str) -> Image.Image | None:
        try:
            return image_folder(config)(path)
        except InputError:
            return None

    return read


def _sample_maker(dataset: ReportDataset, tested: Tested) -> Callable[[int], Sample]:
    """A function that gives the study of a row of the test split as the page shows it, with its images."""
    found, read = tested.found, _image_reader(tested.config, dataset)
    # By id: an unreadable image is replaced by another sample.
    rows = {dataset.sample_id(index): sample for index, sample in enumerate(dataset.samples)}
    labels, scores = labels_of(tested.scored, MODEL), own_scores(tested.scored, MODEL)

    def sample(index: int) -> Sample:
        row, view = rows[found.ids[index]]
        study = dataset.studies[row]
        chosen = [view] if dataset.separate else range(min(dataset.num_views, len(study.image_paths)))
        images = [(image, study.views[v]) for v in chosen if (image := read(study.image_paths[v])) is not None]
        return Sample(
            id=found.ids[index],
            images=[image for image, _ in images],
            views=[view for _, view in images],
            reference=found.full_references[index],
            generated=found.generated[index],
            captions=tested.captions[index] if tested.captions else (),
            findings=None if labels is None else compare_labels(labels[0][index], labels[1][index]),
            scores={name: float(values[index]) for name, values in scores.items()},
        )

    return sample
