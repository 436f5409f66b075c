"""What a Config refuses: values out of bounds, and flags that exclude one another."""

from typing import Any

from modules.evaluation.metric_table import NEED_JAVA, XPRONET_SUM
from modules.runtime.errors import InputError


def check_together(config: Any) -> None:
    """InputError for flags that exclude one another."""
    _check_network(config)
    _check_inputs(config)
    _check_scores(config)
    _check_stage(config)
    for name in ("save_dir", "record_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is empty: name a folder")
    if config.sync_bn and config.batch_norm == "per_view":
        # A process without a second view in its batch would leave the others waiting.
        raise InputError("--sync_bn true: needs --batch_norm joint, as processes may differ in the views they have")


def _check_network(config: Any) -> None:
    if config.d_model % config.num_heads:
        raise InputError(f"--d_model {config.d_model} cannot be divided by --num_heads {config.num_heads}")
    if config.d_model % 2:
        raise InputError(f"--d_model {config.d_model}: must be even (sinusoidal positions come in pairs)")
    for name in ("feature_cache", "image_cache", "length_bucketing", "detection_features"):
        if config.shards and getattr(config, name):
            raise InputError(f"--shards {config.shards}: does not go with --{name}; leave one of them out")


def _check_inputs(config: Any) -> None:
    if config.feature_cache and not config.freeze_visual_extractor:
        raise InputError(
            f"--feature_cache {config.feature_cache}: only a visual extractor that stays as it is can be "
            "cached; add --freeze_visual_extractor true"
        )
    if config.image_cache and config.feature_cache:
        raise InputError(
            f"--image_cache {config.image_cache}: stored features leave no image to read; give it or "
            "--feature_cache, not both"
        )
    if config.detection_features and (config.feature_cache or config.image_cache):
        cache = "feature" if config.feature_cache else "image"
        raise InputError(f"--{cache}_cache: with --detection_features no image is looked at; leave one of them out")
    if config.detection_features and config.views == "separate":
        raise InputError("--views separate: --detection_features has one set of features per record; leave it out")


def _check_scores(config: Any) -> None:
    if not config.dataset.clinical and (config.chexbert_path or config.radgraph_path):
        raise InputError(
            f"--{'chexbert' if config.chexbert_path else 'radgraph'}_path: scores radiology reports, and "
            f"--dataset_name {config.dataset_name} has none"
        )
    if config.monitor_metric.startswith("ce_") and not config.labels_by_rules:
        raise InputError(f"--monitor_metric {config.monitor_metric}: needs --clinical true and a radiology data set")
    if config.monitor_metric in (*NEED_JAVA, XPRONET_SUM.name) and not config.meteor:
        raise InputError(f"--monitor_metric {config.monitor_metric}: needs --meteor true")


def _check_stage(config: Any) -> None:
    if config.self_critical and config.compile:
        raise InputError("--compile: not with --self_critical, whose steps generate reports; leave one of them out")
    if config.scst_reward == "clinical_f1" and not config.dataset.clinical:
        raise InputError(f"--scst_reward clinical_f1: there are no clinical labels on {config.dataset_name}")
    if config.start_eval_epoch > config.epochs:
        raise InputError(
            f"--start_eval_epoch {config.start_eval_epoch}: no epoch of --epochs {config.epochs} would be "
            "validated, so no best model could be chosen"
        )
