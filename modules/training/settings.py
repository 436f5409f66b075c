"""The settings of training: optimiser and schedule, the loop, the self-critical stage; flags of the same names."""

from dataclasses import dataclass, fields

from modules.evaluation.metric_table import MONITORED, REWARDS, smaller_is_better
from modules.runtime.errors import InputError
from modules.runtime.settings import check_value, setting


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser, learning rates and their schedule."""

    epochs: int = setting(100, "optimisation", "training epochs", low=1)
    optim: str = setting("Adam", "optimisation", "optimiser", choices=("Adam", "AdamW", "RAdam", "SGD"))
    lr_ve: float = setting(5e-5, "optimisation", "learning rate of the visual extractor", low=0.0)
    lr_ed: float = setting(7e-4, "optimisation", "learning rate of everything else", low=0.0)
    weight_decay: float = setting(5e-5, "optimisation", "weight decay", low=0.0)
    adam_betas: tuple[float, float] = setting((0.9, 0.98), "optimisation", "betas of Adam: two values")
    adam_eps: float = setting(1e-9, "optimisation", "epsilon of Adam", low=0.0)
    amsgrad: bool = setting(True, "optimisation", "the AMSGrad variant of Adam")
    lr_scheduler: str = setting(
        "StepLR",
        "optimisation",
        "learning-rate schedule, stepped once per epoch; ReduceLROnPlateau watches validation BLEU-3 and BLEU-4",
        choices=("StepLR", "ReduceLROnPlateau", "CosineAnnealingLR", "constant"),
    )
    step_size: int = setting(50, "optimisation", "epochs between the steps of StepLR", low=1)
    gamma: float = setting(0.1, "optimisation", "factor of StepLR and ReduceLROnPlateau", low=0.0)
    plateau_patience: int = setting(
        1,
        "optimisation",
        "epochs without improvement in BLEU-3 or BLEU-4 after which the next one reduces the rates",
        low=0,
    )
    scale_lr: str = setting(
        "none",
        "optimisation",
        "learning rates for several processes: as given (none), times their number (linear) or its square root (sqrt)",
        choices=("none", "linear", "sqrt"),
    )
    grad_accumulation: int = setting(1, "optimisation", "batches per optimiser step", low=1)
    clip_norm: float = setting(0.0, "optimisation", "clip the gradient's norm; 0 is off", low=0.0)
    clip_value: float = setting(0.0, "optimisation", "clip gradient values; 0 is off (R2Gen: 0.1)", low=0.0)

    def __post_init__(self) -> None:
        for item in fields(OptimSettings):
            check_value(item.name, getattr(self, item.name), item.metadata)
        if not all(0.0 <= beta < 1.0 for beta in self.adam_betas):
            raise InputError(f"--adam_betas {self.adam_betas}: both must be in [0, 1)")

    @property
    def idle_options(self) -> dict[str, tuple[str, ...]]:
        """Settings without effect, by the choice that does not read them."""
        of_schedule = {"StepLR": ("step_size", "gamma"), "ReduceLROnPlateau": ("gamma", "plateau_patience")}
        read = of_schedule.get(self.lr_scheduler, ())
        of_adam = {"SGD": ("adam_betas", "adam_eps", "amsgrad"), "RAdam": ("amsgrad",)}
        return {
            f"--lr_scheduler {self.lr_scheduler}": tuple(
                name for name in ("step_size", "gamma", "plateau_patience") if name not in read
            ),
            f"--optim {self.optim}": of_adam.get(self.optim, ()),
        }


@dataclass(frozen=True)
class LoopSettings:
    """When the training loop validates, logs, saves and stops, and what it chooses the best model by."""

    monitor_metric: str = setting(
        "BLEU_4", "training loop", "validation metric for choosing the best model", choices=MONITORED, train_only=True
    )
    monitor_mode: str = setting(
        "max", "training loop", "whether the metric should grow or fall", choices=("min", "max"), train_only=True
    )
    early_stop: int = setting(
        50, "training loop", "stop after more than this many epochs without improvement", low=1, train_only=True
    )
    start_eval_epoch: int = setting(0, "training loop", "no validation before this epoch", low=0, train_only=True)
    eval_every: int = setting(
        1,
        "training loop",
        "epochs from one validation to the next, with val_nll alone in between; the last epoch always has one, "
        "--early_stop counts those whose --monitor_metric is known",
        low=1,
        train_only=True,
    )
    eval_batches: int = setting(
        0,
        "training loop",
        "validate on so many batches, the first ones, of each process; 0: on all of the split",
        low=0,
        train_only=True,
    )
    save_period: int = setting(
        1,
        "training loop",
        "epochs between checkpoints; the best model is always kept",
        low=1,
        effect=False,
        train_only=True,
    )
    keep_epochs: bool = setting(
        False,
        "training loop",
        "keep the checkpoint of every epoch that is saved (--save_period), as epoch_<n>.pth",
        effect=False,
        train_only=True,
    )
    checkpoint_steps: int = setting(
        0,
        "training loop",
        "optimiser steps between further checkpoints within an epoch; 0: none",
        low=0,
        effect=False,
        train_only=True,
    )
    log_period: int = setting(
        1000, "training loop", "steps between lines in the log", low=1, effect=False, train_only=True
    )

    def __post_init__(self) -> None:
        for item in fields(LoopSettings):
            check_value(item.name, getattr(self, item.name), item.metadata)

    @property
    def monitors_minimum(self) -> bool:
        """Whether a smaller value of the monitored metric is better."""
        return self.monitor_mode == "min" or smaller_is_better(self.monitor_metric)


@dataclass(frozen=True)
class SelfCriticalSettings:
    """The self-critical stage."""

    self_critical: bool = setting(
        False,
        "self-critical",
        "second stage, from the weights of --load: a metric of sampled reports is maximised in place of the cross "
        "entropy (docs/SELF_CRITICAL.md)",
    )
    scst_reward: str = setting(
        "CIDEr",
        "self-critical",
        "metric of a sampled report; CIDEr is CIDEr-D with the training split's document frequencies",
        choices=REWARDS,
    )
    scst_baseline: str = setting(
        "greedy",
        "self-critical",
        "what a sample must exceed: its study's greedy report, or the mean of its samples",
        choices=("greedy", "mean"),
    )
    scst_samples: int = setting(5, "self-critical", "reports sampled per study", low=1, high=1000)
    scst_ce_weight: float = setting(0.0, "self-critical", "weight of the cross entropy added to the reward", low=0.0)

    def __post_init__(self) -> None:
        for item in fields(SelfCriticalSettings):
            check_value(item.name, getattr(self, item.name), item.metadata)
        if self.self_critical and self.scst_baseline == "mean" and self.scst_samples < 2:
            raise InputError("--scst_baseline mean: one sample is its own mean; give --scst_samples 2 or more")

    @property
    def idle_options(self) -> dict[str, tuple[str, ...]]:
        """Settings without effect, by the choice that does not read them."""
        if self.self_critical:
            return {"--self_critical true has --scst_ce_weight": ("ce_weight",)}
        own = tuple(item.name for item in fields(SelfCriticalSettings) if item.name != "self_critical")
        return {"--self_critical false": own}
