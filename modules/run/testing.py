"""What main_test.py runs: loads a checkpoint, generates the test split's reports, scores them, writes the results."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.config import TRAIN_ONLY
from modules.data.bpe_tokenizer import tokenizer_from_state
from modules.flags import idle_in_tests, resolve_config
from modules.run.build import build_objective, build_tester, load_weights, prepare_device, with_precision
from modules.run.data import build_dataset, build_split_loader, cache_features, read_data, training_studies
from modules.run.results import test_and_write
from modules.run.resuming import own_settings, require_same_network
from modules.run.scoring import Scoring
from modules.runtime.distributed import is_main_process
from modules.runtime.records import private_folder
from modules.runtime.run_log import start_log
from modules.runtime.shortages import explain_out_of_memory
from modules.training.checkpoint import FORMAT, load_checkpoint


def run_testing(given: Mapping[str, Any], ignored: Sequence[str]) -> None:
    """Test the checkpoint ``given["load"]``: ours brings settings and vocabulary, a published one needs the flags."""
    with explain_out_of_memory(
        "lower --batch_size, --beam_size or --num_workers, or use --precision bfloat16 or float16"
    ):
        _test(given, ignored)


def _test(given: Mapping[str, Any], ignored: Sequence[str]) -> None:
    path = given["load"]
    content = load_checkpoint(path)
    ours = content.get("format") == FORMAT
    notes, settings = [*ignored, idle_in_tests(given)], own_settings(content, path) if ours else None
    if ours:
        require_same_network(given, content["config"], path)
        # The results say how the model was trained, not what its test was told of training.
        given = {name: value for name, value in given.items() if name not in TRAIN_ONLY}
    else:
        given = {"suppress_unk": False, **given}  # published figures were made with <unk>
    config = resolve_config(given, settings)
    folder = private_folder(config.save_dir)
    private_folder(config.record_dir)  # rather now than after hours of work
    log = start_log(folder / "test.log")
    for line in filter(None, notes):
        log.info("%s", line)
    device = prepare_device(config)
    config = with_precision(config, device)
    tokenizer = tokenizer_from_state(content["vocabulary"]) if ours else None
    data = read_data(config, tokenizer=tokenizer, trained_with=content.get("strategy", "unknown"))
    objective = build_objective(config, data, device, pretrained=False)
    load_weights(objective, content["state_dict"], path)
    cache_features(config, data, objective.backbone.visual_extractor, device)
    dataset = build_dataset(config, data, "test", augment=False, extractor=objective.backbone.visual_extractor)
    if config.on_bad_image == "stop" and is_main_process():
        dataset.check_files(dataset.read_image)
    loader = build_split_loader(config, dataset, device, shuffle=False)
    history = _history(content, Path(path).parent) if ours else []
    with (
        contextlib.closing(loader),
        training_studies(config, data, objective.backbone.visual_extractor, device) as guide,
        Scoring(config, device, (dataset,)) if is_main_process() else contextlib.nullcontext() as scoring,
    ):
        tester = build_tester(config, data.tokenizer, objective, device, scoring and scoring.validation, guide)
        test_and_write(
            config,
            data,
            objective,
            device,
            tester=tester,
            loader=loader,
            scoring=scoring,
            folder=folder,
            weights=Path(path),
            history=history,
            best_epoch=int(content.get("epoch") or 0),
        )


def _history(content: Mapping[str, Any], folder: Path) -> list[dict]:
    """The epochs up to the checkpoint, and those after it where the run's history.json still lies beside it."""
    try:
        rows = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = []
    known = list(content["history"])
    return rows if isinstance(rows, list) and rows[: len(known)] == known else known
