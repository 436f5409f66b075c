"""Builds the parts of a run from its Config: the one place, with main_* and the other scripts, that sees all of it."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from models import backbone_class, settings_class
from models.base import Backbone, BackboneSettings
from modules.config import Config
from modules.data.annotations import read_annotation
from modules.data.captions import split_captions
from modules.data.detection_features import DetectionExtractor, DetectionFeatures, detections_of
from modules.data.prototype_files import load_prototypes
from modules.decoding.options import DecodingOptions
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.ithn.weights import load_published_state
from modules.labels.study_labels import NO_FINDING, class_order, read_labels
from modules.layers.visual_extractor import VisualExtractor
from modules.run.data import Data, build_dataset, build_split_loader, cache_features, count_samples, training_studies
from modules.run.hard_negatives import hard_negatives
from modules.run.language_model import AnyTokenizer, build_tokenizer, gpt2_options
from modules.runtime import distributed
from modules.runtime.environment import choose_device, choose_precision
from modules.runtime.errors import InputError
from modules.runtime.input_files import require_plain_archive
from modules.runtime.launch import process_device
from modules.runtime.settings import part_of
from modules.training.sync_norm import with_common_statistics

__all__ = [
    "Data",
    "build_backbone",
    "build_dataset",
    "build_extractor",
    "build_objective",
    "build_split_loader",
    "cache_features",
    "decoding_options",
    "load_weights",
    "prepare_device",
    "read_data",
    "score_tag",
    "training_studies",
]
logger = logging.getLogger("ithn")


def prepare_device(config: Config) -> torch.device:
    """The device of this process, with kernels chosen for speed or, by flag, for repeatability."""
    device = choose_device("cpu" if config.n_gpu == 0 else process_device(config.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch by itself allows TF32 in convolutions and not in matrix products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.manual_seed(config.seed)
    if config.deterministic:
        # cuBLAS reads it at its first call; without it torch refuses some products.
        import os

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True
    return device


def with_precision(config: Config, device: torch.device) -> Config:
    """``config`` with the --precision that auto means on ``device``."""
    return dataclasses.replace(config, precision=choose_precision(config.precision, device))


def read_data(
    config: Config,
    *,
    tokenizer: AnyTokenizer | None = None,
    trained_with: str | None = None,
    asked_for_ithn: bool = False,
) -> Data:
    """Read the annotation, the vocabulary (unless a checkpoint brought it) and the hard negatives.

    ``trained_with`` names the strategy of a checkpoint that is only tested: no hard negatives are needed then.
    ``asked_for_ithn``: flags that were given ask for it, so without hard negatives this is an InputError.
    """
    annotation = read_annotation(config.ann_path)
    detections = None
    if config.detection_features:
        detections = detections_of(config.detection_features, annotation.splits, config.max_detections)
    if config.captioning:
        annotation = split_captions(annotation)
    if tokenizer is None:
        reports = [study.report for study in annotation.splits["train"]]
        tokenizer = build_tokenizer(config, reports, kind=backbone_class(config.model_name).tokenizer_kind)
    if config.beam_size > tokenizer.num_ids:
        raise InputError(f"--beam_size {config.beam_size}: at most the {tokenizer.num_ids} token ids of the vocabulary")
    strategy, index = "off", None
    if trained_with is None:
        strategy, index = hard_negatives(config, annotation, asked=asked_for_ithn)
    labels = None
    if backbone_class(config.model_name).needs_labels and (trained_with is None or score_tag(config)):
        labels = read_labels(config.label_path, _clusters(config), config.label_columns)
        if trained_with is None:
            labels.of(annotation.splits["train"])  # a study without labels: rather found now than after the features
    if score_tag(config):
        logger.warning(
            "--xpronet_labels reference: reports are generated from labels that come from the reference "
            "reports; every score of this run is named *_%s and is none of a model that sees images only",
            score_tag(config),
        )
    return Data(
        annotation,
        tokenizer,
        strategy,
        index,
        trained_with or strategy,
        detections,
        labels,
        labels_leak=bool(score_tag(config)),
    )


def backbone_settings(config: Config) -> BackboneSettings:
    """The settings of the backbone that --model_name names."""
    return part_of(config, settings_class(config.model_name))


def score_tag(config: Config) -> str:
    """What the names of scores carry where generation is given labels of the reference reports; else nothing."""
    return "reference_labels" if backbone_settings(config).reads_reference_labels else ""


def _clusters(config: Config) -> tuple[str, ...]:
    """The label classes in the order of their prototypes."""
    return class_order(config.cluster_order, "cluster_order")


def build_extractor(config: Config, device: torch.device, *, pretrained: bool) -> VisualExtractor:
    """The visual extractor; without ``pretrained`` its weights are to come from a checkpoint."""
    if pretrained and config.visual_extractor_weights:
        require_plain_archive(config.visual_extractor_weights, "--visual_extractor_weights")
    try:
        return VisualExtractor(
            config.visual_extractor,
            pretrained=pretrained and config.visual_extractor_pretrained,
            weights=config.visual_extractor_weights if pretrained else None,
            batch_norm=config.batch_norm,
            channels_last=True,
            frozen=config.freeze_visual_extractor,
            image_size=config.image_size,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def build_objective(
    config: Config, data: Data, device: torch.device, *, pretrained: bool, kind: type[Objective] = Objective
) -> Objective:
    """Backbone and losses, on ``device``."""
    if isinstance(data.features, DetectionFeatures):
        extractor: nn.Module = DetectionExtractor(*data.features.shape)
    else:
        with distributed.main_process_first():
            extractor = build_extractor(config, device, pretrained=pretrained)
    backbone = build_backbone(config, extractor, data.tokenizer, pretrained=pretrained)
    settings = dataclasses.replace(part_of(config, ITHNSettings), strategy=data.strategy)
    samples = count_samples(config, data.annotation.splits["train"])
    objective = kind(backbone, settings, n_samples=samples).to(device)
    return with_common_statistics(objective) if config.sync_bn else objective


def build_backbone(config: Config, extractor: nn.Module, tokenizer: AnyTokenizer, *, pretrained: bool) -> Backbone:
    """The backbone that --model_name names, with the flags that it asks for; InputError where they do not fit."""
    kind = backbone_class(config.model_name)
    if config.guidance and not (
        kind.session is not Backbone.session and kind.search is Backbone.search and kind.generate is Backbone.generate
    ):
        raise InputError(
            f"--guidance {config.guidance:g}: --model_name {config.model_name} writes reports by a "
            "generate() of its own, not by a session() that can be guided"
        )
    options: dict[str, Any] = {}
    for resource in kind.resources:
        options |= RESOURCES[resource](config, tokenizer, pretrained)
    settings = backbone_settings(config)
    try:
        return kind(visual_extractor=extractor, num_ids=tokenizer.num_ids, settings=settings, **options)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--{error}") from error


def _prototypes(config: Config, tokenizer: AnyTokenizer, pretrained: bool) -> dict[str, Any]:
    """The class of normal studies, and the initial prototypes unless a checkpoint provides them."""
    classes = _clusters(config)
    if config.num_cluster != len(classes):
        raise InputError(
            f"--num_cluster {config.num_cluster}: the labels have {len(classes)} classes with a cluster "
            f"of prototypes each; give --num_cluster {len(classes)}"
        )
    initial = None
    if pretrained and config.init_protypes_path:
        initial = load_prototypes(
            config.init_protypes_path,
            classes,
            num_protype=config.num_protype,
            d_img_ebd=config.d_img_ebd,
            d_txt_ebd=config.d_txt_ebd,
        )
    return {"no_finding": classes.index(NO_FINDING), "init_prototypes": initial}


# What a backbone may ask for in ``resources``: constructor arguments that are made of files or of the vocabulary.
RESOURCES: dict[str, Callable[[Config, AnyTokenizer, bool], dict[str, Any]]] = {
    "prototypes": _prototypes,
    "gpt2": gpt2_options,
}


def decoding_options(config: Config) -> DecodingOptions:
    """How reports are decoded."""
    return part_of(config, DecodingOptions)


def load_weights(objective: Objective, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Load ``weights`` of ours or of a published checkpoint into ``objective``; InputError when they do not fit."""
    entry = objective.backbone.vocabulary_entry
    # Trained on several GPUs, the published codes save the wrapper's names.
    here, there = (
        next((len(value) for name, value in state.items() if name.removeprefix("module.") == entry), None)
        for state in (objective.backbone.state_dict(), weights)
    )
    if there is not None and here != there:
        raise InputError(
            f"checkpoint {path}: made for a vocabulary of {there - 1} words, but this annotation gives {here - 1}; "
            "most likely --threshold or --dataset_name differ from its training, or the annotation is another version"
        )
    try:
        load_published_state(objective, weights)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint {path}: {' '.join(str(error).split())[:400]}") from error
