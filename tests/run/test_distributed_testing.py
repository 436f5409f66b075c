"""Scores do not depend on the number of processes: each study is generated once, in the batches of one process."""

import pytest
import torch

from modules.flags import parse_flags, resolve_config
from modules.run.build import build_objective, prepare_device
from modules.run.data import build_dataset, build_split_loader, read_data, training_studies
from modules.run.training import build_tester
from modules.runtime import distributed
from tests.conftest import TINY
from tests.gloo_support import run_together


def score(found):
    """Stands for modules.run.scoring.Scoring.validation, in the process that scores."""
    assert distributed.is_main_process()
    return {"words": sum(map(len, found.generated)) / len(found.ids), "METEOR": None}


def evaluated(demo, method: str, views: str, guidance: float) -> dict:
    """Scores and predictions of a random network on the training split, 14 studies, in batches of 4."""
    given, _ = parse_flags(
        [
            *map(
                str,
                [
                    "--ann_path",
                    demo / "annotation.json",
                    "--image_dir",
                    demo / "images",
                    "--device",
                    "cpu",
                    *TINY,
                    "--batch_size",
                    4,
                    "--sample_method",
                    method,
                    "--views",
                    views,
                    "--guidance",
                    guidance,
                ],
            )
        ],
        "main_test.py",
        "",
    )
    config = resolve_config(given)
    device = prepare_device(config)
    data = read_data(config)
    objective = build_objective(config, data, device, pretrained=False)
    dataset = build_dataset(config, data, "train", augment=False, extractor=objective.backbone.visual_extractor)
    loader = build_split_loader(config, dataset, device, shuffle=False)
    torch.rand(distributed.rank())  # what is drawn before must not matter
    with training_studies(config, data, objective.backbone.visual_extractor, device) as guide:
        tester = build_tester(
            config, data.tokenizer, objective, device, score if distributed.is_main_process() else None, guide
        )
        scores, found = tester.evaluate(loader, "test")
    return {
        "scores": scores,
        "ids": [dataset.sample_id(index) for index in range(len(dataset))],
        "found": None if found is None else dict(vars(found)),
    }


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "views", "guidance"), [("beam_search", "paired", 0.0), ("sample", "separate", 2.0)])
def test_scores_of_one_two_and_three_processes_are_equal(demo, tmp_path, method, views, guidance):
    alone = evaluated(demo, method, views, guidance)
    assert alone["found"]["ids"] == alone["ids"] and len(set(alone["found"]["generated"])) > 1
    for world in (2, 3):
        first, *others = run_together(evaluated, world, tmp_path, demo, method, views, guidance)
        assert first["scores"] == alone["scores"]
        for name, value in alone["found"].items():
            same = (
                torch.equal(first["found"][name], value)
                if isinstance(value, torch.Tensor)
                else first["found"][name] == value
            )
            assert same, name
        for other in others:
            assert other["scores"] == first["scores"] and other["found"] is None
