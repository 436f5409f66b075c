"""--compile: the same losses and gradients as without it, and one known place where the compiled graph ends."""

import shutil

import pytest
import torch

from tests.models.test_costs import GivenFeatures, batch, objective
from tests.tiny_backbone import make_objective, tiny_batch

torch.set_num_threads(1)


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
    assert counters["graph_break"] and all("topk_attention" in reason for reason in counters["graph_break"])


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
