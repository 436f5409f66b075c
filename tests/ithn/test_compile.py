"""--compile: the same losses and gradients as without it, and one graph for all epochs."""

import json
import random
import shutil

import pytest
import torch

from benchmarks.host_cases import graphs
from benchmarks.host_path import BUDGETS, STRATEGIES
from modules.layers.cross_modal_memory import MemoryResponse
from modules.layers.relational_memory import RelationalMemory
from tests.models.test_costs import GivenFeatures, batch, objective
from tests.tiny_backbone import make_objective, tiny_batch

torch.set_num_threads(1)
COUNTED = json.loads(BUDGETS.read_text())["backbones"]


@pytest.mark.slow  # the compiler takes half a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++")
def test_a_compiled_objective_computes_the_same():
    from torch._dynamo.utils import counters

    given = batch((5, 12), True)
    found = []
    for compiled in (False, True):
        own = objective(GivenFeatures(), "ithn").eval()  # dropout draws other numbers when compiled
        if compiled:
            own.compile()
        terms = own(given, 1)
        terms["loss"].backward()
        found.append((terms, {name: value.grad for name, value in own.named_parameters() if value.grad is not None}))
    for plain, fast in zip(*found, strict=True):
        assert plain.keys() == fast.keys()
        for name in plain:
            torch.testing.assert_close(fast[name], plain[name], rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]


class Response(torch.nn.Module):
    """R2GenCMN's reading of a memory."""

    def __init__(self):
        super().__init__()
        self.read, self.rows = MemoryResponse(8, num_heads=2, topk=3), torch.nn.Parameter(torch.randn(7, 8))

    def forward(self, x):
        return self.read(x, *self.read.keys_values(self.rows))


@pytest.mark.parametrize("make", [Response, lambda: RelationalMemory(8, num_slots=3, num_heads=2)])
def test_a_memory_is_one_operation_of_a_graph_with_the_same_gradients(make):
    torch.manual_seed(0)
    own, given = make().eval(), torch.randn(2, 5, 8)
    found = []
    for call in (own, torch.compile(own, backend="aot_eager", fullgraph=True)):
        own.zero_grad()
        x = given.clone().requires_grad_()
        result = call(x)
        result.square().sum().backward()
        found.append([result.detach(), x.grad, *(parameter.grad for parameter in own.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert all(part.abs().sum() > 0 for part in found[1][:3])


@pytest.mark.slow
def test_the_memory_of_the_previous_epoch_changes_no_compiled_gradient():
    """Its buffers are read and written within one step; the compiled backward pass must not read them again."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        own = make_objective(alpha=0.5, detach_negative=False, previous_epoch_start=True, n_samples=3)
        if compiled:
            own.compile(backend="aot_eager")
        for epoch in (2, 3):
            own.zero_grad()
            own(tiny_batch([5, 9, 4], [6, 3, 8]), epoch)["loss"].backward()
        found.append([parameter.grad for parameter in own.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.thorough
@pytest.mark.parametrize("strategy", ["ithn", "mochi"])
def test_one_graph_serves_all_epochs_and_lengths_and_computes_the_same(strategy):
    """Hardness changes every epoch, lengths every batch; the last batch and the last accumulated step are smaller."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    own, plain = (make_objective(strategy=strategy, alpha=0.5) for _ in range(2))
    own.compile(backend="eager")
    draw = random.Random(0)
    for epoch in range(1, 21):
        for rows, share in ((3, 0.5), (2, 1.0)):
            lengths = [[draw.randint(3, 9) for _ in range(rows)] for _ in range(2)]
            given, count = tiny_batch(*lengths, seed=epoch), torch.tensor(epoch + 7)
            found, expected = (each(given, epoch, token_count=count, share=share) for each in (own, plain))
            assert found.keys() == expected.keys() and found["loss"].dtype == expected["loss"].dtype
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert own.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", COUNTED)
def test_twenty_epochs_make_few_graphs(backbone):
    budget = COUNTED[backbone]["graphs of 20 epochs"]
    number, breaks = graphs(backbone, STRATEGIES["ithn"], torch.device("cpu"))
    assert number <= budget
    assert not breaks
