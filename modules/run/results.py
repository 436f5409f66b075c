"""Tests a model and the training-free baselines, and writes everything that a run leaves for reading."""

import csv
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models import backbone_class, settings_class
from modules.config import NO_EFFECT_ON_RESULTS, OLDER_VALUES, Config
from modules.data.tokenizers import clean_report
from modules.evaluation.metric_table import SELECTION
from modules.evaluation.report_statistics import save_statistics
from modules.evaluation.system_scorer import RULE
from modules.evaluation.tester import Tester
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.pages.exports import write_caption_exports, write_exports, write_labelled
from modules.run.data import Data
from modules.run.results_page import write_page
from modules.run.scoring import Scoring
from modules.run.tested import MODEL, Tested
from modules.run.training_free import training_free_reports
from modules.runtime.environment import file_sha256, provenance
from modules.runtime.input_files import read_json
from modules.runtime.records import append_record, write_report_tables, write_results
from modules.runtime.settings import part_of
from modules.training.checkpoint_folder import TEST_FILES, set_aside

logger = logging.getLogger("ithn")


def test_and_write(
    config: Config,
    data: Data,
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
    """Generate and score the test split, score the baselines too, and write the results into ``folder``.

    ``weights`` is the checkpoint that ``objective`` was read from. All processes generate and look at images; the main
    one, which has the ``scoring``, does the rest.
    """
    found = tester.predict(loader, "test")
    baselines = training_free_reports(config, data, objective, device, found)
    if found is None:
        return
    reports = {MODEL: found.generated} | baselines
    tested = Tested(
        config=config,
        data=data,
        found=found,
        reports=reports,
        scored=scoring.test(found, reports, {MODEL: tester.score_tag}, _training_reports(data), data.tokenizer.sha256),
        tag=tester.score_tag,
        history=history,
        best_epoch=best_epoch,
        tokenisation=scoring.tokenisation,
        provenance=_provenance(config, data, device, weights),
        captions=[scoring.captions(sample) for sample in found.ids] if config.captioning else None,
    )
    _log(tested)
    _keep_others(folder, config, tested.provenance["checkpoint_sha256"])
    _write_files(folder, tested)
    write_page(folder / "report.html", tested, loader.dataset)
    # The last one: where it is, the test counts as done.
    write_results(folder / "results.json", tested.as_json())
    try:
        _append_record(tested)
    except (OSError, ValueError, csv.Error) as error:
        logger.warning("--record_dir %s: this run is not recorded there: %s", config.record_dir, error)
    logger.info("results in %s: report.html, results.json, res.csv, gts.csv, statistics.npz, exports/", folder)


def _training_reports(data: Data) -> frozenset[str]:
    """The cleaned reports of the training split."""
    return frozenset(clean_report(study.report, data.tokenizer.cleaner) for study in data.annotation.splits["train"])


def _provenance(config: Config, data: Data, device: torch.device, weights: Path) -> dict[str, Any]:
    """Versions, machine, and digests of everything that the test was made from."""
    return provenance(str(device)) | {
        "annotation_sha256": data.annotation.sha256,
        "vocabulary_sha256": data.tokenizer.sha256,
        "files_sha256": input_files(config),
        "negative_index_sha256": file_sha256(config.negative_index),
        "checkpoint_sha256": file_sha256(weights),
        # Of a training that started from another checkpoint; a test loads the one above.
        "started_from_sha256": file_sha256(config.load) if Path(config.load) != weights else "",
        "seed": config.seed,
        "data_licence": config.data_licence,
    }


def input_files(config: Config) -> dict[str, str]:
    """SHA-256 of the files that a training with these settings starts from, by the flags that name them."""
    own = dataclasses.fields(settings_class(config.model_name))
    labelled = backbone_class(config.model_name).needs_labels or part_of(config, ITHNSettings).needs_labels
    paths = {
        "label_path": config.label_path if labelled else "",
        **{item.name: getattr(config, item.name) for item in own if item.metadata.get("file")},
        "visual_extractor_weights": config.visual_extractor_weights,
    }
    return {name: digest for name, path in paths.items() if (digest := file_sha256(path))}


def _keep_others(folder: Path, config: Config, checkpoint_sha256: str) -> None:
    """Results in ``folder`` that other settings or another checkpoint gave are moved, not written over."""
    if not (folder / "results.json").is_file():
        return
    # As JSON gives it back: tuples become lists.
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    try:
        content = read_json(folder / "results.json")
        theirs = OLDER_VALUES | content["config"]
        same = content["provenance"]["checkpoint_sha256"] == checkpoint_sha256 and all(
            theirs[name] == ours[name] for name in ours.keys() - NO_EFFECT_ON_RESULTS
        )
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        logger.info(
            "%s held the results of other settings or another checkpoint: they are now in %s",
            folder,
            set_aside(folder, TEST_FILES),
        )


def _write_files(folder: Path, tested: Tested) -> None:
    """The reports as R2Gen and others read them, and what compares this run with another without scoring it again."""
    found, captions, labels = tested.found, tested.captions, tested.scored.labels.get(RULE)
    write_report_tables(folder, found.generated, captions or found.references)
    if captions:
        write_caption_exports(folder / "exports", found.ids, found.generated, captions)
    else:
        write_exports(folder / "exports", found.ids, found.generated, found.reports)
    if labels:
        write_labelled(folder / "exports", found.generated, found.references, labels[MODEL], labels["references"])
    save_statistics(folder / "statistics.npz", tested.scored.statistics)


def _append_record(tested: Tested) -> None:
    config = tested.config
    about = {
        "exp_name": config.exp_name,
        "model_name": config.model_name,
        "strategy": tested.data.trained_with,
        "ithn_variant": config.ithn_variant,
        "alpha": config.alpha,
        "save_dir": config.save_dir,
    }
    if config.jpeg_draft:  # other pixels than those of other rows
        about["jpeg_draft"] = True
    append_record(
        config.record_dir,
        config.dataset_name,
        epoch=tested.best_epoch,
        seed=config.seed,
        val={name: value for name, value in tested.validation.items() if name != SELECTION},
        test=tested.recorded(),
        extra=about,
    )


def _log(tested: Tested) -> None:
    for line in tested.log_lines():
        logger.info("%s", line)
    for line in tested.warnings:
        logger.warning("%s", line)
    for name, reason in tested.scored.missing.items():
        logger.warning("%s is missing: %s", name, reason)
