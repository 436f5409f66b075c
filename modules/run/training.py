"""What main_train.py runs: composes data, objective, optimiser, trainer and tester; trains; tests the best model."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from modules.config import Config
from modules.data.tokenizers import Tokenizer, clean_report
from modules.evaluation.metric_table import smaller_is_better
from modules.evaluation.score_names import tagged
from modules.evaluation.tester import Tester
from modules.flags import resolve_config, stage_settings
from modules.ithn.objective import Objective
from modules.ithn.synthesis import NEEDING_NEGATIVES
from modules.ithn.weights import published_state
from modules.run import build as compose
from modules.run import initial_weights as starting
from modules.run import resuming
from modules.run.epoch_files import epoch_writer
from modules.run.hard_negatives import asks_for_ithn, idle_line
from modules.run.results import test_and_write
from modules.run.scoring import Scoring
from modules.runtime import distributed
from modules.runtime.distributed import is_main_process
from modules.runtime.environment import provenance
from modules.runtime.records import private_folder
from modules.runtime.run_log import Bar, start_log
from modules.runtime.shortages import explain_out_of_memory
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.checkpoint import load_checkpoint
from modules.training.checkpoint_folder import BEST, CheckpointFolder
from modules.training.optimizers import build_optimizer, build_scheduler, learning_rate_factor
from modules.training.trainer import Trainer

logger = logging.getLogger("ithn")
NEED_LESS_MEMORY = (
    "lower --batch_size (--grad_accumulation keeps the size of a step), --image_size or --num_workers, "
    "or use --precision bfloat16 or float16; what was saved is intact, so --resume auto goes on from "
    "it"
)


def run_training(given: Mapping[str, Any], ignored: Sequence[str], shutdown: GracefulShutdown | None = None) -> None:
    """Train as the flags ``given`` say, or go on from --resume with its settings beneath them; then test.

    Where ``shutdown`` raises Stopped, everything reached so far is saved first.
    """
    shutdown = shutdown or GracefulShutdown()
    folder = CheckpointFolder(private_folder(resuming.save_dir(given)))
    with folder.locked() if is_main_process() else contextlib.nullcontext():
        source = resuming.find_source(given, folder)
        start = None if source else starting.find_start(given, folder)
        config = resolve_config(
            given, source.settings if source else stage_settings(given, start.settings if start else {})
        )
        if start is not None:
            resuming.require_same_network(given, start.settings, start.path)
        starting.require_weights(config, source is not None or start is not None)
        private_folder(config.record_dir)  # rather now than after hours of work
        _begin(given, ignored, folder, source)
        try:
            with explain_out_of_memory(NEED_LESS_MEMORY):
                _train_and_test(config, source, start, folder, shutdown, frozenset(given))
        except Stopped as stopped:
            logger.info("ended by %s; go on with --resume auto --save_dir %s", stopped.name, folder.path)
            raise


def _begin(
    given: Mapping[str, Any], ignored: Sequence[str], folder: CheckpointFolder, source: resuming.Source | None
) -> None:
    """Make room in the folder, and say what begins."""
    goes_on = source is not None and source.path.parent.resolve() == folder.path.resolve()
    aside = folder.move_aside() if is_main_process() and not goes_on else None
    start_log(folder.path / "train.log")
    if is_main_process():
        folder.sweep()
    for line in ignored:
        logger.info("%s", line)
    for problem in folder.problems:
        logger.warning("not used: %s", problem)
    if aside is not None:
        logger.info("%s held an earlier run: its files are now in %s", folder.path, aside)
    if source is not None:
        logger.info("going on from %s", source.path)
    elif given.get("resume"):
        logger.info(
            "--resume auto: no checkpoint in %s, training starts from %s",
            folder.path,
            given.get("load") or "the beginning",
        )


def _train_and_test(
    config: Config,
    source: resuming.Source | None,
    start: starting.Start | None,
    folder: CheckpointFolder,
    shutdown: GracefulShutdown,
    given: frozenset[str],
) -> None:
    """``given`` are the names of the flags that were given."""
    device = compose.prepare_device(config)
    config = compose.with_precision(config, device)
    brought = source or start
    # A run that goes on keeps what it began as, whatever its command line repeats.
    data = compose.read_data(
        config, tokenizer=brought and brought.tokenizer, asked_for_ithn=source is None and asks_for_ithn(given)
    )
    if data.strategy == "off" and (line := idle_line(given)):
        logger.warning("%s", line)
    objective = compose.build_objective(
        config, data, device, pretrained=brought is None, kind=starting.objective_kind(config)
    )
    if start is not None:
        compose.load_weights(objective, start.content["state_dict"], start.path)
    if source is not None:
        resuming.restore_extractor(objective, source)
    compose.cache_features(config, data, objective.backbone.visual_extractor, device)
    datasets = _datasets(config, data, objective)
    with distributed.main_process_first():
        starting.equip(config, data, objective, datasets["train"], folder.path)
    logger.info(
        "%s on %s: %d training, %d validation and %d test samples, vocabulary %d, %s",
        config.model_name,
        device,
        *map(len, datasets.values()),
        data.tokenizer.vocab_size,
        "no ITHN" if data.strategy == "off" else f"ITHN ({config.ithn_variant}), strategy {data.strategy}",
    )
    _log_batches(config)
    loaders = {
        split: compose.build_split_loader(config, dataset, device, shuffle=split == "train")
        for split, dataset in datasets.items()
    }
    with contextlib.ExitStack() as opened:
        for loader in loaders.values():
            opened.callback(loader.close)
        scoring = (
            opened.enter_context(Scoring(config, device, (datasets["val"], datasets["test"])))
            if is_main_process()
            else None
        )
        guide = opened.enter_context(
            compose.training_studies(config, data, objective.backbone.visual_extractor, device)
        )
        tester = build_tester(config, data.tokenizer, objective, device, scoring, guide)
        trainer = _trainer(config, data, objective, device, loaders, tester, folder, shutdown)
        if source is not None:
            resuming.restore(trainer, objective, source, config, data)
            resuming.bring_best(trainer, source, folder)
            logger.info(
                "resumed in epoch %d after %d of its batches%s",
                trainer.position.epoch,
                trainer.position.batches,
                ", before its validation" if trainer.position.trained else "",
            )
        trainer.train()
        if not trainer.best.epoch:
            logger.warning(
                "no epoch had a validation %s to choose a best model by: the test split was left alone",
                config.monitor_metric,
            )
            return
        best = folder.path / BEST
        if is_main_process():
            compose.load_weights(objective, load_checkpoint(best)["state_dict"], str(best))
        distributed.broadcast_weights(objective)
        test_and_write(
            config,
            data,
            objective,
            device,
            tester=tester,
            loader=loaders["test"],
            scoring=scoring,
            folder=folder.path,
            weights=best,
            history=trainer.history,
            best_epoch=trainer.best.epoch,
        )


def _log_batches(config: Config) -> None:
    """Say what a step of all processes is, and what that does to the learning rates."""
    count, accumulated = distributed.world_size(), config.grad_accumulation
    parts = [
        f"{config.batch_size} samples",
        *([f"{accumulated} accumulated batches"] if accumulated > 1 else []),
        *([f"{count} processes"] if count > 1 else []),
    ]
    factor = learning_rate_factor(config.scale_lr, count)
    logger.info(
        "a step takes %d samples (%s); precision %s; learning rates %g and %g (--scale_lr %s%s)",
        config.batch_size * accumulated * count,
        " x ".join(parts),
        config.precision,
        config.lr_ve * factor,
        config.lr_ed * factor,
        config.scale_lr,
        f": x {factor:.4g}" if factor != 1 else "",
    )


def _datasets(config: Config, data: compose.Data, objective: Objective) -> dict[str, Any]:
    extractor = objective.backbone.visual_extractor
    negatives = data.strategy in NEEDING_NEGATIVES
    datasets = {
        split: compose.build_dataset(
            config, data, split, augment=split == "train", extractor=extractor, negatives=negatives and split == "train"
        )
        for split in ("train", "val", "test")
    }
    if config.on_bad_image == "stop" and is_main_process():
        for dataset in datasets.values():
            dataset.check_files(dataset.read_image)
    return datasets


def build_tester(
    config: Config,
    tokenizer: Tokenizer,
    objective: Objective,
    device: torch.device,
    scoring: Scoring | None,
    training_studies: Iterable | None = None,
) -> Tester:
    """``scoring`` is None in all processes but the first."""
    return Tester(
        objective,
        tokenizer=tokenizer,
        decoding=compose.decoding_options(config),
        device=device,
        precision=config.precision,
        clean=lambda report: clean_report(report, tokenizer.cleaner),
        score=None if scoring is None else scoring.validation,
        progress=Bar,
        score_tag=compose.score_tag(config),
        collapse_repeats=config.collapse_repeats,
        seed=config.seed,
        training_studies=training_studies,
    )


def _trainer(
    config: Config,
    data: compose.Data,
    objective: Objective,
    device: torch.device,
    loaders: Mapping[str, Any],
    tester: Tester,
    folder: CheckpointFolder,
    shutdown: GracefulShutdown,
) -> Trainer:
    factor = learning_rate_factor(config.scale_lr, distributed.world_size())
    optimizer = build_optimizer(
        objective,
        optim=config.optim,
        lr_ve=config.lr_ve * factor,
        lr_ed=config.lr_ed * factor,
        weight_decay=config.weight_decay,
        adam_betas=config.adam_betas,
        adam_eps=config.adam_eps,
        amsgrad=config.amsgrad,
    )
    scheduler = build_scheduler(
        optimizer,
        lr_scheduler=config.lr_scheduler,
        step_size=config.step_size,
        gamma=config.gamma,
        plateau_patience=config.plateau_patience,
        epochs=config.epochs,
        plateau_metrics=tuple(tagged(name, compose.score_tag(config)) for name in ("BLEU_3", "BLEU_4")),
    )
    if config.compile:
        objective.compile()
    return Trainer(
        objective,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loaders["train"],
        validate=lambda epoch: tester.evaluate(loaders["val"], f"validation {epoch}")[0],
        save=_saver(config, data, device, folder) if is_main_process() else lambda trainer, improved: None,
        on_epoch=epoch_writer(folder.path, tensorboard=config.tensorboard)
        if is_main_process()
        else lambda history: None,
        progress=Bar,
        shutdown=shutdown,
        device=device,
        precision=config.precision,
        epochs=config.epochs,
        early_stop=config.early_stop,
        monitor_metric=tagged(config.monitor_metric, compose.score_tag(config)),
        monitor_mode="min" if smaller_is_better(config.monitor_metric) else config.monitor_mode,
        save_period=config.save_period,
        checkpoint_steps=config.checkpoint_steps,
        log_period=config.log_period,
        start_eval_epoch=config.start_eval_epoch,
        grad_accumulation=config.grad_accumulation,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        seed=config.seed,
    )


def _saver(
    config: Config, data: compose.Data, device: torch.device, folder: CheckpointFolder
) -> Callable[[Trainer, bool], None]:
    """Writes everything that a resume or a test needs; ``model_best.pth`` is the checkpoint of the best epoch."""
    made_by = provenance(str(device))

    def save(trainer: Trainer, improved: bool) -> None:
        position = trainer.position
        folder.save(
            {
                "epoch": position.epoch if position.trained else position.epoch - 1,  # the last that was trained
                "state_dict": published_state(trainer.objective),
                # The same tensors under our names and whatever else the objective remembers; shared storage is saved
                # once.
                "objective": trainer.objective.state_dict(),
                **trainer.state_dict(),
                "monitor_best": trainer.best.score,
                "config": dataclasses.asdict(config),
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
        if config.keep_epochs and position.trained:
            folder.keep_epoch(position.epoch)

    return save
