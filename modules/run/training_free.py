"""The training-free baselines of a test: they need the data and the visual extractor, and no decoder."""

from typing import Any

import torch
from torch import Tensor

from modules.config import Config
from modules.data.tokenizers import cut_report
from modules.evaluation.baselines import COMMONEST, NEAREST, commonest_report_baseline, nearest_image_baseline
from modules.evaluation.tester import Predictions
from modules.ithn.objective import Objective
from modules.run.data import Data, build_dataset, build_split_loader, one_per_image
from modules.runtime import distributed
from modules.runtime.environment import autocast
from modules.runtime.run_log import Bar


def training_free_reports(
    config: Config, data: Data, objective: Objective, device: torch.device, found: Predictions | None
) -> dict[str, list[str]]:
    """The baselines' reports by name: the commonest training report, and that of the most similar training image.

    Of an image's captions the commonest is sought among all; the first is the image's reference. All processes compute
    features; only the main one, which has ``found``, gets reports.
    """
    if not config.floors:
        return {}
    extractor, studies = objective.backbone.visual_extractor, data.annotation.splits["train"]
    dataset = build_dataset(
        config, data, "train", augment=False, extractor=extractor, studies=one_per_image(config, studies)
    )
    gathered = _pooled_features(
        objective, build_split_loader(config, dataset, device, shuffle=False), device, config.precision
    )
    if gathered is None or found is None:  # not the main process, which scores
        return {}
    ids, features = gathered
    texts = [cut_report(study.report, data.tokenizer, config.max_seq_length) for study in dataset.studies]
    # By id: an unreadable image is replaced by another sample.
    by_id = {dataset.sample_id(index): texts[row] for index, (row, _) in enumerate(dataset.samples)}
    per_sample = [by_id[sample] for sample in ids]
    every = (
        [cut_report(study.report, data.tokenizer, config.max_seq_length) for study in studies]
        if config.captioning
        else per_sample
    )
    return {
        COMMONEST: commonest_report_baseline(every, len(found.ids)),
        NEAREST: nearest_image_baseline(features.numpy(), per_sample, found.visual_features.numpy()),
    }


@torch.inference_mode()
def _pooled_features(
    objective: Objective, loader: Any, device: torch.device, precision: str
) -> tuple[list[str], Tensor] | None:
    """The samples' ids, and their pooled visual features (N, C) on the CPU; in the main process only."""
    objective.eval()
    ids, pooled = [], []
    for batch in Bar(loader, "features of the training images"):
        pair = batch.to(device).positive
        with autocast(device, precision):
            pooled.append(objective.backbone.extract(pair.images, pair.view_mask).pooled.float().cpu())
        ids.append(batch.ids)
    gathered = distributed.gather_batches(ids, pooled)
    if gathered is None:
        return None
    return [name for batch in gathered[0] for name in batch], torch.cat(gathered[1])
