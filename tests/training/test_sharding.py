"""--shard_parameters: two processes that share the weights out train, save and resume as one that has them all."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.encoder_decoder import EncoderDecoder, Settings
from modules.config import Config
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.runtime.sharding import Shards
from modules.runtime.stopping import GracefulShutdown, Stopped
from modules.training.settings import LoopSettings, OptimSettings
from modules.training.trainer import Trainer
from tests.gloo_support import run_together
from tests.tiny_backbone import VOCABULARY
from tests.training.test_distributed_training import SAMPLES, Shares

CPU = torch.device("cpu")


class Views(nn.Module):
    """The mean colour of every view is its one patch."""

    width = 6

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 6)

    def forward(self, images, view_mask=None):
        patches = self.layer(images.mean((-1, -2)))
        return patches, view_mask, patches.mean(1)


def build(optim="AdamW", shared=True, **options) -> Trainer:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_ff": 8, "num_heads": 2, "num_layers": 2, "dropout": 0.0}
    backbone = EncoderDecoder(visual_extractor=Views(), num_ids=VOCABULARY, settings=Settings(**sizes | options))
    backbone.recompute_activations()
    settings = ITHNSettings(embedding_dim=5, alpha=0.5, previous_epoch_start=True)
    objective = Objective(backbone, settings, n_samples=SAMPLES).double()
    together = shared and distributed.is_distributed()
    rates = {"lr_ve": 0.01, "lr_ed": 0.01, "lr_scheduler": "constant"}
    scores = {"BLEU_4": [0.2, 0.3], "BLEU_3": [0.1, 0.1]}
    trainer = Trainer(
        objective,
        OptimSettings(optim=optim, epochs=2, grad_accumulation=2, clip_norm=0.7, adam_eps=1e-4, **rates),
        LoopSettings(),
        loader=Shares(),
        validate=lambda epoch: {name: values[epoch - 1] for name, values in scores.items()},
        save=lambda trainer, improved: None,
        likelihood=lambda epoch: {},
        on_epoch=lambda history: None,
        shutdown=GracefulShutdown(),
        device=CPU,
        precision="float32",
        seed=4,
        shards=Shards(objective, backbone.blocks(), device=CPU, dtype=torch.float64) if together else None,
    )
    return trainer


def results(trainer) -> dict:
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in trainer.history]
    return {"weights": trainer.weights(), "history": history, "optimizer": trainer.state_dict()["optimizer"]}


def trained(optim: str, options: dict) -> dict:
    """Two epochs, straight and continued in the middle of the second; each time the weights at the end."""
    whole, kept = build(optim, **options), {}

    def keep(trainer, improved):
        state = copy.deepcopy({"state": trainer.state_dict(), "objective": trainer.weights()})
        if (trainer.position.epoch, trainer.position.steps) == (2, 1):
            kept.update(distributed.broadcast_object(state))  # as if each process had read the file

    whole.loop, whole.save = replace(whole.loop, checkpoint_steps=1), keep
    shares = sum(value.to_local().numel() for value in whole.parallel.module.parameters()) if whole.shards else 0
    whole.train()
    part = build(optim, **options)
    part.load_weights(kept["objective"])
    part.load_state_dict(kept["state"])
    part.train()
    found = {"whole": results(whole), "part": results(part), "shares": shares, "kept": kept["objective"]}
    with whole.whole():
        found["shapes"] = {name: list(value.shape) for name, value in whole.objective.named_parameters()}
        features = whole.objective.backbone.extract(Shares().batch.positive.images)
        # Each process may do as many steps as it likes.
        for _ in range(1 + distributed.rank()):
            found["seen"] = whole.objective.backbone.eval()(
                None, torch.zeros(22, 1).long(), features=features
            ).log_probs
    return found


def stopped() -> list[int]:
    """The steps after which a signal to one process has ended both."""
    trainer = build()
    step = trainer._step

    def with_signal(batches):
        step(batches)
        if distributed.rank() == 1 and trainer.position.steps == 1:
            trainer.shutdown.number = 15

    trainer._step = with_signal
    try:
        trainer.train()
    except Stopped:
        return [trainer.position.epoch, trainer.position.steps]
    return []


def bad_step() -> dict:
    """One process meets images that are not finite."""
    trainer = build("SGD")
    trainer.optim = replace(trainer.optim, epochs=1)
    if not distributed.is_main_process():
        trainer.loader.set_epoch(1)
        (_, sample), *_ = next(iter(trainer.loader.sampler))
        trainer.loader.batch.positive.images[sample] = float("nan")
    trainer.train()
    return {"weights": trainer.weights(), "row": trainer.history[0]}


def all_of_it(optim: str, options: dict) -> dict:
    """In one start of the processes."""
    return trained(optim, options) | {"stopped": stopped(), "bad": bad_step()}


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("optim", "options"), [("AdamW", {}), pytest.param("SGD", {"lora_rank": 2}, marks=pytest.mark.slow)]
)
def test_two_processes_that_share_the_weights_are_one_that_has_them(tmp_path, optim, options):
    alone, (main, other) = trained(optim, options), run_together(all_of_it, 2, tmp_path, optim, options)
    assert not other["whole"]["weights"] and main["whole"]["weights"].keys() == alone["whole"]["weights"].keys()
    for name, value in alone["whole"]["weights"].items():
        for found in (main["whole"], main["part"]):
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert main["whole"]["history"] == main["part"]["history"] == other["whole"]["history"]
    for number, state in alone["whole"]["optimizer"]["state"].items():
        for name, value in state.items():
            found = main["part"]["optimizer"]["state"][number][name]
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
    # What is whole again is what it was, and the first layer of each parameter lies in both processes.
    numbers = [value.numel() for value in main["kept"].values()]
    assert main["shapes"] == alone["shapes"] and main["shapes"]["temp_1"] == []
    assert main["shares"] + other["shares"] <= sum(numbers) and min(main["shares"], other["shares"]) > 0
    torch.testing.assert_close(main["seen"], alone["seen"], rtol=1e-6, atol=1e-6)
    assert torch.equal(main["seen"], other["seen"])

    # A signal to one process has ended both after the same step.
    assert main["stopped"] == other["stopped"] == [1, 2]
    # A bad number in one process has skipped the step of both.
    assert main["bad"]["row"]["train_skipped_steps"] == other["bad"]["row"]["train_skipped_steps"] == 1
    assert all(value.isfinite().all() for value in main["bad"]["weights"].values())


def trained_parameters() -> dict:
    """Which parameters are trained where they are shared out, and where they are whole again."""
    settings = ITHNSettings(embedding_dim=5, strategy="contrastive", contrastive_form="triplet")
    sizes = {"d_model": 8, "d_ff": 8, "num_heads": 2, "num_layers": 1}
    backbone = EncoderDecoder(visual_extractor=Views(), num_ids=VOCABULARY, settings=Settings(**sizes))
    objective = Objective(backbone, settings)
    before = {name: value.requires_grad for name, value in objective.named_parameters()}
    shards = Shards(objective, backbone.blocks(), device=CPU, dtype=torch.float32)
    after = {name: value.requires_grad for name, value in objective.named_parameters()}
    with shards.whole():
        whole = {name: value.requires_grad for name, value in objective.named_parameters()}
    return {"before": before, "after": after, "whole": whole}


@pytest.mark.thorough
def test_a_number_that_is_not_trained_is_not_trained_where_it_is_shared_out(tmp_path):
    for found in run_together(trained_parameters, 2, tmp_path):
        assert found["before"] == found["after"] == found["whole"] and not found["after"]["temp_1"]


@pytest.mark.parametrize("other", ["compile", "self_critical", "sync_bn"])
def test_what_does_not_go_together_is_refused(other):
    with pytest.raises(InputError, match=f"--shard_parameters true: does not go with --{other}; leave one of them out"):
        Config(shard_parameters=True, **{other: True})
