"""What main_train.py runs: composes data, objective, optimiser, trainer and tester; trains; tests the best model."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modules.checkpoint import (
    BEST,
    CURRENT,
    keep_as_best,
    load_checkpoint,
    require_resumable,
    restore_rng_state,
    rng_state,
    save_checkpoint,
)
from modules.config import Config
from modules.environment import provenance
from modules.errors import InputError
from modules.flags import resolve_config
from modules.objective import Objective
from modules.optimizers import build_optimizer, build_scheduler
from modules.plots import training_curves
from modules.progress import Bar
from modules.records import private_folder, write_private, write_results
from modules.run_log import start_log
from modules.score_names import tagged
from modules.tester import Tester
from modules.tokenizers import Tokenizer, clean_report
from modules.trainer import Best, Trainer
from scripts import compose
from scripts.results import test_and_write
from scripts.scoring import Scoring

# Flags that the kept states of optimiser, schedule and model selection decide when a run goes on.
KEPT = ("optim", "lr_ve", "lr_ed", "weight_decay", "adam_betas", "adam_eps", "amsgrad", "lr_scheduler", "step_size",
        "gamma", "monitor_metric", "monitor_mode")


def run_training(given: Mapping[str, Any], ignored: Sequence[str]) -> None:
    """Train as the flags ``given`` say, or go on from --resume with its settings beneath them; then test."""
    resumed = load_checkpoint(given["resume"]) if given.get("resume") else None
    if resumed is not None:
        require_resumable(resumed, given["resume"])
    config = resolve_config(given, saved=resumed and resumed["config"])
    folder = private_folder(config.save_dir)
    private_folder(config.record_dir)  # rather now than after hours of work
    log = start_log(folder / "train.log")
    for line in ignored:
        log.info("%s", line)
    device = compose.prepare_device(config)
    data = compose.read_data(config)
    objective = compose.build_objective(config, data, device, pretrained=resumed is None)
    compose.cache_features(config, data, objective.backbone.visual_extractor, device)
    datasets = _datasets(config, data, objective)
    log.info("%s on %s: %d training, %d validation and %d test samples, vocabulary %d, %s",
             config.model_name, device, *map(len, datasets.values()), data.tokenizer.vocab_size,
             "no ITHN" if data.strategy == "off" else f"ITHN ({config.ithn_variant}), strategy {data.strategy}")
    loaders = {split: compose.build_split_loader(config, dataset, device, shuffle=split == "train")
               for split, dataset in datasets.items()}
    with Scoring(config, device) as scoring:
        tester = build_tester(config, data.tokenizer, objective, device, scoring)
        trainer = _trainer(config, data, objective, device, loaders, tester, folder)
        if resumed is not None:
            _restore(trainer, objective, resumed, config, data.tokenizer)
            _bring_best(trainer, Path(config.resume), folder)
            log.info("resumed after epoch %d", trainer.first_epoch - 1)
        trainer.train()
        if not trainer.best.epoch:
            log.warning("no epoch had a validation %s to choose a best model by: the test split was left alone",
                        config.monitor_metric)
            return
        best = folder / BEST
        compose.load_weights(objective, load_checkpoint(best)["state_dict"], str(best))
        test_and_write(config, data, objective, device, tester=tester, loader=loaders["test"], scoring=scoring,
                       folder=folder, history=trainer.history, best_epoch=trainer.best.epoch)


def _datasets(config: Config, data: compose.Data, objective: Objective) -> dict[str, Any]:
    extractor = objective.backbone.visual_extractor
    negatives = data.strategy not in ("off", "contrastive")
    datasets = {split: compose.build_dataset(config, data, split, augment=split == "train", extractor=extractor,
                                             negatives=negatives and split == "train")
                for split in ("train", "val", "test")}
    if config.on_bad_image == "stop":
        for dataset in datasets.values():
            dataset.check_files(dataset.read_image)
    return datasets


def build_tester(config: Config, tokenizer: Tokenizer, objective: Objective, device: torch.device,
                 scoring: Scoring) -> Tester:
    return Tester(
        objective,
        tokenizer=tokenizer,
        decoding=compose.decoding_options(config),
        device=device,
        precision=config.precision,
        clean=lambda report: clean_report(report, tokenizer.cleaner),
        score=lambda references, _, generated: scoring.validation(references, generated),
        progress=Bar,
        score_tag=compose.score_tag(config),
    )


def _trainer(config: Config, data: compose.Data, objective: Objective, device: torch.device,
             loaders: Mapping[str, Any], tester: Tester, folder: Path) -> Trainer:
    optimizer = build_optimizer(
        objective, optim=config.optim, lr_ve=config.lr_ve, lr_ed=config.lr_ed, weight_decay=config.weight_decay,
        adam_betas=config.adam_betas, adam_eps=config.adam_eps, amsgrad=config.amsgrad)
    scheduler = build_scheduler(
        optimizer, lr_scheduler=config.lr_scheduler, step_size=config.step_size, gamma=config.gamma,
        plateau_patience=config.plateau_patience, epochs=config.epochs,
        plateau_metrics=tuple(tagged(name, compose.score_tag(config)) for name in ("BLEU_3", "BLEU_4")))
    if config.compile:
        objective.compile()
    return Trainer(
        objective,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loaders["train"],
        validate=lambda epoch: tester.evaluate(loaders["val"], f"validation {epoch}")[0],
        save=_saver(config, data, device, folder),
        on_epoch=_epoch_writer(config, folder),
        progress=Bar,
        device=device,
        precision=config.precision,
        epochs=config.epochs,
        early_stop=config.early_stop,
        monitor_metric=tagged(config.monitor_metric, compose.score_tag(config)),
        monitor_mode="min" if config.monitor_metric == "nll" else config.monitor_mode,
        save_period=config.save_period,
        log_period=config.log_period,
        start_eval_epoch=config.start_eval_epoch,
        grad_accumulation=config.grad_accumulation,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
    )


def _saver(config: Config, data: compose.Data, device: torch.device,
           folder: Path) -> Callable[[Trainer, int, bool], None]:
    """Writes everything that a resume or a test needs; ``model_best.pth`` is the checkpoint of the best epoch."""
    made_by = provenance(str(device))

    def save(trainer: Trainer, epoch: int, improved: bool) -> None:
        save_checkpoint(folder / CURRENT, {
            "epoch": epoch,
            "state_dict": trainer.objective.published_state_dict(),
            # The same tensors under our names and whatever else the objective remembers; shared storage is saved once.
            "objective": trainer.objective.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "rng": rng_state(),
            "history": trainer.history,
            "best": dataclasses.asdict(trainer.best),
            "monitor_best": trainer.best.score,
            "config": dataclasses.asdict(config),
            "vocabulary": data.tokenizer.state(),
            "strategy": data.trained_with,
            "provenance": made_by,
        })
        if improved:
            keep_as_best(folder / CURRENT, folder / BEST)

    return save


def _epoch_writer(config: Config, folder: Path) -> Callable[[list[dict]], None]:
    """Brings history.json, curves.png and the TensorBoard files up to date."""
    writer = None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(private_folder(folder / "tensorboard")))

    def write(history: list[dict]) -> None:
        write_results(folder / "history.json", history)
        write_private(folder / "curves.png", training_curves(history))
        if writer is not None:
            row = history[-1]
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            writer.flush()

    return write


def _restore(trainer: Trainer, objective: Objective, content: Mapping[str, Any], config: Config,
             tokenizer: Tokenizer) -> None:
    """Put everything back as the checkpoint has it; training goes on with the epoch after it."""
    _require_unchanged(config, resolve_config({}, content["config"]))
    if content["vocabulary"] != tokenizer.state():
        raise InputError(f"--resume {config.resume}: it was trained with another vocabulary than {config.ann_path} "
                         f"gives with --threshold {config.threshold}; use the annotation it was trained on")
    try:
        objective.load_state_dict(content["objective"])
        trainer.optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--resume {config.resume}: it does not fit the flags: {' '.join(str(error).split())[:300]}"
                         ) from error
    trainer.scheduler.load_state_dict(content["scheduler"])
    trainer.scaler.load_state_dict(content["scaler"])
    trainer.history = list(content["history"])
    trainer.best = Best(**content["best"])
    trainer.first_epoch = content["epoch"] + 1
    restore_rng_state(content["rng"])


def _require_unchanged(config: Config, began: Config) -> None:
    """InputError for a flag that was changed for a resume, but would be overruled by what the checkpoint kept."""
    # The cosine is laid out over all epochs.
    for name in KEPT + (("epochs",) if config.lr_scheduler == "CosineAnnealingLR" else ()):
        now, then = getattr(config, name), getattr(began, name)
        if now != then:
            raise InputError(f"--{name} {now}: the run of --resume {config.resume} began with {then} and must go on "
                             "with it; leave the flag out, or start a new run")


def _bring_best(trainer: Trainer, resumed: Path, folder: Path) -> None:
    """Have the best model so far in ``folder``: a run that goes on elsewhere may never find a better one."""
    if not trainer.best.epoch:
        return
    source = resumed if trainer.best.epoch == trainer.first_epoch - 1 else resumed.with_name(BEST)
    if not source.is_file():
        logging.getLogger("ithn").warning("no %s beside --resume: epochs to come choose the best model anew", BEST)
        trainer.best = Best()
    elif source.resolve() != (folder / BEST).resolve():
        keep_as_best(source, folder / BEST)
