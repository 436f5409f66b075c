"""Composes a Predictor from a trained model alone: no annotation, no data set."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from models.base import Backbone
from modules.data.dataset_specs import PRIOR_IMAGE
from modules.data.images import Draft, open_image, refuse_blank
from modules.flags import resolve_config
from modules.inference.prediction import Predictor
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
from modules.run.vocabulary import tokenizer_from_state
from modules.runtime.errors import InputError
from modules.training.checkpoint import FORMAT

# Settings of a run that say nothing about the model that writes.
UNUSED = {"feature_cache": "", "resume": "", **asdict(ITHNSettings(ithn="off"))}


def load_predictor(path: str, given: Mapping[str, Any]) -> Predictor:
    """The model in ``path`` (modules.run.loading); the flags ``given`` override its settings.

    InputError for a checkpoint without settings and vocabulary, or one whose model needs more than images."""
    content, _ = load_trained(path)
    if content.get("format") != FORMAT:
        raise InputError(
            f"--load {path}: it holds no vocabulary and no settings, like every published checkpoint; "
            "convert it with scripts/convert_checkpoint.py --to ours"
        )
    config = resolve_config(given, content["config"] | UNUSED)
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
    return Predictor(
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

    def __iter__(self) -> Iterator[list[tuple[StudyFiles, list[Image.Image]]]]:
        for start in range(0, len(self.studies), self.batch_size):
            opened = [(study, self._open(study)) for study in self.studies[start : start + self.batch_size]]
            if readable := [(study, images) for study, images in opened if images]:
                yield readable

    def _open(self, study: StudyFiles) -> list[Image.Image]:
        if len(study.paths) > self.num_views:
            print(
                f"{study.name}: {len(study.paths)} images, of which the model reads the first {self.num_views}",
                file=sys.stderr,
            )
        try:
            images = [open_image(path, draft=self.draft) for path in study.paths[: self.num_views]]
            for path, image in zip(study.paths, images, strict=False):
                if warning := refuse_blank(image, str(path)):
                    print(f"warning: {warning}", file=sys.stderr)
            return images
        except InputError as error:
            print(f"error: {error}; no report for {study.name}", file=sys.stderr)
            self.unreadable += 1
            return []
