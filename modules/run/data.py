"""A run's data: the annotation and what is derived from it, where images come from, data sets and loaders."""

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn

from models import backbone_class, settings_class
from models.base import BackboneSettings
from modules.config import Config
from modules.data.annotations import Annotation, Study, read_annotation
from modules.data.datasets import EpochLoader, ReportDataset, build_loader
from modules.data.images import ImageFolder, Transform, eval_transform, train_transform
from modules.data.loaders import LimitedLoader
from modules.data.tokenizers import Tokenizer
from modules.ithn.synthesis import DRAWING_NEIGHBOURS, NEEDING_NEGATIVES
from modules.mining.index import HardNegativeIndex
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder
from modules.runtime.run_log import Bar
from modules.runtime.settings import part_of

if TYPE_CHECKING:  # what only some runs need is imported where it is used
    from modules.data.bpe_tokenizer import BpeTokenizer
    from modules.data.detection_features import DetectionFeatures
    from modules.data.feature_cache import FeatureCache
    from modules.data.image_cache import ImageCache
    from modules.data.shards import ShardImages
    from modules.labels.study_labels import LabelTable
    from modules.layers.visual_extractor import VisualExtractor

logger = logging.getLogger("ithn")
AnyTokenizer = Union[Tokenizer, "BpeTokenizer"]

# R2GenCMN resizes to 256 and crops 224; other image sizes keep that proportion.
RESIZE_PER_CROP = 256 / 224
MEAN_STUDIES = 256  # their mean is off that of all by a sixteenth of the patches' spread
ASKING = ("strategy", "ithn_variant")  # flags that ask for ITHN by being given, whatever their value
# Flags of ITHN that the plain backbone goes by too, or that say whether it is trained.
ALWAYS_IN_USE = ("ithn", "ce_weight")


@dataclass
class Data:
    """The annotation with what was derived from it."""

    annotation: Annotation
    tokenizer: AnyTokenizer
    strategy: str  # of the objective; "off" for the plain backbone, and where nothing is trained
    index: HardNegativeIndex | None
    trained_with: str  # strategy that the weights were, or are being, trained with
    # What the data set has in the place of images: of --feature_cache or --detection_features.
    features: "FeatureCache | DetectionFeatures | None" = None
    labels: "LabelTable | None" = None  # where the backbone is trained with labels, or generates from given ones
    labels_leak: bool = False  # whether generation is given the labels of the reference reports


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
        from modules.data.detection_features import detections_of

        detections = detections_of(config.detection_features, annotation.splits, config.max_detections)
    if config.captioning:
        from modules.data.captions import split_captions

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
        from modules.labels.study_labels import read_labels

        labels = read_labels(config.label_path, clusters(config), config.label_columns)
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


def clusters(config: Config) -> tuple[str, ...]:
    """The label classes in the order of their prototypes."""
    from modules.labels.study_labels import class_order

    return class_order(config.cluster_order, "cluster_order")


def build_tokenizer(config: Config, reports: Sequence[str], *, kind: str) -> AnyTokenizer:
    """The tokenizer that --tokenizer names; auto is the backbone's ``kind``, bpe only where --gpt2_path is given."""
    wants_bpe = config.tokenizer == "bpe" or (config.tokenizer == "auto" and kind == "bpe" and config.gpt2_path)
    if wants_bpe and not config.gpt2_path:
        raise InputError(
            "--tokenizer bpe: give the folder or hub id with GPT-2's vocab.json and merges.txt as --gpt2_path"
        )
    if wants_bpe:
        from modules.data.bpe_tokenizer import BpeTokenizer
        from modules.data.gpt2_files import find_gpt2

        folder = find_gpt2(config.gpt2_path)
        found = BpeTokenizer.from_folder(folder, config.dataset.cleaner)
        if found is not None:
            return found
        lacking = f"--gpt2_path {config.gpt2_path}: no BPE files (vocab.json and merges.txt, or tokenizer.json) there"
        if config.tokenizer == "bpe":
            raise InputError(f"{lacking}; add them, or give --tokenizer word")
        logger.warning("%s: the vocabulary is the words of the training reports", lacking)
    return Tokenizer.from_reports(reports, config.threshold, config.dataset.cleaner)


def asks_for_ithn(given: Collection[str]) -> bool:
    """Whether one of the flags ``given`` asks for ITHN; a Config does not tell a default that was typed out."""
    return not set(ASKING).isdisjoint(given)


def idle_line(given: Collection[str]) -> str | None:
    """A line for the log of a run without ITHN that names the flags ``given`` that do nothing there, if any."""
    idle = [
        f"--{item.name}"
        for item in dataclasses.fields(Config)
        if item.name in given and item.metadata["group"] in ("ITHN", "beyond ITHN") and item.name not in ALWAYS_IN_USE
    ]
    return f"ignored, because ITHN is off: {', '.join(idle)}" if idle else None


def hard_negatives(
    config: Config, annotation: Annotation, *, asked: bool = False
) -> tuple[str, HardNegativeIndex | None]:
    """The strategy that --ithn and the available hard negatives lead to, and the index if one was given.

    ``asked``: a flag that was given asks for ITHN (``asks_for_ithn``).
    """
    in_annotation = any(study.negative_report for study in annotation.splits["train"])
    # A strategy, variant or option that was asked for must not quietly end in the plain backbone.
    asked = asked or config.strategy != "ithn" or config.released or config.on_encoder
    wanted = config.ithn == "on" or (config.ithn == "auto" and (config.negative_index or in_annotation or asked))
    if not wanted:
        return "off", None
    if config.strategy not in NEEDING_NEGATIVES:
        return config.strategy, None
    if config.negative_index:
        index = HardNegativeIndex.load(config.negative_index)
        index.check(annotation)
        return config.strategy, index
    if not in_annotation:
        raise InputError(
            f"--strategy {config.strategy} needs hard negatives and {config.ann_path} has no neg_report: "
            f"run python scripts/mine_hard_negatives.py --ann_path {config.ann_path} --out FILE, then "
            "give --negative_index FILE (or --ithn off for the plain backbone)"
        )
    if config.strategy in DRAWING_NEIGHBOURS:
        raise InputError(
            f"--strategy {config.strategy} draws from several neighbours, the annotation's neg_report is one: mine an "
            "index with scripts/mine_hard_negatives.py and give --negative_index"
        )
    return config.strategy, None


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
) -> "ShardImages":
    """The images of a split in --shards; with ``negatives`` those of the hard negatives must be there too."""
    from modules.data.shards import Manifest, ShardImages, check_manifest, neighbours_sha256

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
) -> "ImageFolder | ImageCache":
    """The images of ``studies``, and with ``negatives`` of the annotation's own hard negatives."""
    images = image_folder(config)
    if not config.image_cache:
        return images
    from modules.data.image_cache import build_image_cache

    return build_image_cache(
        private_folder(config.image_cache),
        images,
        _paths(config, studies, negatives),
        transform=transform,
        workers=config.num_workers,
        progress=Bar,
    )


def feature_source(
    config: Config, studies: Iterable[Study], extractor: "VisualExtractor", device: torch.device
) -> "FeatureCache":
    """What the frozen ``extractor`` sees in the images of ``studies``, each looked at once."""
    from modules.data.feature_cache import build_feature_cache

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


def count_samples(config: Config, studies: tuple[Study, ...]) -> int:
    """Samples that a split makes: its studies, or their images."""
    return len(studies) if config.views == "paired" else sum(len(study.image_paths) for study in studies)


def one_per_image(config: Config, studies: Sequence[Study]) -> Sequence[Study]:
    """``studies``; where every caption of an image is one, the first of each image."""
    if not config.captioning:
        return studies
    from modules.data.captions import first_of_each_image

    return first_of_each_image(studies)


def cache_features(config: Config, data: Data, extractor: "VisualExtractor", device: torch.device) -> None:
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
    studies = one_per_image(config, data.annotation.splits["train"])
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
