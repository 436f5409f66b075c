"""Tests a model against the floors and writes everything that a run leaves for reading."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models import backbone_class, settings_class
from modules.config import NO_EFFECT_ON_RESULTS, Config
from modules.data.captions import first_of_each_image
from modules.data.datasets import ReportDataset
from modules.data.tokenizers import Tokenizer
from modules.evaluation.bootstrap import LEVEL, RESAMPLES
from modules.evaluation.diversity import collapse_statistics, collapse_warning
from modules.evaluation.floors import commonest_report_floor, nearest_image_floor
from modules.evaluation.report_statistics import save_statistics
from modules.evaluation.score_names import FULL, tagged, untagged, with_aliases
from modules.evaluation.tester import Predictions, Tester, autocast
from modules.ithn.objective import Objective
from modules.pages.exports import write_caption_exports, write_exports, write_labelled
from modules.pages.html_report import Sample, ScoreRow, write_report
from modules.pages.html_scores import CAPTIONS, REPORTS
from modules.run import build as compose
from modules.run.image_sources import image_folder
from modules.run.scoring import RULE, Scored, Scoring, class_tables
from modules.runtime import distributed
from modules.runtime.environment import file_sha256, provenance
from modules.runtime.errors import InputError
from modules.runtime.records import append_record, write_report_tables, write_results
from modules.runtime.run_log import Bar
from modules.training.checkpoint_folder import OF_A_TEST, set_aside

logger = logging.getLogger("ithn")
MODEL, COMMONEST, NEAREST = "model", "commonest training report", "nearest training image"


def test_and_write(
    config: Config,
    data: compose.Data,
    objective: Objective,
    device: torch.device,
    *,
    tester: Tester,
    loader: Any,
    scoring: Scoring | None,
    folder: Path,
    weights: Path,
    history: Sequence[Mapping],
    best_epoch: int,
) -> None:
    """Generate and score the test split, score the floors beside it, and write the results into ``folder``.

    ``weights`` is the checkpoint that ``objective`` was read from.

    All processes generate and look at images; the first one, which has the ``scoring``, does the rest.
    """
    found = tester.predict(loader, "test")
    tag = tester.score_tag
    floors = _floors(config, data, objective, device, found)
    if found is None:
        return
    reports = {MODEL: found.generated} | floors
    scored = scoring.test(found, reports, {MODEL: tag})
    variety = {name: collapse_statistics(generated) for name, generated in reports.items()}
    variety["references"] = collapse_statistics(found.references)
    validation = _validation_scores(history, best_epoch)
    run = provenance(str(device)) | {
        "annotation_sha256": data.annotation.sha256,
        "vocabulary_sha256": data.tokenizer.sha256,
        "files_sha256": input_files(config),
        "negative_index_sha256": file_sha256(config.negative_index),
        "checkpoint_sha256": file_sha256(weights),
        # Of a training that started from another checkpoint; a test loads the one above.
        "started_from_sha256": file_sha256(config.load) if Path(config.load) != weights else "",
        "seed": config.seed,
    }
    scores = scored.scores | {MODEL: {tagged(name, tag): value for name, value in scored.scores[MODEL].items()}}
    classes = class_tables(scored, MODEL)
    _log(scores, tag, variety[MODEL], scoring.meteor_error)
    _keep_others(folder, config, run["checkpoint_sha256"])
    write_results(
        folder / "results.json",
        {
            "split": "test",
            "best_epoch": best_epoch,
            "val": validation,
            "test": {name: with_aliases(values) for name, values in scores.items()},
            "intervals": scored.intervals,
            "intervals_are": f"percentile bootstrap over reports, {RESAMPLES} resamples, level {LEVEL:g}",
            "variety": variety | {MODEL: {tagged(name, tag): value for name, value in variety[MODEL].items()}},
            "tokenisation": scoring.tokenisation,
            "clinical_classes": classes,
            "meteor_error": scoring.meteor_error,
            "synthetic": data.annotation.synthetic,
            "config": dataclasses.asdict(config),
            "provenance": run,
        },
    )
    captions = [scoring.captions(sample) for sample in found.ids] if config.captioning else None
    _write_files(folder, found, scored, captions)
    append_record(
        config.record_dir,
        config.dataset_name,
        epoch=best_epoch,
        seed=config.seed,
        val=validation,
        test=_recorded(scores[MODEL], tag),
        extra=_record(config, data),
    )
    write_report(
        folder / "report.html",
        title=f"{config.exp_name or config.model_name} on {config.dataset_name}",
        subtitle=f"{_method(config, data)}; {len(found.ids)} test samples; best epoch {best_epoch} of {len(history)}",
        synthetic=data.annotation.synthetic,
        scores=_score_rows(scored, validation, tag),
        classes=classes,
        meteor_error=scoring.meteor_error,
        history=history,
        best_epoch=best_epoch or None,
        variety={
            f"{name} ({tag})" if tag and name == MODEL else name: values
            for name, values in variety.items()
            if name != COMMONEST
        },  # that varies not at all
        warnings=[line for line in (collapse_warning(variety[MODEL]),) if line],
        references=CAPTIONS if captions else REPORTS,
        tokenisation=scoring.tokenisation,
        samples=_samples(loader.dataset, _image_reader(config, loader.dataset), found, captions, config.report_samples),
        flags=dataclasses.asdict(config),
        provenance=run,
    )
    logger.info("results in %s: report.html, results.json, res.csv, gts.csv, statistics.npz, exports/", folder)


def input_files(config: Config) -> dict[str, str]:
    """SHA-256 of the files that a training with these settings starts from, by the flags that name them."""
    own = dataclasses.fields(settings_class(config.model_name))
    paths = {
        "label_path": config.label_path if backbone_class(config.model_name).needs_labels else "",
        **{item.name: getattr(config, item.name) for item in own if item.metadata.get("file")},
        "visual_extractor_weights": config.visual_extractor_weights,
    }
    return {name: digest for name, path in paths.items() if (digest := file_sha256(path))}


def _keep_others(folder: Path, config: Config, checkpoint_sha256: str) -> None:
    """Results in ``folder`` that other settings or another checkpoint gave are moved, not written over."""
    if not (folder / "results.json").is_file():
        return
    # As JSON gives it back: tuples become lists. What an older file lacks had its default.
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        theirs = defaults | content["config"]
        same = content["provenance"]["checkpoint_sha256"] == checkpoint_sha256 and all(
            theirs[name] == ours[name] for name in ours.keys() - NO_EFFECT_ON_RESULTS
        )
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        logger.info(
            "%s held the results of other settings or another checkpoint: they are now in %s",
            folder,
            set_aside(folder, OF_A_TEST),
        )


def _write_files(folder: Path, found: Predictions, scored: Scored, captions: Sequence[Sequence[str]] | None) -> None:
    """The reports as R2Gen and others read them, and what compares this run with another without scoring it again."""
    write_report_tables(folder, found.generated, captions or found.references)
    if captions:
        write_caption_exports(folder / "exports", found.ids, found.generated, captions)
    else:
        write_exports(folder / "exports", found.ids, found.generated, found.reports)
    if labels := scored.labels.get(RULE):
        write_labelled(folder / "exports", found.generated, found.references, labels[MODEL], labels["references"])
    save_statistics(folder / "statistics.npz", scored.statistics)


def _floors(
    config: Config, data: compose.Data, objective: Objective, device: torch.device, found: Predictions | None
) -> dict[str, list[str]]:
    """What needs no decoder: the commonest training report, and the report of the training image most alike.

    Of an image's captions the commonest is sought among all, and the first stands for the image.
    """
    if not config.floors:
        return {}
    extractor, studies = objective.backbone.visual_extractor, data.annotation.splits["train"]
    dataset = compose.build_dataset(
        config,
        data,
        "train",
        augment=False,
        extractor=extractor,
        studies=first_of_each_image(studies) if config.captioning else studies,
    )
    gathered = _pooled_features(
        objective, compose.build_split_loader(config, dataset, device, shuffle=False), device, config.precision
    )
    if gathered is None or found is None:  # not the first process, which scores
        return {}
    ids, features = gathered
    texts = [cut_report(study.report, data.tokenizer, config.max_seq_length) for study in dataset.studies]
    # By id: where an image was unreadable, another sample stands in.
    by_id = {dataset.sample_id(index): texts[row] for index, (row, _) in enumerate(dataset.samples)}
    per_sample = [by_id[sample] for sample in ids]
    every = (
        [cut_report(study.report, data.tokenizer, config.max_seq_length) for study in studies]
        if config.captioning
        else per_sample
    )
    return {
        COMMONEST: commonest_report_floor(every, len(found.ids)),
        NEAREST: nearest_image_floor(features.numpy(), per_sample, found.visual_features.numpy()),
    }


@torch.inference_mode()
def _pooled_features(
    objective: Objective, loader: Any, device: torch.device, precision: str
) -> tuple[list[str], Tensor] | None:
    """The samples' ids, and their pooled visual features (N, C) on the CPU; in the first process only."""
    objective.eval()
    ids, pooled = [], []
    for batch in Bar(loader, "features of the training images"):
        pair = batch.to(device).positive
        with autocast(device, precision):
            pooled.append(objective.backbone.extract(pair.images, pair.view_mask).pooled.float().cpu())
        ids.append(batch.ids)
    gathered = distributed.gather_batches(ids, pooled)
    if gathered is None:
        return None
    return [name for batch in gathered[0] for name in batch], torch.cat(gathered[1])


def cut_report(report: str, tokenizer: Tokenizer, max_seq_length: int) -> str:
    """A report as the R2Gen family scores references: cleaned, rare words as <unk>, cut to ``max_seq_length`` ids."""
    return tokenizer.decode(tokenizer.encode(report)[:max_seq_length][1:])


def _score_rows(scored: Scored, validation: Mapping[str, Any], tag: str) -> list[ScoreRow]:
    """The page's lines: ``tag`` goes with the line there, so that a model stands in the same columns as the floors."""
    rows = []
    for name, values in scored.scores.items():
        own_tag = tag if name == MODEL else ""
        limits = {untagged(score, own_tag): found for score, found in scored.intervals[name].items()}
        rows.append(ScoreRow(name, "test", values, is_floor=name != MODEL, tag=own_tag, intervals=limits))
    if validation:
        plain = {untagged(name, tag): value for name, value in validation.items()}
        rows.append(ScoreRow(MODEL, "val", plain, tag=tag if plain.keys() != validation.keys() else ""))
    return rows


def _validation_scores(history: Sequence[Mapping], best_epoch: int) -> dict[str, float | None]:
    rows = [row for row in history if row["epoch"] == best_epoch]
    return {name.removeprefix("val_"): value for row in rows for name, value in row.items() if name.startswith("val_")}


def _method(config: Config, data: compose.Data) -> str:
    guided = f", decoded with guidance {config.guidance:g}" if config.guidance else ""
    if data.trained_with == "unknown":
        return f"a checkpoint of another program{guided}"
    stage = f"self-critical with reward {config.scst_reward}, " if config.self_critical else ""
    if data.trained_with == "off":
        return f"{stage}plain backbone, no ITHN{guided}"
    method = f"ITHN with strategy {data.trained_with} ({config.ithn_variant} variant), alpha {config.alpha:g}"
    return f"{stage}{method}{guided}"


def _record(config: Config, data: compose.Data) -> dict[str, Any]:
    return {
        "exp_name": config.exp_name,
        "model_name": config.model_name,
        "strategy": data.trained_with,
        "ithn_variant": config.ithn_variant,
        "alpha": config.alpha,
        "save_dir": config.save_dir,
    }


def _recorded(scores: Mapping[str, Any], tag: str) -> dict[str, Any]:
    """A record keeps the clinical scores of 14 classes with uncertain as negative, against whole references."""
    return {
        name: value
        for name, value in scores.items()
        if not name.startswith("ce_") or untagged(name, tag).endswith(f"_14_uncertain_negative{FULL}")
    }


def _log(scores: Mapping[str, Mapping], tag: str, variety: Mapping[str, Any], meteor_error: str | None) -> None:
    for name, values in scores.items():
        # Words against references as others cut them, labels against whole ones.
        kept = {
            key: value
            for key, value in _recorded(values, tag).items()
            if key.endswith(FULL) == key.startswith("ce_") and not ("_precision_" in key or "_recall_" in key)
        }
        shown = " ".join(f"{key}={'-' if value is None else f'{value:.4f}'}" for key, value in kept.items())
        logger.info("test, %s: %s", name, shown)
    logger.info(
        "test, different reports: %d of %d; the commonest is %.1f %%",
        variety["unique_reports"],
        variety["num_reports"],
        100 * variety["commonest_share"],
    )
    if line := collapse_warning(variety):
        logger.warning("%s", line)
    if meteor_error:
        logger.warning("METEOR is missing: %s", meteor_error)


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


def _samples(
    dataset: ReportDataset,
    read: Callable[[str], Image.Image | None],
    found: Predictions,
    captions: Sequence[Sequence[str]] | None,
    count: int,
) -> Iterator[Sample]:
    """``count`` samples spread evenly over the split, with their images."""
    total = len(found.ids)
    # By id: where an image was unreadable, another sample stands in.
    rows = {dataset.sample_id(index): sample for index, sample in enumerate(dataset.samples)}
    for i in range(min(count, total)):
        index = i * total // min(count, total)
        row, view = rows[found.ids[index]]
        study = dataset.studies[row]
        chosen = [view] if dataset.separate else range(min(dataset.num_views, len(study.image_paths)))
        images = [(image, study.views[v]) for v in chosen if (image := read(study.image_paths[v])) is not None]
        yield Sample(
            id=found.ids[index],
            images=[image for image, _ in images],
            views=[view for _, view in images],
            reference=found.full_references[index],
            generated=found.generated[index],
            captions=captions[index] if captions else (),
        )
