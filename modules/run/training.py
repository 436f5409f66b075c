"""What main_train.py runs: composes data, objective, optimiser, trainer and tester; trains; tests the best model."""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modules.config import Config
from modules.data.loaders import LimitedLoader
from modules.evaluation.tester import Tester
from modules.flags import asks_for_ithn, flags_in_effect, idle_without_ithn, resolve_config, stage_settings
from modules.ithn.objective import Objective
from modules.ithn.synthesis import NEEDING_NEGATIVES
from modules.ithn.weights import published_names
from modules.pages.plots import training_curves
from modules.run.build import (
    StoredWeights,
    build_objective,
    build_tester,
    load_weights,
    prepare_device,
    shares_parameters,
    with_precision,
)
from modules.run.data import (
    Data,
    build_dataset,
    build_split_loader,
    cache_features,
    check_images,
    read_data,
    score_tag,
    training_studies,
    views_are_alike,
)
from modules.run.descriptions import with_descriptions
from modules.run.results import test_and_write
from modules.run.resuming import (
    Source,
    Start,
    bring_best,
    find_source,
    find_start,
    require_same_network,
    require_same_start,
    restore,
    restore_extractor,
)
from modules.run.scoring import Scoring
from modules.runtime import distributed
from modules.runtime.distributed import is_main_process
from modules.runtime.environment import provenance
from modules.runtime.errors import InputError
from modules.runtime.kernels import tune
from modules.runtime.memory import explain_out_of_memory, freed_memory_kept
from modules.runtime.records import private_folder, write_private, write_results
from modules.runtime.run_log import log_to, start_log
from modules.runtime.settings import part_of
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.checkpoint import load_checkpoint
from modules.training.checkpoint_folder import BEST, CheckpointFolder
from modules.training.optimizers import learning_rate_factor, learning_rates
from modules.training.settings import LoopSettings, OptimSettings
from modules.training.trainer import Trainer

if TYPE_CHECKING:
    from modules.runtime.sharding import Shards

logger = logging.getLogger("ithn")
NEED_LESS_MEMORY = (
    "lower --batch_size (--grad_accumulation keeps the size of a step), --image_size or --num_workers, "
    "or use --precision bfloat16 or float16; what was saved is intact, continue from it with --resume auto"
)


@dataclass
class Parts:
    """What a training is composed of, before its trainer."""

    config: Config
    asked_precision: str  # config has what it means on this device
    device: torch.device
    data: Data
    objective: Objective
    loaders: dict[str, Any]  # by split
    tester: Tester
    scoring: Scoring | None  # in the main process


def run_training(given: Mapping[str, Any], ignored: Sequence[str], shutdown: GracefulShutdown | None = None) -> None:
    """Train as the flags ``given`` say, continuing from --resume with its settings as defaults; then test.

    Every input is read and checked before anything in --save_dir is touched, with InputError for a mistake. Where
    ``shutdown`` raises Stopped, everything reached so far is saved first.
    """
    shutdown = shutdown or GracefulShutdown()
    folder = CheckpointFolder(Path(_save_dir(given)))
    start_log()
    with contextlib.ExitStack() as opened:
        if is_main_process():
            opened.enter_context(folder.locked())
        if given.get("load") and given.get("resume", "auto") != "auto":
            raise InputError(f"--load {given['load']}: --resume {given['resume']} continues a run; give one of them")
        source = find_source(given["resume"], folder) if given.get("resume") else None
        start = find_start(given, folder) if given.get("load") and not source else None
        for line in ignored:
            logger.info("%s", line)
        config, given = _settings(given, source, start)
        opened.enter_context(explain_out_of_memory(NEED_LESS_MEMORY))
        parts = _compose(config, source, start, folder.path, frozenset(given), opened)
        trainer = _trainer(parts, folder, shutdown)
        if source is not None:
            restore(trainer, parts.objective, source, parts.config, parts.data)
        _log_step_size(parts.config, learning_rates(trainer.optimizer))
        _begin(config, folder, source)
        try:
            if source is not None:
                _log_resumed(trainer, source, folder)
            with freed_memory_kept() if parts.device.type == "cpu" else contextlib.nullcontext():
                trainer.train()
            _test_best(parts, trainer, folder.path)
        except Stopped as stopped:
            logger.info("ended by %s; continue with --resume auto --save_dir %s", stopped.name, folder.path)
            raise


def _save_dir(given: Mapping[str, Any]) -> str:
    """The results folder of a training: --save_dir, or else where the checkpoint of --resume lies."""
    resume = given.get("resume")
    beside = str(Path(resume).parent) if resume and resume != "auto" else Config.save_dir
    return given.get("save_dir", beside)


def _settings(given: Mapping[str, Any], source: Source | None, start: Start | None) -> tuple[Config, Mapping[str, Any]]:
    """The flags ``given`` over the settings of the checkpoint that the run starts from, if any; and those in effect."""
    loaded = source or start
    saved = source.settings if source else stage_settings(given, start.settings if start else {})
    given = with_descriptions(given, saved)
    if start is not None:
        require_same_network(given, start.settings, start.path)
    own_vocabulary = loaded is not None and loaded.tokenizer is not None
    config = resolve_config(given, saved)
    given, idle = flags_in_effect(given, config, loaded=loaded is not None, own_vocabulary=own_vocabulary)
    for line in idle:
        logger.info("%s", line)
    if config.self_critical and loaded is None:
        raise InputError(
            "--self_critical: this stage starts from a model that already writes reports; train with cross entropy "
            "first, then give --load results/RUN/model_best.pth and another --save_dir"
        )
    return resolve_config(given, saved), given


def _begin(config: Config, folder: CheckpointFolder, source: Source | None) -> None:
    """Make room in the folder, now that every input was read, and log what begins."""
    private_folder(config.record_dir)  # fail now, not after hours of training
    resumed_here = source is not None and source.path.parent.resolve() == folder.path.resolve()
    aside = folder.move_aside() if is_main_process() and not resumed_here else None
    if is_main_process():
        folder.sweep()
        log_to(folder.path / "train.log")
    for problem in folder.problems:
        logger.warning("not used: %s", problem)
    if aside is not None:
        logger.info("%s held an earlier run: its files are now in %s", folder.path, aside)
    if source is not None:
        logger.info("resuming from %s", source.path)
    elif config.resume:
        start = config.load or "the beginning"
        logger.info("--resume auto: no checkpoint in %s, training starts from %s", folder.path, start)


def _compose(
    config: Config,
    source: Source | None,
    start: Start | None,
    folder: Path,
    given: frozenset[str],
    opened: contextlib.ExitStack,
) -> Parts:
    """Data, weights, loaders and tester; what must be closed is left to ``opened``.

    ``given`` are the names of the flags that were given.
    """
    device, asked_precision = prepare_device(config), config.precision
    config = with_precision(config, device)
    loaded = source or start
    # A resumed run keeps the strategy that it began with, whatever its command line repeats.
    asked = source is None and asks_for_ithn(given)
    data = read_data(config, tokenizer=loaded and loaded.tokenizer, asked_for_ithn=asked)
    if data.strategy == "off" and (line := idle_without_ithn(given)):
        logger.warning("%s", line)
    check_images(config, data, ("train", "val", "test"))
    # Numbers of images are filled up, but in these two cases: modules/layers/visual_extractor.py.
    differ = (config.sync_bn or config.compile) and not config.freeze_visual_extractor
    tune(not differ or views_are_alike(config, data))
    make: Callable[..., Objective] = Objective
    if config.self_critical:
        from modules.run.self_critical import self_critical_objective

        with distributed.main_process_first():
            make = self_critical_objective(config, data, folder)
    if source is not None:
        require_same_start(source, config, data)
    of = _stored_weights(source, start)
    objective = build_objective(config, data, device, pretrained=loaded is None, make=make, of=of)
    if start is not None:
        load_weights(objective, start.content["state_dict"], start.path)
    if source is not None:
        restore_extractor(objective, source)
    cache_features(config, data, objective.backbone.visual_extractor, device)
    datasets = _datasets(config, data, objective)
    _log_composition(config, device, data, datasets)
    loaders = {}
    for split, dataset in datasets.items():
        loaders[split] = build_split_loader(config, dataset, device, shuffle=split == "train")
        opened.callback(loaders[split].close)
    if not len(loaders["train"]):
        raise InputError(
            f"--batch_size {config.batch_size}: the {len(datasets['train'])} training samples do not fill one batch of "
            f"each of {distributed.world_size()} processes, and --drop_last leaves incomplete ones out; lower it, or "
            "give --drop_last false"
        )
    scoring = None
    if is_main_process():
        scoring = opened.enter_context(Scoring(config, device, (datasets["val"], datasets["test"])))
    guide = opened.enter_context(training_studies(config, data, objective.backbone.visual_extractor, device))
    tester = build_tester(config, data.tokenizer, objective, device, scoring and scoring.validation, guide)
    return Parts(config, asked_precision, device, data, objective, loaders, tester, scoring)


def _stored_weights(source: Source | None, start: Start | None) -> StoredWeights | None:
    """The weights that decide the model's sizes together with settings from the same file; None for published ones."""
    if source is not None:
        return StoredWeights(source.content["state_dict"], str(source.path))
    return StoredWeights(start.content["state_dict"], start.path) if start is not None and start.is_ours else None


def _log_resumed(trainer: Trainer, source: Source, folder: CheckpointFolder) -> None:
    """Bring the best model so far along, and log where training continues."""
    bring_best(trainer, source, folder)
    position = trainer.position
    before = ", before its validation" if position.trained else ""
    logger.info("resumed in epoch %d after %d of its batches%s", position.epoch, position.batches, before)


def _test_best(parts: Parts, trainer: Trainer, folder: Path) -> None:
    """Test the best model and write the results; nothing where no epoch could be judged."""
    if not trainer.best.epoch:
        logger.warning(
            "no epoch had a validation %s to choose a best model by: the test split was left alone",
            parts.config.monitor_metric,
        )
        return
    best = folder / BEST
    if trainer.shards is not None:
        with distributed.main_process_first():  # which has written it
            weights = load_checkpoint(best)["objective"]
        trainer.load_weights(weights)
    else:
        if is_main_process():
            load_weights(parts.objective, load_checkpoint(best)["state_dict"], str(best))
        distributed.broadcast_weights(parts.objective)
    with trainer.whole():
        test_and_write(
            parts.config,
            parts.data,
            parts.objective,
            parts.device,
            tester=parts.tester,
            loader=parts.loaders["test"],
            scoring=parts.scoring,
            folder=folder,
            weights=best,
            history=trainer.history,
            best_epoch=trainer.best.epoch,
        )


def _log_composition(config: Config, device: torch.device, data: Data, datasets: Mapping[str, Any]) -> None:
    """Log what is trained on what."""
    logger.info(
        "%s on %s: %d training, %d validation and %d test samples, vocabulary %d, %s",
        config.model_name,
        device,
        *map(len, datasets.values()),
        data.tokenizer.vocab_size,
        "no ITHN" if data.strategy == "off" else f"ITHN ({config.ithn_variant}), strategy {data.strategy}",
    )


def _log_step_size(config: Config, rates: Mapping[str, float]) -> None:
    """Log what a step of all processes is, and the learning rates that it starts with."""
    count, accumulated = distributed.world_size(), config.grad_accumulation
    parts = [
        f"{config.batch_size} samples",
        *([f"{accumulated} accumulated batches"] if accumulated > 1 else []),
        *([f"{count} processes"] if count > 1 else []),
    ]
    factor = learning_rate_factor(config.scale_lr, count)
    shown = f"learning rate {rates['lr_ed']:g}, visual extractor not trained"
    if "lr_ve" in rates:
        shown = f"learning rates {rates['lr_ve']:g} and {rates['lr_ed']:g}"
    logger.info(
        "a step takes %d samples (%s); precision %s; %s (--scale_lr %s%s)",
        config.batch_size * accumulated * count,
        " x ".join(parts),
        config.precision,
        shown,
        config.scale_lr,
        f": x {factor:.4g}" if factor != 1 else "",
    )


def _datasets(config: Config, data: Data, objective: Objective) -> dict[str, Any]:
    extractor = objective.backbone.visual_extractor
    negatives = data.strategy in NEEDING_NEGATIVES
    return {
        split: build_dataset(
            config, data, split, augment=split == "train", extractor=extractor, negatives=negatives and split == "train"
        )
        for split in ("train", "val", "test")
    }


def _trainer(parts: Parts, folder: CheckpointFolder, shutdown: GracefulShutdown) -> Trainer:
    config = parts.config
    if config.compile:
        parts.objective.compile()
    shards = _shards(parts) if shares_parameters(config) else None
    if config.shard_parameters and shards is None:
        logger.info("no effect here (one process has all parameters): --shard_parameters")
    writes, validated = is_main_process(), parts.loaders["val"]
    if config.eval_batches:
        validated = LimitedLoader(validated, min(config.eval_batches, len(validated)))
    trainer = Trainer(
        parts.objective,
        part_of(config, OptimSettings),
        part_of(config, LoopSettings),
        loader=parts.loaders["train"],
        validate=lambda epoch: parts.tester.evaluate(validated, f"validation {epoch}")[0],
        likelihood=lambda epoch: parts.tester.likelihood(validated, f"validation {epoch}, nll alone"),
        save=_saver(parts, folder) if writes or shards else lambda trainer, improved: None,
        on_epoch=_epoch_writer(folder.path, tensorboard=config.tensorboard) if writes else lambda history: None,
        shutdown=shutdown,
        device=parts.device,
        precision=config.precision,
        seed=config.seed,
        score_tag=score_tag(config),
        cuda_graph=config.cuda_graph,
        shards=shards,
    )
    return trainer


def _shards(parts: Parts) -> "Shards":
    """The objective, shared out over the processes; in half precision blocks are gathered in it."""
    from modules.runtime.sharding import Shards

    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(parts.config.precision, torch.float32)
    return Shards(parts.objective, parts.objective.backbone.blocks(), device=parts.device, dtype=dtype)


def _saver(parts: Parts, folder: CheckpointFolder) -> Callable[[Trainer, bool], None]:
    """Writes everything that a resume or a test needs; ``model_best.pth`` is the checkpoint of the best epoch."""
    config, data = parts.config, parts.data
    made_by = provenance(str(parts.device))
    kept: set[int] = set()  # epochs; files of others may be of a run that this one leaves behind

    def save(trainer: Trainer, improved: bool) -> None:
        if improved and parts.tester.lacks_mean_image:  # judged by its likelihood alone
            with trainer.whole():
                parts.tester.find_mean_image()
        position, weights, state = trainer.position, trainer.weights(), trainer.state_dict()
        epoch = position.epoch if position.trained else position.epoch - 1  # the last that was trained
        if not is_main_process():
            return
        folder.save(
            {
                "epoch": epoch,
                "state_dict": published_names(weights),
                # The same tensors under our names and whatever else the objective remembers; shared storage is saved
                # once.
                "objective": weights,
                **state,
                "monitor_best": trainer.best.score,
                # Another machine chooses for itself what auto means.
                "config": dataclasses.asdict(config) | {"precision": parts.asked_precision},
                "vocabulary": data.tokenizer.state(),
                "vocabulary_sha256": data.tokenizer.sha256,
                "annotation_sha256": data.annotation.sha256,
                "shards_sha256": trainer.loader.batch_sampler.shards_sha256,
                "strategy": data.trained_with,
                "processes": distributed.world_size(),
                # Made by the validation, of weights that a step since would have changed.
                "mean_patches": None if position.steps else trainer.objective.backbone.mean_patches,
                "provenance": made_by,
            },
            best=improved,
        )
        # An epoch that is not validated is saved when the next one begins.
        between = epoch and not position.steps and epoch not in kept
        if config.keep_epochs and (position.trained or between):
            folder.keep_epoch(epoch)
            kept.add(epoch)

    return save


def _epoch_writer(folder: Path, *, tensorboard: bool) -> Callable[[list[dict]], None]:
    """A function of the history that updates history.json, curves.png and, if asked, TensorBoard's files."""
    writer = _tensorboard(folder) if tensorboard else None

    def write(history: list[dict]) -> None:
        write_results(folder / "history.json", history)
        write_private(folder / "curves.png", training_curves(history))
        if writer is not None:
            writer(history[-1])

    return write


def _tensorboard(folder: Path) -> Callable[[Mapping[str, Any]], None]:
    """A function of an epoch's row; its folder is made for the first one, when an earlier run's was moved aside."""
    from torch.utils.tensorboard import SummaryWriter

    # Its thread would print a traceback for a full disk; flush raises the same error here.
    print_it, threading.excepthook = (
        threading.excepthook,
        lambda found: None if isinstance(found.exc_value, OSError) else print_it(found),
    )
    opened: list[Any] = []

    def write(row: Mapping[str, Any]) -> None:
        if not opened:
            opened.append(SummaryWriter(str(private_folder(folder / "tensorboard"))))
        for name, value in row.items():
            if value is not None:
                opened[0].add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        opened[0].flush()

    return write
