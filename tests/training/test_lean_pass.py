"""The lean pass changes nothing: losses, gradients and statistics are those of the objective itself."""

import copy

import pytest
import torch

from benchmarks.host_path import STRATEGIES
from modules.layers.low_rank import add_adapters
from modules.runtime.environment import autocast
from modules.training.lean_pass import LeanPass
from tests.run.test_plugin import LLAMA
from tests.training.test_gradients import batch, extractor, objective

CPU = torch.device("cpu")


def gradients(step, own, precision):
    """Terms, gradients and buffers after a backward pass; dropout draws the same numbers every time."""
    torch.manual_seed(1)
    with autocast(CPU, precision):
        terms = step(batch(), 2)
    terms["loss"].backward()
    return terms, {name: value.grad for name, value in own.named_parameters()}, dict(own.named_buffers())


@pytest.mark.parametrize("backbone", ["r2gencmn", "r2gen", "xpronet"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_losses_gradients_and_statistics_are_the_objectives_own(backbone, precision):
    for strategy, frozen in (("off", False), ("ithn", True)):
        own = objective(backbone, STRATEGIES[strategy], extractor(frozen))
        other, dtypes = copy.deepcopy(own), {name: value.dtype for name, value in own.named_parameters()}
        expected = gradients(own, own, precision)
        found = gradients(LeanPass(other, precision), other, precision)
        for plain, lean in zip(expected, found, strict=True):
            torch.testing.assert_close(lean, plain, rtol=0, atol=0, equal_nan=True)
        assert {name: value.dtype for name, value in other.named_parameters()} == dtypes


class Adapted(torch.nn.Module):
    """A loss of torch's attention and a linear layer, both with adapters."""

    def __init__(self):
        super().__init__()
        self.attention, self.linear = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Linear(8, 8)
        add_adapters(self, ["attention", "linear"], rank=2, alpha=2)

    def forward(self, given, epoch):
        read = given.positive.images.flatten()[: 3 * 5 * 8].view(3, 5, 8)
        return {"loss": self.linear(self.attention(read, read, read)[0]).square().mean()}


@pytest.mark.parametrize("kind", ["torch", "gpt2", "llama"])
def test_adapters_read_and_learn_what_they_do_without_it(kind):
    """Also with dropout, and where torch's attention reads the sum of weights and adapters."""
    torch.manual_seed(0)
    if kind == "torch":
        own = Adapted()
    else:
        adapters = {"lora_rank": 2, "lora_dropout": 0.3, "lora_targets": "all-linear"}
        more = {"decoder_config": LLAMA} if kind == "llama" else {}
        own = objective("hf", STRATEGIES["ithn"], extractor(True), **adapters, **more)
    for name, value in own.named_parameters():
        if "lora_B" in name:  # 0 at first
            torch.nn.init.normal_(value)
    other = copy.deepcopy(own)
    expected, found = gradients(own, own, "bfloat16"), gradients(LeanPass(other, "bfloat16"), other, "bfloat16")
    for plain, lean in zip(expected, found, strict=True):
        torch.testing.assert_close(lean, plain, rtol=0, atol=0, equal_nan=True)
    learning = {name for name, gradient in found[1].items() if gradient is not None}
    adapters = {name for name in found[1] if "lora_" in name}
    assert adapters <= learning and (kind != "torch" or learning == adapters)


def test_a_pass_that_fails_leaves_the_weights_in_place():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(5, 2))
    weights = list(model.parameters())
    with pytest.raises(RuntimeError), autocast(CPU, "bfloat16"):
        LeanPass(model, "bfloat16")(torch.ones(1, 3))
    assert all(own is kept for own, kept in zip(model.parameters(), weights, strict=True))
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
