"""Composes a Predictor from a trained model alone: no annotation, no data set."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from models.base import Backbone
from modules.config import Config
from modules.data.dataset_specs import PRIOR_IMAGE
from modules.data.images import Draft, open_image, refuse_blank
from modules.flags import resolve_config
from modules.inference.prediction import Predictor, StudyContext
from modules.inference.study_files import StudyFiles
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.run.build import (
    StoredWeights,
    build_backbone,
    build_extractor,
    decoding_options,
    load_weights,
    prepare_device,
    require_fitting,
    with_precision,
)
from modules.run.data import image_transform, score_tag
from modules.run.loading import load_trained
from modules.run.resuming import own_settings
from modules.run.vocabulary import tokenizer_from_state
from modules.runtime.errors import InputError
from modules.training.checkpoint import FORMAT

# Settings of a run that say nothing about the model that writes.
UNUSED = {"feature_cache": "", "resume": "", **asdict(ITHNSettings(ithn="off"))}


def load_predictor(path: str, given: Mapping[str, Any]) -> Predictor:
    """As ``load_with_settings``, without the settings."""
    return load_with_settings(path, given)[0]


def load_with_settings(path: str, given: Mapping[str, Any]) -> tuple[Predictor, Config]:
    """The model in ``path`` (modules.run.loading); the flags ``given`` override its settings, the second result.

    InputError for a checkpoint without settings and vocabulary, one that was edited, or one whose model needs more
    than images.
    """
    content, _ = load_trained(path)
    if content.get("format") != FORMAT:
        raise InputError(
            f"--load {path}: it holds no vocabulary and no settings, like every published checkpoint; "
            "convert it with scripts/convert_checkpoint.py --to ours"
        )
    config = resolve_config(given, own_settings(content, path) | UNUSED)
    if config.detection_features:
        raise InputError(
            f"--load {path}: trained with --detection_features, which a new image does not have; train "
            "with a visual extractor to write captions of new images"
        )
    if score_tag(config):
        raise InputError(
            f"--load {path}: generates from the labels of a reference report (--xpronet_labels "
            "reference), which a new image does not have; train with --xpronet_labels predicted"
        )
    device = prepare_device(config)
    config = with_precision(config, device)
    tokenizer = tokenizer_from_state(content["vocabulary"])
    require_fitting(config, tokenizer, StoredWeights(content["state_dict"], path))
    extractor = build_extractor(config, device, pretrained=False)
    backbone = build_backbone(config, extractor, tokenizer, pretrained=False)
    objective = Objective(backbone).to(device)
    load_weights(objective, content["state_dict"], path)
    if config.guidance:
        backbone.mean_patches = _mean_patches(content.get("mean_patches"), backbone, config.guidance, path)
    predictor = Predictor(
        backbone,
        tokenizer=tokenizer,
        device=device,
        precision=config.precision,
        transform=image_transform(config, extractor),
        num_views=1 if config.views == "separate" else config.dataset.max_views,
        decoding=decoding_options(config),
        prior_views=PRIOR_IMAGE in config.contexts,
        seed=config.seed,
    )
    return predictor, config


def _mean_patches(found: Any, backbone: Backbone, guidance: float, path: str) -> torch.Tensor:
    """The mean training image (S, C) of a checkpoint that was trained with guidance."""
    if found is None:
        raise InputError(
            f"--guidance {guidance:g}: {path} has no mean training image: trained without guidance, or "
            "saved before a validation; give --guidance 0, or a model_best.pth trained with it"
        )
    if found.shape[1] != backbone.image_dim:
        raise InputError(
            f"--load {path}: its mean_patches have width {found.shape[1]}, the visual extractor's is "
            f"{backbone.image_dim}"
        )
    return found


class StudyReader:
    """Opens the studies' images, in batches; unreadable ones are named on stderr, counted and left out."""

    def __init__(self, studies: Sequence[StudyFiles], num_views: int, batch_size: int, draft: Draft | None = None):
        self.studies, self.num_views, self.batch_size, self.draft = studies, num_views, batch_size, draft
        self.unreadable = 0

    def __len__(self) -> int:
        return -(-len(self.studies) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[StudyFiles, list[Image.Image], StudyContext]]]:
        for start in range(0, len(self.studies), self.batch_size):
            opened = [(study, self._open(study)) for study in self.studies[start : start + self.batch_size]]
            if readable := [
                (study, images, StudyContext(prior, study.texts)) for study, (images, prior) in opened if images
            ]:
                yield readable

    def _open(self, study: StudyFiles) -> tuple[list[Image.Image], list[Image.Image]]:
        """Its images, and those of the study before; none where one of them could not be read."""
        if len(study.paths) > self.num_views:
            print(
                f"{study.name}: {len(study.paths)} images, of which the model reads the first {self.num_views}",
                file=sys.stderr,
            )
        try:
            paths = study.paths[: self.num_views] + study.prior
            images = [open_image(path, draft=self.draft) for path in paths]
            for path, image in zip(paths, images, strict=True):
                if warning := refuse_blank(image, str(path)):
                    print(f"warning: {warning}", file=sys.stderr)
            own = len(images) - len(study.prior)
            return images[:own], images[own:]
        except InputError as error:
            print(f"error: {error}; no report for {study.name}", file=sys.stderr)
            self.unreadable += 1
            return [], []
