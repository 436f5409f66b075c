"""What probe_image_leakage.py measures: report features read under their own, another and the mean image.

Shapes: B samples of a batch, E width of the joint embedding, D of the hidden states, K reports and images of the grid.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import VisualFeatures
from modules.data.annotations import Study
from modules.ithn.objective import Objective

TEXT_WIDTH = 256  # singular vectors of tf-idf


def study_groups(studies: Sequence[Study]) -> list[int]:
    """A number for each record, equal for records that share a study or an image (views, captions)."""
    owner: dict[str, int] = {}
    groups = []
    for number, study in enumerate(studies):
        names = (f"study {study.study_id}", *(f"image {path}" for path in study.image_paths))
        group = next((owner[name] for name in names if name in owner), number)
        owner |= dict.fromkeys(names, group)
        groups.append(group)
    return groups


def partners(groups: Tensor) -> Tensor:
    """For each row (B,) of a batch the nearest row before it, cyclically, of another group; -1 where there is none."""
    found = torch.full_like(groups, -1)
    rows = torch.arange(len(groups), device=groups.device)
    for shift in range(1, len(groups)):
        other = (rows - shift) % len(groups)
        found = torch.where((found < 0) & (groups[other] != groups), other, found)
    return found


@dataclass
class Readings:
    """Features of one batch; ``report`` (B, E), ``under_mean`` (B, E) and ``moved`` (b, E) were read under the own
    image, the mean image, and the image of row ``partner`` (b,), for the ``rows`` (b,) that have such a row."""

    groups: Tensor  # (B,)
    texts: list[str]
    image: Tensor  # (B, E)
    report: Tensor
    under_mean: Tensor
    moved: Tensor
    rows: Tensor
    partner: Tensor


@torch.inference_mode()
def read_batches(objective: Objective, batches: Iterable, groups: Sequence[int], device: Any) -> list[Readings]:
    """Readings of every batch of two studies or more; ``groups`` by sample, the backbone knows its mean image."""
    found, numbers = [], torch.tensor(groups)
    for batch in batches:
        own = numbers[batch.sample_index].to(device)  # (B,)
        partner = partners(own)
        rows = (partner >= 0).nonzero().squeeze(1)
        if not len(rows):
            continue
        pair = batch.to(device).positive
        features = objective.backbone.extract(pair.images, pair.view_mask)
        embedded = objective.embed(pair)  # as in training
        # Labels say something about the study too: XProNet's, of the first one for all.
        alike = pair.labels if pair.labels is None else pair.labels[:1].expand_as(pair.labels)
        mean = objective.read(dataclasses.replace(pair, labels=alike), objective.backbone.mean_study(features))
        moved = objective.read(*under(pair, features, rows, partner[rows]))
        under_mean, moved = objective.text_projection(mean), objective.text_projection(moved)
        parts = (embedded.image, embedded.report, under_mean, moved, rows, partner[rows])
        found.append(Readings(own.cpu(), batch.reports, *(part.cpu() for part in parts)))
    return found


def under(pair: Any, features: VisualFeatures, rows: Tensor, images: Tensor) -> tuple[Any, VisualFeatures]:
    """The reports of ``rows`` (b,), and the studies of ``images`` (b,) to read them under."""
    views, labels = pair.view_mask[images.cpu()], None if pair.labels is None else pair.labels[images]
    moved = dataclasses.replace(
        pair, tokens=pair.tokens[rows], token_mask=pair.token_mask[rows], view_mask=views, labels=labels
    )
    mask = None if features.patch_mask is None else features.patch_mask[images]
    return moved, VisualFeatures(features.patches[images], mask, features.pooled[images])


def retrieval(image: Tensor, report: Tensor, groups: Tensor) -> Tensor:
    """Whether each image's (B, E) own report (B, E) is its nearest; other records of the study do not compete."""
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    same.fill_diagonal_(False)
    similarity = (image @ report.T).masked_fill(same, -torch.inf)
    return similarity.argmax(1) == torch.arange(len(image))


def follow(readings: Sequence[Readings]) -> dict[str, float]:
    """Means over all samples: retrieval accuracies within batches, and which image a moved report is nearer to."""
    under_image = [(r.moved * r.image[r.partner]).sum(1) for r in readings]
    own_image = [(r.moved * r.image[r.rows]).sum(1) for r in readings]
    found = {
        "retrieval": [retrieval(r.image, r.report, r.groups) for r in readings],
        "retrieval_mean": [retrieval(r.image, r.under_mean, r.groups) for r in readings],
        "read_under": [a > b for a, b in zip(under_image, own_image, strict=True)],
        "cos_under": under_image,
        "cos_own": own_image,
    }
    return {name: float(torch.cat(values).double().mean()) for name, values in found.items()}


def text_only_retrieval(
    train: Sequence[Readings], tested: Sequence[Readings], ridge: float = 1.0, folds: int = 5
) -> float:
    """Retrieval accuracy within batches of a feature that cannot see the image: a ceiling for what texts alone give.

    A ridge regression from the reports' tf-idf, reduced to singular vectors, to z (E,), fitted on ``train``. If these
    are the tested batches, each sample is predicted by a regression that has not seen its study.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold, cross_val_predict

    texts = [text for r in train for text in r.texts]
    images = torch.cat([r.image for r in train]).double().numpy()
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", ngram_range=(1, 2), sublinear_tf=True)
    words = vectorizer.fit_transform(texts)
    reduced = TruncatedSVD(min(TEXT_WIDTH, *(size - 1 for size in words.shape)), random_state=0)
    vectors = reduced.fit_transform(words)
    if tested is train:
        groups = torch.cat([r.groups for r in train]).numpy()
        split = GroupKFold(min(folds, len(np.unique(groups))))
        predicted = cross_val_predict(Ridge(ridge), vectors, images, groups=groups, cv=split)
    else:
        words = vectorizer.transform([text for r in tested for text in r.texts])
        predicted = Ridge(ridge).fit(vectors, images).predict(reduced.transform(words))
    parts = torch.from_numpy(predicted).split([len(r.image) for r in tested])
    right = [
        retrieval(r.image.double(), part / part.norm(dim=1, keepdim=True).clamp(min=1e-12), r.groups)
        for r, part in zip(tested, parts, strict=True)
    ]
    return float(torch.cat(right).double().mean())


@torch.inference_mode()
def grid_features(objective: Objective, batches: Iterable, groups: Sequence[int], size: int, device: Any) -> Tensor:
    """Mean hidden states (K, K, D) of K reports (second axis) read under each of K images (first axis).

    K is ``size``, or the number of studies in the first batch that holds so many or the most.
    """
    best, numbers = None, torch.tensor(groups)
    for batch in batches:
        own = numbers[batch.sample_index]
        first = torch.tensor([row for row, group in enumerate(own.tolist()) if group not in own[:row].tolist()])
        if best is None or len(first) > len(best[1]):
            best = batch, first
        if len(best[1]) >= size:
            break
    assert best is not None
    pair, rows = best[0].to(device).positive, best[1][:size].to(device)
    features = objective.backbone.extract(pair.images, pair.view_mask)
    return torch.stack([objective.read(*under(pair, features, rows, row.expand(len(rows)))).cpu() for row in rows])


def variance_shares(values: Tensor) -> dict[str, float]:
    """Two-way analysis of variance of ``values`` (I images, R reports, D): shares of the total sum of squares.

    "image" and "report" are the main effects, "both" is their interaction.
    """
    values = values.double()
    centred = values - values.mean((0, 1))
    by_image, by_report = centred.mean(1, keepdim=True), centred.mean(0, keepdim=True)
    total = centred.square().sum().clamp(min=1e-300)
    image = by_image.square().sum() * values.shape[1] / total
    report = by_report.square().sum() * values.shape[0] / total
    return {"image": float(image), "report": float(report), "both": float(1 - image - report)}
