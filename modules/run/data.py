"""A run's data: the annotation and what is derived from it, where images come from, data sets and loaders."""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models import backbone_class, settings_class
from models.base import BackboneSettings
from modules.config import Config
from modules.data.annotations import Annotation, Study, frontal_first, read_annotation
from modules.data.datasets import EpochLoader, ReportDataset, build_loader
from modules.data.images import ImageFolder
from modules.data.loaders import LimitedLoader
from modules.data.transforms import Transform, eval_transform, train_transform
from modules.evaluation.metric_table import REFERENCE_LABELS
from modules.ithn.settings import ITHNSettings
from modules.ithn.synthesis import DRAWING_NEIGHBOURS, NEEDING_NEGATIVES
from modules.mining.index import HardNegativeIndex
from modules.run.vocabulary import AnyTokenizer, build_tokenizer
from modules.runtime import distributed
from modules.runtime.cores import worker_processes
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder
from modules.runtime.run_log import Bar
from modules.runtime.settings import is_local_only, part_of

if TYPE_CHECKING:  # what only some runs need is imported where it is used
    from modules.data.detection_features import DetectionFeatures
    from modules.data.feature_cache import FeatureCache
    from modules.data.image_cache import ImageCache
    from modules.data.study_context import ContextReader
    from modules.labels.study_labels import LabelTable
    from modules.layers.visual_extractor import VisualExtractor

logger = logging.getLogger("ithn")

FIRST_IMAGES = 100  # of a split, among which one must be found
MEAN_STUDIES = 256  # the standard error of their mean is 1/16 of the patches' spread


@dataclass
class Data:
    """The annotation and what is derived from it."""

    annotation: Annotation
    tokenizer: AnyTokenizer
    strategy: str  # of the objective; "off" for the plain backbone, and where nothing is trained
    index: HardNegativeIndex | None
    trained_with: str  # strategy that the weights were, or are being, trained with
    # What replaces the images: the features of --feature_cache or --detection_features.
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
    """Read the annotation, the vocabulary (unless a checkpoint provided it) and the hard negatives.

    ``trained_with`` names the strategy of a checkpoint that is only tested: no hard negatives are needed then.
    ``asked_for_ithn``: flags that were given ask for it, so without hard negatives this is an InputError.
    """
    annotation = _annotation(config)
    detections = None
    if config.detection_features:
        from modules.data.detection_features import detections_of

        detections = detections_of(config.detection_features, annotation.splits, config.max_detections)
    if config.captioning:
        from modules.data.captions import split_captions

        annotation = split_captions(annotation)
    if tokenizer is None:
        reports = [study.report for study in annotation.splits["train"]]
        backbone = backbone_class(config.model_name)
        tokenizer = build_tokenizer(config, reports, kind=backbone.tokenizer_kind, files=backbone.tokenizer_files)
    if config.beam_size > tokenizer.num_ids:
        raise InputError(f"--beam_size {config.beam_size}: at most the {tokenizer.num_ids} token ids of the vocabulary")
    strategy, index = "off", None
    if trained_with is None:
        strategy, index = hard_negatives(config, annotation, asked=asked_for_ithn)
    labels, tag = None, score_tag(config)
    needed = backbone_class(config.model_name).needs_labels and (trained_with is None or bool(tag))
    if needed or (strategy != "off" and part_of(config, ITHNSettings).needs_labels):
        from modules.labels.study_labels import read_labels

        labels = read_labels(config.label_path, clusters(config), config.label_columns)
        if trained_with is None:
            labels.of(annotation.splits["train"])  # fail now, not after the features
    if tag:
        logger.warning(
            "--xpronet_labels reference: reports are generated from labels that come from the reference "
            "reports; every score of this run is named *_%s and does not measure a model that sees images only",
            tag,
        )
    return Data(
        annotation, tokenizer, strategy, index, trained_with or strategy, detections, labels, labels_leak=bool(tag)
    )


def _annotation(config: Config) -> Annotation:
    """The annotation with the views and sections that are asked for; logs what is not read."""
    annotation = read_annotation(config.ann_path)
    if config.max_views and config.views == "paired":
        annotation = frontal_first(annotation)
    if config.report_sections:
        from modules.data.study_context import with_sections

        annotation, lost = with_sections(annotation, config.report_sections)
        logger.info("--report_sections %s: %d studies without it are left out", config.report_sections, lost)
    most = max_views(config)
    counts = [len(study.image_paths) for studies in annotation.splits.values() for study in studies]
    if config.views == "paired" and (unread := sum(max(0, count - most) for count in counts)):
        logger.info(
            "%d of %d images are not read: of %d studies, which have more, the first %d are (--max_views)",
            unread,
            sum(counts),
            sum(count > most for count in counts),
            most,
        )
    return annotation


def backbone_settings(config: Config) -> BackboneSettings:
    """The settings of the backbone that --model_name names."""
    return part_of(config, settings_class(config.model_name))


def score_tag(config: Config) -> str:
    """What the names of scores carry where generation is given labels of the reference reports; else nothing."""
    return REFERENCE_LABELS if backbone_settings(config).reads_reference_labels else ""


def clusters(config: Config) -> tuple[str, ...]:
    """The label classes in the order of their prototypes."""
    from modules.labels.study_labels import class_order

    return class_order(config.cluster_order, "cluster_order")


def hard_negatives(
    config: Config, annotation: Annotation, *, asked: bool = False
) -> tuple[str, HardNegativeIndex | None]:
    """The strategy that --ithn and the available hard negatives lead to, and the index if one was given.

    ``asked``: a flag that was given asks for ITHN.
    InputError where the strategy needs negatives, or several of them, that are not there.
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
        index.check(annotation, config.mining_flags)
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


def check_images(config: Config, data: Data, splits: Iterable[str]) -> None:
    """InputError for the first image of ``splits`` that is missing, empty or outside its folder; none is opened.

    Where unreadable images are replaced (--on_bad_image skip), a folder is refused that has none of the first ones.
    Call it before weights are fetched, so that a wrong --image_dir is found at once; the main process looks.
    """
    skip = config.on_bad_image == "skip"
    for split in splits if distributed.is_main_process() else ():
        negatives = split == "train" and data.strategy in NEEDING_NEGATIVES
        source, found, missing, problem = _stored_images(config, data, split, negatives=negatives), set(), 0, None
        for study in Bar(data.annotation.splits[split], f"looking for the images of {split}"):
            # In shards the negatives' images lie next to the record's own, as the manifest says.
            own_negatives = negatives and data.index is None and not config.shards
            for path in dict.fromkeys(_paths(config, [study], own_negatives)):
                if path in found:
                    continue
                try:
                    source.locate(path)
                    found.add(path)
                except InputError as error:
                    where = f"--image_dir {config.image_dir}: " * (isinstance(source, ImageFolder) and not found)
                    problem, missing = problem or f"{where}split '{split}', study {study.id!r}: {error}", missing + 1
                    if not skip:
                        raise InputError(problem) from error
            if skip and (found or missing >= FIRST_IMAGES):
                break
        if problem and not found:
            raise InputError(problem)


def _stored_images(config: Config, data: Data, split: str, transform: Any = None, *, negatives: bool) -> Any:
    """What reads the images of a split, for ``transform``: stored features, shards, or the image folder."""
    if data.features is not None:
        return data.features
    if config.shards:
        return shard_source(config, data, split, transform, negatives=negatives)
    return image_folder(config, transform)


def image_transform(config: Config, extractor: "VisualExtractor", *, augment: bool = False) -> Transform:
    """From an image to the input of ``extractor``; ``augment`` adds training's random crop and flip."""
    look = {"size": config.image_size, "mean": extractor.mean, "std": extractor.std, "jpeg_draft": config.jpeg_draft}
    return train_transform(**look, flip=config.flip) if augment else eval_transform(**look)


def image_folder(config: Config, transform: Transform | None = None) -> ImageFolder:
    """Where the annotation's image paths start, read for ``transform`` where that takes drafts of JPEG files."""
    return ImageFolder(config.image_dir, follow_links=config.follow_links, draft=transform and transform.draft)


def shard_source(config: Config, data: Data, split: str, transform: Transform | None, *, negatives: bool) -> Any:
    """The images of a split in --shards; with ``negatives`` those of the hard negatives must be there too.

    InputError for data whose records make several samples.
    """
    from modules.data.shards import Manifest, ShardImages, is_address, neighbours_sha256

    if config.captioning:
        raise InputError(
            f"--shards {config.shards}: a record of --dataset_name {config.dataset_name} makes several "
            "samples, for which shards are not made; give --image_dir"
        )
    if is_address(config.shards) and is_local_only(config.shards):
        raise InputError(
            f"--shards {config.shards}: named by a checkpoint; nothing is read from an address on a file's word: give "
            "the flag again"
        )
    manifest = Manifest.load(config.shards)
    wanted = "annotation" if negatives else None
    if negatives and data.index is not None:
        wanted = neighbours_sha256(data.index.neighbours, manifest.num_neighbours)
    manifest.check(config.shards, data.annotation.sha256, wanted, _drawn_neighbours(config, data))
    if split == "train" and transform is not None:
        manifest.check_size(config.shards, transform.resize or transform.size)
    paths = [study.image_paths for study in data.annotation.splits[split]]
    shards = manifest.shards_of(config.shards, split, len(paths))
    return ShardImages(config.shards, shards, paths, draft=transform and transform.draft)


def _drawn_neighbours(config: Config, data: Data) -> int:
    """Neighbours that a record's hard negative is drawn from."""
    return config.num_neighbours if data.strategy in DRAWING_NEIGHBOURS else 1


def image_source(
    config: Config, studies: Iterable[Study], transform: Transform, *, negatives: bool
) -> "ImageFolder | ImageCache":
    """The images of ``studies``, and with ``negatives`` of the annotation's own hard negatives."""
    images = image_folder(config, transform)
    if not config.image_cache:
        return images
    from modules.data.image_cache import build_image_cache

    return build_image_cache(
        private_folder(config.image_cache),
        images,
        _paths(config, studies, negatives),
        transform=transform,
        workers=worker_processes(config.num_workers),
        progress=Bar,
    )


def views_are_alike(config: Config, data: Data) -> bool:
    """Whether every training sample has the same number of images."""
    most = max_views(config)
    counts = {min(len(study.image_paths), most) for study in data.annotation.splits["train"]}
    return config.views == "separate" or len(counts) == 1


def max_views(config: Config) -> int:
    """Images of a study that are read together, where --views is paired."""
    return 1 if config.detection_features else config.dataset.max_views


def _paths(config: Config, studies: Iterable[Study], negatives: bool) -> list[str]:
    """Every image that samples of ``studies`` show, once."""
    views = None if config.views == "separate" else max_views(config)
    paths: dict[str, None] = {}
    for study in studies:
        paths |= dict.fromkeys(study.image_paths[:views] + (study.negative_image_paths[:views] if negatives else ()))
    return list(paths)


def one_per_image(config: Config, studies: Sequence[Study]) -> Sequence[Study]:
    """``studies``; where every caption of an image is one, the first of each image."""
    if not config.captioning:
        return studies
    from modules.data.captions import first_of_each_image

    return first_of_each_image(studies)


def cache_features(config: Config, data: Data, extractor: "VisualExtractor", device: torch.device) -> None:
    """With --feature_cache, have what is frozen of the extractor see every image once; call it when its weights are in
    place. InputError for an extractor that cannot be cut where --unfreeze says.
    """
    if not config.feature_cache:
        return
    from modules.data.feature_cache import build_feature_cache

    try:
        frozen = extractor.cut() if config.unfreeze else extractor
    except ValueError as error:
        raise InputError(f"--unfreeze {config.unfreeze}: {error}") from error
    studies, transform = itertools.chain(*data.annotation.splits.values()), image_transform(config, extractor)
    data.features = build_feature_cache(
        private_folder(config.feature_cache),
        image_folder(config, transform),
        _paths(config, studies, negatives=True),
        extractor=frozen,
        transform=transform,
        device=device,
        batch_size=config.batch_size,
        progress=Bar,
        workers=worker_processes(config.num_workers),
        dtype=config.feature_dtype,
    )


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
        transform = image_transform(config, extractor, augment=augment)
    neighbours = data.index.neighbours if negatives and data.index is not None else None
    studies = data.annotation.splits[split] if studies is None else studies
    if data.features is not None or config.shards or (split == "train" and not augment):
        # The training split without augmentation is seen once per run: nothing to gain from an image cache.
        source = _stored_images(config, data, split, transform, negatives=negatives)
    else:
        source = image_source(config, studies, transform, negatives=negatives and neighbours is None)
    # Labels that generation must not see are not loaded.
    labelled = data.labels is not None and (split == "train" or data.labels_leak)
    return ReportDataset(
        studies,
        data.tokenizer,
        source,
        transform,
        max_seq_length=config.max_seq_length,
        views=config.views,
        max_views=max_views(config),
        seed=config.seed,
        neighbours=neighbours,
        num_neighbours=_drawn_neighbours(config, data),
        annotation_negatives=negatives and neighbours is None,
        labels=data.labels.of(studies) if labelled else None,
        on_bad_image=config.on_bad_image,
        context=_context(config, data, split) if config.contexts else None,
    )


def _context(config: Config, data: Data, split: str) -> "ContextReader":
    """What is known of the studies of a split beside their images; priors may be any of its studies."""
    from modules.data.study_context import ContextReader

    return ContextReader(data.annotation.splits[split], data.tokenizer, config.contexts, config.max_seq_length)


def build_split_loader(config: Config, dataset: ReportDataset, device: torch.device, *, shuffle: bool) -> EpochLoader:
    """Loader of a split; worker processes of the training split persist between epochs, the others' do not."""
    return build_loader(
        dataset,
        config.batch_size if shuffle else config.eval_batch_size or config.batch_size,
        shuffle,
        worker_processes(config.num_workers),
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
        worker_processes(config.num_workers),
        config.seed,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        timeout=config.worker_timeout,
        shards=dataset.shards(),
    )
    loader.replaced_limit = 1.0  # so few say little; the limit applies to whole splits
    with contextlib.closing(loader):
        yield LimitedLoader(loader, -(-count // config.batch_size)) if config.shards else loader
