"""The checkpoint that a training resumes or starts from: finding it, checking it, restoring it."""

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models import MODELS
from models.settings import declared_settings
from modules.config import EXPORTED, NO_EFFECT_ON_RESULTS, REMOTE, TRAIN_ONLY, Config, settings_of, settings_with
from modules.data.tokenizers import Tokenizer
from modules.decoding.options import DecodingOptions
from modules.evaluation.metric_table import NLL
from modules.flags import resolve_config
from modules.ithn.objective import Objective
from modules.run.data import Data
from modules.run.vocabulary import AnyTokenizer, tokenizer_from_state
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.training.checkpoint import FORMAT, TESTED, load_checkpoint, require_entries, require_resumable
from modules.training.checkpoint_folder import BEST, CheckpointFolder
from modules.training.optimizers import PlateauOnAny, learning_rate_factor, scale_learning_rates
from modules.training.trainer import Best, Trainer

logger = logging.getLogger("ithn")

# Flags that a resumed run cannot change: stored weights, optimiser, schedule and model selection decide them.
KEPT = (
    "optim",
    "lr_ve",
    "lr_ed",
    "weight_decay",
    "adam_betas",
    "adam_eps",
    "amsgrad",
    "lr_scheduler",
    "step_size",
    "gamma",
    "scale_lr",
    "monitor_metric",
    "monitor_mode",
    "contrastive_features",
    "image_feature",
    "feature_grid",
    "freeze_visual_extractor",
    "unfreeze",
    "freeze_decoder",
    "lora_rank",
    "lora_targets",
    "lora_alpha",
    "self_critical",
    *sorted(settings_with("shapes")),
)
FORGOTTEN = "its samples' negatives of the epoch before (--previous_epoch_start, mochi_queue's queue) are forgotten"
# Flags on which a validation score depends, and so the best one so far; not where files lie, nor what is drawn.
JUDGED_BY = EXPORTED - TRAIN_ONLY - NO_EFFECT_ON_RESULTS - REMOTE - {"detection_features", "seed"} | {"eval_batches"}
# Flags that decide which samples remain in a partly trained epoch.
KEPT_WITHIN_AN_EPOCH = ("seed", "views", "drop_last", "length_bucketing", "report_sections", "captions")


@dataclass
class Source:
    """A checkpoint that training resumes from (--resume)."""

    path: Path
    content: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Its flags; the results folder may have been moved, so results go where the checkpoint lies."""
        return self.content["config"] | {"save_dir": str(self.path.parent), "resume": "", "load": ""}

    @property
    def tokenizer(self) -> AnyTokenizer | None:
        """Its pieces of words, whose files may be gone; None for words, which the annotation gives again."""
        found = own_tokenizer(self.content, str(self.path))
        return None if isinstance(found, Tokenizer) else found


def find_source(resume: str, folder: CheckpointFolder) -> Source | None:
    """What --resume names; for ``auto`` the latest valid checkpoint of ``folder``, None where there is none."""
    if resume == "auto":
        found = folder.newest_valid()
        return found and Source(*found)
    content = load_checkpoint(resume)
    require_resumable(content, resume)
    return Source(Path(resume), content)


@dataclass
class Start:
    """A checkpoint whose weights a new run starts from (--load); this project's have settings and vocabulary too."""

    path: str
    content: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        """Whether this project wrote it."""
        return self.content.get("format") == FORMAT

    @property
    def settings(self) -> dict[str, Any]:
        """Its flags, which those given override; none in a published checkpoint."""
        return own_settings(self.content, self.path) if self.is_ours else {}

    @property
    def tokenizer(self) -> AnyTokenizer | None:
        """Its vocabulary; None in a published checkpoint."""
        return own_tokenizer(self.content, self.path) if self.is_ours else None


def find_start(given: Mapping[str, Any], folder: CheckpointFolder) -> Start:
    """What --load names; InputError where the new run would be written over it."""
    path = given["load"]
    start = Start(path, load_checkpoint(path))
    if "save_dir" not in given or Path(os.path.realpath(path)).parent == Path(os.path.realpath(folder.path)):
        raise InputError(f"--load {path}: needs --save_dir, a new folder for the run that starts from it")
    return start


def own_settings(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The flags in this project's checkpoint, for a test of it; InputError where it was edited by hand."""
    require_entries(content, path, TESTED)
    tokenizer = own_tokenizer(content, path)
    if content.get("vocabulary_sha256", tokenizer.sha256) != tokenizer.sha256:
        raise InputError(
            f"checkpoint {path}: its vocabulary was changed since it was written, so its words would be "
            "wrong; take another copy"
        )
    return content["config"] | {"save_dir": str(Path(path).parent), "resume": ""}


def require_same_network(given: Mapping[str, Any], saved: Mapping[str, Any], path: str) -> None:
    """InputError for a flag ``given`` that asks for another network than that of a checkpoint's ``saved`` settings."""
    model = saved.get("model_name")
    sizes = dataclasses.fields(declared_settings(model)) if model in MODELS else ()
    named = [
        "model_name",
        *([] if saved.get("detection_features") else ["visual_extractor"]),
        *(item.name for item in sizes if item.metadata.get("shapes")),
    ]
    if any(str(part.get("unfreeze", "")).startswith("lora:") for part in (given, saved)):  # more weights
        named.append("unfreeze")
    named.append("lora_alpha")  # changes no shape, but what the adapters add
    for name in named:
        if name in given and given[name] != saved.get(name, given[name]):
            held = {key: saved.get(key) for key in ("model_name", "d_model", name)}
            raise InputError(
                f"--{name} {given[name]}: contradicts checkpoint {path}, which holds "
                + ", ".join(f"{key} {value}" for key, value in held.items())
                + "; leave the flag out, the checkpoint has its own settings"
            )


def own_tokenizer(content: Mapping[str, Any], path: str) -> AnyTokenizer:
    """The vocabulary in this project's checkpoint; InputError where it is malformed."""
    try:
        return tokenizer_from_state(content["vocabulary"])
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error


def restore_extractor(objective: Objective, source: Source) -> None:
    """Restore the visual extractor's weights first: features are cached with them."""
    prefix = "backbone.visual_extractor."
    try:
        weights = {
            name.removeprefix(prefix): value
            for name, value in source.content["objective"].items()
            if name.startswith(prefix)
        }
        objective.backbone.visual_extractor.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _misfit(source.path, error) from error


def _misfit(path: Path, error: Exception) -> InputError:
    return InputError(f"--resume {path}: it does not fit the flags: {' '.join(str(error).split())[:300]}")


def require_same_start(source: Source, config: Config, data: Data) -> None:
    """InputError for a changed flag that the checkpoint would overrule, or words that the annotation does not give."""
    _require_unchanged(config, resolve_config({}, source.content["config"], note=False), KEPT, source.path)
    if source.content["vocabulary"] != data.tokenizer.state():
        raise InputError(
            f"--resume {source.path}: it was trained with another vocabulary than {config.ann_path} "
            f"gives with --threshold {config.threshold}; use the annotation it was trained on"
        )


def restore(trainer: Trainer, objective: Objective, source: Source, config: Config, data: Data) -> None:
    """Restore everything that the checkpoint holds; InputError where it does not fit the flags or the data."""
    path, content = source.path, source.content
    state = dict(content)
    try:
        _require_alike(trainer.state_dict(), state, ("scheduler", "scaler", "position", "best", "guard"))
        state["position"] = _position(config, source, data, trainer.loader.batch_sampler.shards_sha256)
        trainer.load_weights(content["objective"])
        # Samples are known by their numbers in the annotation.
        if content["annotation_sha256"] != data.annotation.sha256 and objective.forget_samples():
            logger.warning("%s is not the annotation that %s began with: %s", config.ann_path, path, FORGOTTEN)
        trainer.load_state_dict(state)
        _require_shapes(trainer)
        now, then = (
            learning_rate_factor(config.scale_lr, count)
            for count in (distributed.world_size(), content.get("processes", 1))
        )
        if now != then:
            scale_learning_rates(trainer.optimizer, trainer.scheduler, now / then)
        _judge_alike(trainer, config, resolve_config({}, content["config"], note=False))
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _misfit(path, error) from error


def _require_unchanged(config: Config, began: Config, names: tuple[str, ...], path: Path) -> None:
    """InputError for a changed flag that the checkpoint's stored state would overrule."""
    # The cosine is laid out over all epochs.
    for name in names + (("epochs",) if config.lr_scheduler == "CosineAnnealingLR" else ()):
        now, then = getattr(config, name), getattr(began, name)
        if now != then:
            why = " (the cosine schedule spans all epochs)" if name == "epochs" else ""
            raise InputError(
                f"--{name} {now}: the run of --resume {path} began with {then} and must continue "
                f"with it{why}; leave the flag out, or start a new run with --load"
            )


def _judge_alike(trainer: Trainer, config: Config, began: Config) -> None:
    """Forget the best score so far where the next ones are made in another way, and warn of it."""
    names = JUDGED_BY
    if config.monitor_metric == NLL.name:  # no report is decoded for it
        names = names - settings_of(DecodingOptions) | {"max_seq_length"}
    changed = [name for name in sorted(names) if getattr(config, name) != getattr(began, name)]
    if changed and trainer.best.epoch and not trainer.has_ended:
        logger.warning(
            "%s: validation scores before and after cannot be compared, so later epochs choose a new best model in "
            "place of epoch %d's",
            ", ".join(f"--{name} was {getattr(began, name)}, is {getattr(config, name)}" for name in changed),
            trainer.best.epoch,
        )
        trainer.best = Best()
        if isinstance(trainer.scheduler, PlateauOnAny):
            trainer.scheduler.best = {}


def _position(config: Config, source: Source, data: Data, shards_sha256: str | None) -> dict[str, Any]:
    """Where to continue; in a partly trained epoch, after the samples that were seen.

    Batch size and number of processes may have changed where the order does not depend on them.
    """
    position = dict(source.content["position"])
    if position["trained"] or not position["batches"]:
        return position
    began = resolve_config({}, source.content["config"], note=False)
    _require_unchanged(config, began, KEPT_WITHIN_AN_EPOCH, source.path)
    if source.content["annotation_sha256"] != data.annotation.sha256:
        raise InputError(
            f"--resume {source.path}: it is from the middle of epoch {position['epoch']} of another "
            f"annotation than {config.ann_path}; use the one it began with"
        )
    if source.content.get("shards_sha256") != shards_sha256:
        raise InputError(
            f"--shards {config.shards!r}: --resume {source.path} is from the middle of epoch "
            f"{position['epoch']}, which began with other shards or without; give those it began with"
        )
    if config.shards:  # batches come round-robin from the shards that are open
        _require_unchanged(config, began, ("batch_size",), source.path)
    if config.length_bucketing:  # which sorts by the lengths that are left
        _require_unchanged(config, began, ("max_seq_length",), source.path)
    # Batches of similar length are composed for all processes together.
    together = config.batch_size * distributed.world_size()
    then = began.batch_size * source.content.get("processes", 1)
    if config.length_bucketing and together != then:
        raise InputError(
            f"--length_bucketing true: --resume {source.path} is from the middle of epoch "
            f"{position['epoch']}, whose batches have {then} samples in all processes together, not "
            f"{together}; choose --batch_size or --n_gpu so that they do"
        )
    return position | {"batches": position["samples"] // together}


def _require_alike(fresh: Mapping[str, Any], saved: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """ValueError where an entry of the fresh states is missing in ``saved`` or has another type."""
    for name in names:
        for key, value in fresh[name].items():
            # What torch keeps for itself differs from version to version.
            if key not in saved[name] and not key.startswith("_"):
                raise ValueError(f"{name} has no {key!r}")
            found = saved[name].get(key, value)
            if value is not None and _kind(value) is not _kind(found):
                raise ValueError(f"{name}[{key!r}] is a {type(found).__name__}")
    if any(value < 0 for value in saved["position"].values()) or not _is_score(saved["best"]["score"]):
        raise ValueError("its position or best score is not a valid number")


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _require_shapes(trainer: Trainer) -> None:
    for parameter, kept in trainer.optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's {name} has shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}"
                )


def _best_of(path: Path) -> tuple[int, float] | None:
    """Epoch and score of the best model that ``path`` knows, in the main process; None where it cannot be read."""
    if not distributed.is_main_process():
        return None
    try:
        best = load_checkpoint(path)["best"]
        return best["epoch"], best["score"]
    except (InputError, KeyError, TypeError):
        return None


def bring_best(trainer: Trainer, source: Source, folder: CheckpointFolder) -> None:
    """Copy the best model so far into ``folder``: a run resumed elsewhere may never find a better one."""
    best, position = trainer.best, source.content["position"]
    if not best.epoch:
        return
    just_judged = best.epoch == position["epoch"] - 1 and not position["batches"] and not position["trained"]
    found = source.path if just_judged else source.path.with_name(BEST)
    problem = f"no {BEST} is" if not found.is_file() else None
    if (
        problem is None
        and not just_judged
        and distributed.broadcast_object(_best_of(found)) != (best.epoch, best.score)
    ):
        problem = f"the {BEST} is of another epoch than {best.epoch} or damaged"
    if problem is not None:
        logger.warning("%s next to the checkpoint of --resume: later epochs choose a new best model", problem)
        trainer.best = Best()
    elif distributed.is_main_process() and not ((folder.path / BEST).is_file() and found.samefile(folder.path / BEST)):
        folder.keep_as_best(found)
