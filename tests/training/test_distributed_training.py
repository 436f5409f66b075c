"""Training in two processes: what the trainer makes of their shares is what one process makes of the whole."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from modules.data.sample_order import EpochBatchSampler
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.runtime import distributed
from modules.runtime.stopping import GracefulShutdown
from modules.training.settings import LoopSettings, OptimSettings
from modules.training.trainer import Trainer
from tests.gloo_support import run_together
from tests.tiny_backbone import TinyBackbone, rows_of, tiny_batch

SAMPLES, BATCH = 22, 2  # the last batch of an epoch is smaller, and can be shared out evenly


class Shares:
    """This process's batches of a made-up data set, whole ones in one process."""

    def __init__(self):
        torch.manual_seed(2)
        lengths = torch.randint(3, 12, (2, SAMPLES)).tolist()
        self.batch = tiny_batch(*lengths)
        self.batch.has_negative[::5] = False
        world = distributed.world_size()
        size = BATCH * (1 if world == 2 else 2)
        self.sampler = EpochBatchSampler(SAMPLES, size, True, 3, distributed.rank(), world)

    def set_epoch(self, epoch, seen=0):
        self.sampler.set_epoch(epoch, seen)

    def __iter__(self):
        for keys in self.sampler:
            yield rows_of(self.batch, [index for _, index in keys])

    def __len__(self):
        return len(self.sampler)


class Noisy(TinyBackbone):
    """With dropout, whose draws must differ between processes, and with batch normalisation in evaluation mode."""

    def __init__(self, dropout: float):
        super().__init__()
        self.visual_extractor = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))
        self.dropout = dropout

    def train(self, mode: bool = True):
        super().train(mode)
        self.visual_extractor[1].eval()
        return self

    def forward(self, images, tokens, **rest):
        output = super().forward(images, tokens, **rest)
        output.report_features = nn.functional.dropout(output.report_features, self.dropout, self.training)
        return output


def build(dropout: float = 0.0, epochs: int = 2, **options) -> Trainer:
    torch.manual_seed(0)
    settings = ITHNSettings(embedding_dim=5, alpha=0.5, previous_epoch_start=True)
    objective = Objective(Noisy(dropout), settings, n_samples=SAMPLES).double()
    optim = {
        "optim": "SGD",
        "lr_ve": 0.05,
        "lr_ed": 0.05,
        "weight_decay": 0.0,
        "lr_scheduler": "ReduceLROnPlateau",
        "gamma": 0.5,
        "plateau_patience": 0,
        "epochs": epochs,
        "grad_accumulation": 2,
        "clip_norm": 0.7,
    }
    scores = {"BLEU_4": [0.2, 0.3, 0.1], "BLEU_3": [0.1, 0.1, 0.1]}
    return Trainer(
        objective,
        OptimSettings(**optim | options),
        LoopSettings(),
        loader=Shares(),
        # Only the main process has scores to decide by.
        validate=lambda epoch: distributed.broadcast_object(
            {name: values[epoch - 1] for name, values in scores.items()} if distributed.is_main_process() else None
        ),
        likelihood=lambda epoch: {},
        save=lambda trainer, improved: None,
        on_epoch=lambda history: None,
        shutdown=GracefulShutdown(),
        device=torch.device("cpu"),
        precision="float32",
        seed=4,
    )


def trained() -> dict:
    """Two epochs; every rank's weights, history and memory of the negatives."""
    trainer = build()
    trainer.train()
    return {
        "weights": trainer.objective.state_dict(),
        "best": (trainer.best.epoch, trainer.best.score),
        "history": [{name: value for name, value in row.items() if name != "seconds"} for row in trainer.history],
        "samples": trainer.position.total_steps,
    }


def test_two_processes_train_as_one(tmp_path):
    alone, found = trained(), run_together(trained, 2, tmp_path)
    for name, value in found[0]["weights"].items():
        assert torch.equal(value, found[1]["weights"][name]), name
        # The memory is float32.
        close = 1e-6 if name.startswith("previous.") else 1e-10
        torch.testing.assert_close(value, alone["weights"][name], rtol=close, atol=close, msg=name)
    assert found[0]["history"] == found[1]["history"] and found[0]["best"] == found[1]["best"] == (2, 0.3)
    for row, other in zip(found[0]["history"], alone["history"], strict=True):
        assert {name: pytest.approx(value, rel=1e-6) for name, value in other.items() if name != "train_nll"} == {
            name: value for name, value in row.items() if name != "train_nll"
        }
    # One process's mean over a batch's tokens is not the mean of two halves' means, but near it.
    assert found[0]["history"][0]["train_nll"] == pytest.approx(alone["history"][0]["train_nll"], rel=0.1)


def resumed() -> dict:
    """With dropout: the weights after two epochs, straight and with a new trainer in the middle of the second."""
    whole, part = build(dropout=0.5), build(dropout=0.5)
    kept = {}

    def keep(trainer, improved):
        if (trainer.position.epoch, trainer.position.steps) == (2, 1):
            kept.update(copy.deepcopy({"state": trainer.state_dict(), "objective": trainer.objective.state_dict()}))

    whole.loop, whole.save = replace(whole.loop, checkpoint_steps=1), keep
    whole.train()
    part.objective.load_state_dict(kept["objective"])
    part.load_state_dict(kept["state"])
    torch.manual_seed(99)
    part.train()
    drawn = nn.functional.dropout(torch.ones(64), 0.5)  # what the last step left the generator at
    return {
        "whole": whole.objective.state_dict(),
        "part": part.objective.state_dict(),
        "drawn": drawn,
        "histories": [
            [{name: value for name, value in row.items() if name != "seconds"} for row in found]
            for found in (whole.history, part.history)
        ],
    }


def test_a_resumed_training_is_exact_and_each_process_draws_its_own(tmp_path):
    found = run_together(resumed, 2, tmp_path)
    for result in found:
        assert all(torch.equal(value, result["part"][name]) for name, value in result["whole"].items())
        assert result["histories"][0] == result["histories"][1]
    assert not torch.equal(found[0]["drawn"], found[1]["drawn"])


def bad_step() -> dict:
    """One process meets a loss that is not finite."""
    trainer = build(epochs=1, grad_accumulation=1)
    if not distributed.is_main_process():
        trainer.loader.set_epoch(1)
        (_, sample), *_ = next(iter(trainer.loader.sampler))
        trainer.loader.batch.positive.images[sample] = float("nan")
    trainer.train()
    return {"weights": trainer.objective.state_dict(), "row": trainer.history[0]}


def test_a_bad_number_in_one_process_skips_the_step_of_all(tmp_path):
    found = run_together(bad_step, 2, tmp_path)
    for result in found:
        assert result["row"]["train_skipped_steps"] == 1
        assert all(value.isfinite().all() for value in result["weights"].values())
    assert found[0]["row"]["train_loss"] == found[1]["row"]["train_loss"]
    assert all(torch.equal(value, found[1]["weights"][name]) for name, value in found[0]["weights"].items())
