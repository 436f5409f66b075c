"""--compile: the same losses and gradients as without it, and one known place where the compiled graph ends."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_costs import GivenFeatures, batch, objective

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
