"""What main_test.py runs: loads a checkpoint, generates the test split's reports, scores them, writes the results."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.config import TRAIN_ONLY
from modules.flags import flags_in_effect, resolve_config
from modules.run.build import StoredWeights, build_objective, build_tester, load_weights, prepare_device, with_precision
from modules.run.data import (
    build_dataset,
    build_split_loader,
    cache_features,
    check_images,
    read_data,
    training_studies,
)
from modules.run.loading import load_trained
from modules.run.results import test_and_write
from modules.run.resuming import own_settings, require_same_network
from modules.run.scoring import Scoring
from modules.run.vocabulary import tokenizer_from_state
from modules.runtime.distributed import is_main_process
from modules.runtime.errors import InputError
from modules.runtime.input_files import read_json
from modules.runtime.memory import explain_out_of_memory
from modules.runtime.records import private_folder
from modules.runtime.run_log import log_to, start_log
from modules.training.checkpoint import FORMAT


def run_testing(given: Mapping[str, Any], ignored: Sequence[str]) -> None:
    """Test the checkpoint ``given["load"]``, as the other flags say.

    This project's checkpoints hold settings and vocabulary; a published one needs the flags it was trained with.
    """
    with explain_out_of_memory(
        "lower --eval_batch_size, --beam_size or --num_workers, or use --precision bfloat16 or float16"
    ):
        _test(given, ignored)


def _test(given: Mapping[str, Any], ignored: Sequence[str]) -> None:
    path = given["load"]
    content, weights = load_trained(path)
    ours = content.get("format") == FORMAT
    if weights != Path(path) and "save_dir" not in given:
        raise InputError(f"--save_dir is missing: name a folder for the results of {path}, which is not one of a run")
    settings = own_settings(content, path) if ours else None
    if settings is not None:
        require_same_network(given, content["config"], path)
    else:
        given = {"suppress_unk": False, **given}  # published figures were made with <unk>
    # Results say how the model was trained, not what its test was told of training.
    tested = resolve_config({name: value for name, value in given.items() if name not in TRAIN_ONLY}, settings)
    given, idle = flags_in_effect(given, tested, testing=True, loaded=True, own_vocabulary=ours)
    config = resolve_config(given, settings)
    log = start_log()
    for line in (*ignored, *idle):
        log.info("%s", line)
    device = prepare_device(config)
    config = with_precision(config, device)
    tokenizer = tokenizer_from_state(content["vocabulary"]) if ours else None
    data = read_data(config, tokenizer=tokenizer, trained_with=content.get("strategy", "unknown"))
    check_images(config, data, ("test", "train") if config.floors else ("test",))
    of = StoredWeights(content["state_dict"], path) if ours else None
    objective = build_objective(config, data, device, pretrained=False, of=of)
    load_weights(objective, content["state_dict"], path)
    cache_features(config, data, objective.backbone.visual_extractor, device)
    dataset = build_dataset(config, data, "test", augment=False, extractor=objective.backbone.visual_extractor)
    loader = build_split_loader(config, dataset, device, shuffle=False)
    with (
        contextlib.closing(loader),
        training_studies(config, data, objective.backbone.visual_extractor, device) as guide,
        Scoring(config, device, (dataset,)) if is_main_process() else contextlib.nullcontext() as scoring,
    ):
        tester = build_tester(config, data.tokenizer, objective, device, scoring and scoring.validation, guide)
        # Folders are made once all that was given has been read: a mistake leaves none.
        folder = private_folder(config.save_dir)
        private_folder(config.record_dir)  # fail now, not after the reports were generated
        log_to(folder / "test.log")
        test_and_write(
            config,
            data,
            objective,
            device,
            tester=tester,
            loader=loader,
            scoring=scoring,
            folder=folder,
            weights=weights,
            history=_history(content, Path(path).parent) if ours else [],
            best_epoch=int(content.get("epoch") or 0),
        )


def _history(content: Mapping[str, Any], folder: Path) -> list[dict]:
    """The epochs up to the checkpoint, and those after it if the run's history.json is still next to it."""
    try:
        rows = read_json(folder / "history.json")
    except (OSError, ValueError):
        rows = []
    known = list(content["history"])
    return rows if isinstance(rows, list) and rows[: len(known)] == known else known
