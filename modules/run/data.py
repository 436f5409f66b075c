"""A run's data: the annotation with what was derived from it, and its splits as data sets and loaders."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modules.config import Config
from modules.data.annotations import Annotation, Study
from modules.data.captions import first_of_each_image
from modules.data.datasets import EpochLoader, ReportDataset, build_loader
from modules.data.detection_features import DetectionFeatures
from modules.data.feature_cache import FeatureCache
from modules.data.images import eval_transform, train_transform
from modules.data.loaders import LimitedLoader
from modules.ithn.synthesis import DRAWING_NEIGHBOURS
from modules.labels.study_labels import LabelTable
from modules.layers.visual_extractor import VisualExtractor
from modules.mining.index import HardNegativeIndex
from modules.run.image_sources import feature_source, image_folder, image_source, shard_source
from modules.run.language_model import AnyTokenizer
from modules.runtime import distributed

# R2GenCMN resizes to 256 and crops 224; other image sizes keep that proportion.
RESIZE_PER_CROP = 256 / 224
MEAN_STUDIES = 256  # their mean is off that of all by a sixteenth of the patches' spread


@dataclass
class Data:
    """The annotation with what was derived from it."""

    annotation: Annotation
    tokenizer: AnyTokenizer
    strategy: str  # of the objective; "off" for the plain backbone, and where nothing is trained
    index: HardNegativeIndex | None
    trained_with: str  # strategy that the weights were, or are being, trained with
    # What the data set has in the place of images: of --feature_cache or --detection_features.
    features: FeatureCache | DetectionFeatures | None = None
    labels: LabelTable | None = None  # where the backbone is trained with labels, or generates from given ones
    labels_leak: bool = False  # whether generation is given the labels of the reference reports


def count_samples(config: Config, studies: tuple[Study, ...]) -> int:
    """Samples that a split makes: its studies, or their images."""
    return len(studies) if config.views == "paired" else sum(len(study.image_paths) for study in studies)


def cache_features(config: Config, data: Data, extractor: VisualExtractor, device: torch.device) -> None:
    """With --feature_cache, have the frozen extractor see every image once; call it when its weights are in place."""
    if config.feature_cache:
        studies = (study for split in data.annotation.splits.values() for study in split)
        data.features = feature_source(config, studies, extractor, device)


def build_dataset(
    config: Config,
    data: Data,
    split: str,
    *,
    augment: bool,
    extractor: nn.Module,
    negatives: bool = False,
    studies: Sequence[Study] | None = None,
) -> ReportDataset:
    """One split, or the given ``studies`` of it; ``augment`` takes the training transform, ``negatives`` adds each
    sample's hard negative.
    """
    if data.features is not None:
        transform = data.features
    else:
        look = {"size": config.image_size, "mean": extractor.mean, "std": extractor.std}
        resize = round(config.image_size * RESIZE_PER_CROP)
        transform = train_transform(**look, resize=resize, flip=config.flip) if augment else eval_transform(**look)
    neighbours = data.index.neighbours if negatives and data.index is not None else None
    studies = data.annotation.splits[split] if studies is None else studies
    if data.features is not None:
        source = data.features
    elif config.shards:
        source = shard_source(
            config,
            data.annotation,
            split,
            negatives=negatives,
            index=data.index,
            num_neighbours=config.num_neighbours if data.strategy in DRAWING_NEIGHBOURS else 1,
        )
    elif split == "train" and not augment:  # all of it is seen once per run: nothing to gain from keeping it
        source = image_folder(config)
    else:
        source = image_source(config, studies, transform, negatives=negatives and neighbours is None)
    # Labels that generation must not see do not get near it.
    labelled = data.labels is not None and (split == "train" or data.labels_leak)
    return ReportDataset(
        studies,
        data.tokenizer,
        source,
        transform,
        max_seq_length=config.max_seq_length,
        views=config.views,
        max_views=1 if config.detection_features else config.dataset.max_views,
        seed=config.seed,
        neighbours=neighbours,
        num_neighbours=config.num_neighbours if data.strategy in DRAWING_NEIGHBOURS else 1,
        annotation_negatives=negatives and neighbours is None,
        labels=data.labels.of(studies) if labelled else None,
        on_bad_image=config.on_bad_image,
    )


def build_split_loader(config: Config, dataset: ReportDataset, device: torch.device, *, shuffle: bool) -> EpochLoader:
    """Loader of a split; worker processes of the training split live on between epochs, the others' end."""
    return build_loader(
        dataset,
        config.batch_size,
        shuffle,
        config.num_workers,
        config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        pin_memory=device.type == "cuda",
        persistent_workers=shuffle,
        drop_last=shuffle and config.drop_last,
        timeout=config.worker_timeout,
        lengths=dataset.token_counts() if shuffle and config.length_bucketing else None,
        shards=dataset.shards(),
    )


@contextlib.contextmanager
def training_studies(config: Config, data: Data, extractor: nn.Module, device: torch.device) -> Iterator[Any]:
    """Batches of MEAN_STUDIES training studies, whose mean image --guidance decodes away from; None without it.

    They are evenly spaced in the annotation; of shards, which are read one after the other, they are the first. Every
    process goes through all of them, so that the mean does not depend on how many there are.
    """
    if not config.guidance:
        yield None
        return
    studies = data.annotation.splits["train"]
    studies = first_of_each_image(studies) if config.captioning else studies
    count = min(MEAN_STUDIES, len(studies))
    if not config.shards:
        studies = [studies[turn * len(studies) // count] for turn in range(count)]
    dataset = build_dataset(config, data, "train", augment=False, extractor=extractor, studies=studies)
    loader = build_loader(
        dataset,
        config.batch_size,
        False,
        config.num_workers,
        config.seed,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        timeout=config.worker_timeout,
        shards=dataset.shards(),
    )
    loader.replaced_limit = 1.0  # a share of so few says little; whole splits are held to theirs
    with contextlib.closing(loader):
        yield LimitedLoader(loader, -(-count // config.batch_size)) if config.shards else loader
