"""Where a run's images come from: the files, what --image_cache keeps of them, or the features of --feature_cache."""

from collections.abc import Iterable

import torch

from modules.config import Config
from modules.data.annotations import Annotation, Study
from modules.data.feature_cache import FeatureCache, build_feature_cache
from modules.data.image_cache import ImageCache, build_image_cache
from modules.data.images import ImageFolder, Transform, eval_transform
from modules.data.shards import Manifest, ShardImages, check_manifest, neighbours_sha256
from modules.layers.visual_extractor import VisualExtractor
from modules.mining.index import HardNegativeIndex
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder
from modules.runtime.run_log import Bar


def image_folder(config: Config) -> ImageFolder:
    """Where the annotation's image paths start."""
    return ImageFolder(config.image_dir, follow_links=config.follow_links)


def shard_source(
    config: Config,
    annotation: Annotation,
    split: str,
    *,
    negatives: bool,
    index: HardNegativeIndex | None,
    num_neighbours: int,
) -> ShardImages:
    """The images of a split in --shards; with ``negatives`` those of the hard negatives must be there too."""
    if config.captioning:
        raise InputError(
            f"--shards {config.shards}: a record of --dataset_name {config.dataset_name} makes several "
            "samples, for which shards are not made; give --image_dir"
        )
    manifest = Manifest.load(config.shards)
    wanted = None
    if negatives:
        wanted = "annotation" if index is None else neighbours_sha256(index.neighbours, manifest.num_neighbours)
    check_manifest(manifest, config.shards, annotation.sha256, wanted, num_neighbours)
    return ShardImages(config.shards, manifest.splits[split], [study.image_paths for study in annotation.splits[split]])


def image_source(
    config: Config, studies: Iterable[Study], transform: Transform, *, negatives: bool
) -> ImageFolder | ImageCache:
    """The images of ``studies``, and with ``negatives`` of the annotation's own hard negatives."""
    images = image_folder(config)
    if not config.image_cache:
        return images
    return build_image_cache(
        private_folder(config.image_cache),
        images,
        _paths(config, studies, negatives),
        transform=transform,
        workers=config.num_workers,
        progress=Bar,
    )


def feature_source(
    config: Config, studies: Iterable[Study], extractor: VisualExtractor, device: torch.device
) -> FeatureCache:
    """What the frozen ``extractor`` sees in the images of ``studies``, each looked at once."""
    return build_feature_cache(
        private_folder(config.feature_cache),
        image_folder(config),
        _paths(config, studies, negatives=True),
        extractor=extractor,
        transform=eval_transform(size=config.image_size, mean=extractor.mean, std=extractor.std),
        device=device,
        batch_size=config.batch_size,
        progress=Bar,
    )


def _paths(config: Config, studies: Iterable[Study], negatives: bool) -> list[str]:
    """Every image that samples of ``studies`` show, once."""
    views = None if config.views == "separate" else config.dataset.max_views
    paths: dict[str, None] = {}
    for study in studies:
        paths |= dict.fromkeys(study.image_paths[:views] + (study.negative_image_paths if negatives else ()))
    return list(paths)
