"""Studies as training samples: images, tokens, and the hard negative that goes with them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from modules.data.annotations import Study
from modules.data.batches import Batch, Pair, Sample, SamplePair, collate
from modules.data.loaders import EpochLoader, build_loader
from modules.data.sample_order import AUGMENT_NEGATIVE, AUGMENT_POSITIVE, NEIGHBOUR, REPLACEMENT, keyed_generator
from modules.data.tokenizers import Tokenizer, clean_report
from modules.data.transforms import Transform
from modules.runtime.errors import InputError

if TYPE_CHECKING:
    from modules.data.detection_features import DetectionFeatures
    from modules.data.feature_cache import FeatureCache
    from modules.data.study_context import ContextReader

__all__ = ["Batch", "EpochLoader", "Pair", "ReportDataset", "build_loader", "collate"]

MOST_REPLACEMENTS = 100


def list_samples(studies: Sequence[Study], views: str) -> list[tuple[int, int]]:
    """The samples of ``studies``, (row of the study, index of its view): a study each, or each image by itself."""
    return [
        (row, view)
        for row, study in enumerate(studies)
        for view in range(len(study.image_paths) if views == "separate" else 1)
    ]


class ReportDataset(Dataset):
    """The studies of one split as Samples; ``dataset[epoch, index]`` depends on nothing but seed, epoch and index.

    ``views``: "paired" makes a sample of every study with its first ``max_views`` images, "separate" one of every
    image, with the study's report. ``read_image`` maps a path to a PIL image, or to one that is already resized (an
    ImageCache). A FeatureCache or DetectionFeatures passed as both ``read_image`` and ``transform`` gives stored
    features (N, S, C) instead of images.

    Hard negatives come from ``neighbours`` (num_studies, k), rows of ``studies`` best first with -1 for none: the
    nearest, or with ``num_neighbours`` > 1 one drawn uniformly from that many (MoCHi). With ``annotation_negatives``
    they are the studies' own negative reports and images instead.

    ``context`` reads what is known of a study beside its images: texts, and images of the study before, which are the
    second half of a sample's views.

    ``labels`` (num_studies, 14) are those of the samples and, with ``neighbours``, of the negatives. InputError where
    neighbours or labels do not fit the studies.
    """

    def __init__(
        self,
        studies: Sequence[Study],
        tokenizer: Tokenizer,
        read_image: "Callable[[str], Image.Image | np.ndarray] | FeatureCache | DetectionFeatures",
        transform: "Transform | FeatureCache | DetectionFeatures",
        *,
        max_seq_length: int,
        views: str = "paired",
        max_views: int = 2,
        seed: int = 0,
        neighbours: np.ndarray | None = None,
        num_neighbours: int = 1,
        annotation_negatives: bool = False,
        labels: np.ndarray | None = None,
        on_bad_image: str = "stop",
        context: "ContextReader | None" = None,
    ):
        if neighbours is not None:
            _check_neighbours(neighbours, len(studies), num_neighbours)
        if labels is not None and len(labels) != len(studies):
            raise InputError(f"labels: {len(labels)} rows for {len(studies)} studies; every study needs one")
        if labels is not None and annotation_negatives:
            raise InputError("labels: the annotation's own negatives have none; give --negative_index instead")
        self.studies, self.tokenizer, self.read_image, self.transform = studies, tokenizer, read_image, transform
        self.max_seq_length, self.seed, self.on_bad_image = max_seq_length, seed, on_bad_image
        self.neighbours, self.num_neighbours = neighbours, num_neighbours
        self.annotation_negatives, self.labels, self.context = annotation_negatives, labels, context
        self.has_negatives = neighbours is not None or annotation_negatives
        self.separate = views == "separate"
        # A data set with one image per study has no second view to leave empty.
        most = max((len(study.image_paths) for study in studies), default=1)
        self.num_views = 1 if self.separate else min(max_views, most)
        self.samples = list_samples(studies, views)
        self.report_keys = _report_keys(studies, tokenizer.cleaner)
        self.text_keys: dict[str, int] = {}
        if annotation_negatives:
            texts = (clean_report(study.report, tokenizer.cleaner) for study in studies)
            self.text_keys = dict(zip(texts, self.report_keys, strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        """Sample (epoch, index), or index in epoch 0. InputError names study and file of an unreadable image;
        with ``on_bad_image`` "skip" another sample, chosen by seed, epoch and index, replaces it.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            return self._sample(epoch, index)
        except InputError as error:
            if self.on_bad_image == "stop":
                raise
            problem = str(error)
        rng = keyed_generator(self.seed, epoch, REPLACEMENT, index)
        for other in torch.randint(len(self), (MOST_REPLACEMENTS,), generator=rng).tolist():
            try:
                return replace(self._sample(epoch, other), replaced=True)
            except InputError:
                continue
        raise InputError(f"{problem}; nor could {MOST_REPLACEMENTS} other samples be read")

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample | InputError]:
        """What workers call: an unreadable image is returned as its error, for the loader to raise."""
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return [error]

    def sample_id(self, index: int) -> str:
        """The study's id, with the view where every image is a sample."""
        row, view = self.samples[index]
        return f"{self.studies[row].id}#{view}" if self.separate else self.studies[row].id

    def token_counts(self) -> list[int]:
        """Length in tokens of every sample's report, cut as in training."""
        counts = [min(len(self.tokenizer.encode(study.report)), self.max_seq_length) for study in self.studies]
        return [counts[row] for row, _ in self.samples]

    def shards(self) -> list[list[int]] | None:
        """The samples of each shard, where images come from shards; else None."""
        if not hasattr(self.read_image, "of_record"):
            return None
        samples: dict[int, list[int]] = {}
        for index, (row, _) in enumerate(self.samples):
            samples.setdefault(row, []).append(index)
        return [[index for row in shard.rows for index in samples[row]] for shard in self.read_image.shards]

    def _sample(self, epoch: int, index: int) -> Sample:
        row, view = self.samples[index]
        study = self.studies[row]
        positive = self._pair(study, row, view, (epoch, AUGMENT_POSITIVE, index), row)
        negative, negative_key = self._negative(epoch, index) if self.has_negatives else (None, 0)
        return Sample(
            positive=positive,
            negative=positive if self.has_negatives and negative is None else negative,
            has_negative=negative is not None,
            negative_key=negative_key if negative is not None else self.report_keys[row],
            sample_index=index,
            report_key=self.report_keys[row],
            id=self.sample_id(index),
            report=study.report,
            transform=self.transform,
        )

    def _negative(self, epoch: int, index: int) -> tuple[SamplePair | None, int]:
        """The hard negative and its report key; of a text that no study has, a key of its own below 0."""
        anchor, view = self.samples[index]
        if self.annotation_negatives:
            row, study = anchor, self.studies[anchor]
            if study.negative_report is None or not study.negative_image_paths:
                return None, 0
            key = self.text_keys.get(clean_report(study.negative_report, self.tokenizer.cleaner), -1 - row)
            study = replace(study, report=study.negative_report, image_paths=study.negative_image_paths)
        else:
            admissible = self.neighbours[anchor][self.neighbours[anchor] >= 0][: self.num_neighbours]
            if len(admissible) == 0:
                return None, 0
            rng = keyed_generator(self.seed, epoch, NEIGHBOUR, index)
            row = int(admissible[torch.randint(len(admissible), (), generator=rng)])
            study, key = self.studies[row], self.report_keys[row]
        return self._pair(study, row, view, (epoch, AUGMENT_NEGATIVE, index), anchor), key

    def _pair(self, study: Study, row: int, view: int, key: tuple[int, int, int], anchor: int) -> SamplePair:
        """Images and report of ``study``; where every image is a sample, the one at ``view``, or the first.

        Shards keep the images with the record at row ``anchor``, whose sample shows them.
        """
        # ShardImages has the method; its module is imported where shards are read only.
        read = self.read_image.of_record(anchor) if hasattr(self.read_image, "of_record") else self.read_image
        paths = study.image_paths[: self.num_views]
        if self.separate and view < len(study.image_paths):
            paths = (study.image_paths[view],)
        slots: list[str | None] = [*paths, *[None] * (self.num_views - len(paths))]
        if self.context is not None and self.context.prior_images:
            prior = self.context.prior(study)
            paths = prior.image_paths[: self.num_views] if prior else ()
            slots += [*paths, *[None] * (self.num_views - len(paths))]
        images = self.transform.blank(len(slots))
        for position, path in enumerate(slots):
            if path is not None:
                image = _naming(study, read, path)
                images[position] = self.transform.pixels(image, keyed_generator(self.seed, *key, position))
        return SamplePair(
            images=images,
            view_mask=torch.tensor([path is not None for path in slots]),
            tokens=torch.tensor(self.tokenizer.encode(study.report)[: self.max_seq_length]),
            labels=None if self.labels is None else torch.as_tensor(self.labels[row], dtype=torch.float32),
            context=self.context.tokens(study) if self.context is not None and self.context.texts else None,
        )


def _naming(study: Study, read: Callable, path: str) -> "Image.Image | np.ndarray | torch.Tensor":
    """``read(path)``; an InputError gets the study's name."""
    try:
        return read(path)
    except InputError as error:
        raise InputError(f"split '{study.split}', study {study.id!r}: {error}") from error


def _check_neighbours(neighbours: np.ndarray, num_studies: int, num_neighbours: int) -> None:
    if neighbours.ndim != 2 or len(neighbours) != num_studies:
        raise InputError(f"negative index: shape {neighbours.shape}, expected a row for each of {num_studies} studies")
    if neighbours.min() < -1 or neighbours.max() >= num_studies:
        raise InputError(f"negative index: holds rows outside -1..{num_studies - 1}; mine it again")
    if neighbours.shape[1] < num_neighbours:
        raise InputError(
            f"--num_neighbours {num_neighbours}: the negative index holds {neighbours.shape[1]} per study; "
            "mine with a larger --top_k"
        )


def _report_keys(studies: Sequence[Study], cleaner: str) -> list[int]:
    """One number per study, equal for studies connected by the same cleaned text or the same study_id."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(name: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]  # halves the path, without which one text of all is a chain of them
            name = parent[name]
        return name

    texts = [("text", clean_report(study.report, cleaner)) for study in studies]
    for study, text in zip(studies, texts, strict=True):
        parent[root(("study", study.study_id))] = root(text)
    numbers: dict[tuple[str, str], int] = {}
    return [numbers.setdefault(root(text), len(numbers)) for text in texts]
