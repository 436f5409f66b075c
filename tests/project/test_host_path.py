"""The GPU path without a GPU: what benchmarks/host_path.py counts on the null device, and what torch chooses there.

Two or three processes for the whole file; skipped, with the reason, where the null device cannot be built.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.host_path import BUDGETS, held_against
from benchmarks.null_device import Unavailable, build, environment

ROOT = Path(__file__).resolve().parents[2]
ATTENTION = """
import json
import torch
from modules.runtime.kernels import choose_kernels

def chosen(queries, keys, masked):
    query, key = (torch.empty(16, 8, n, 64, device="cuda", dtype=torch.bfloat16) for n in (queries, keys))
    mask = torch.ones(16, 1, queries, keys, dtype=torch.bool, device="cuda") if masked else None
    return torch._fused_sdp_choice(query, key, key, attn_mask=mask)

decoding = [(3, 40, True), (3, 98, False), (1, 40, False), (3, 178, True), (1, 1, False)]
before = [chosen(*shape) for shape in decoding]
choose_kernels(tf32=False, deterministic=False)
print(json.dumps([before, [chosen(*shape) for shape in decoding]]))
"""
# It leaves without Python's end: torch's own thread may still be letting go of the last step, and a thread that asks
# for the interpreter while it ends brings the process down (pytorch issue 190489).
WAITING = """
import os
import sys
import torch
from benchmarks import null_device
null = null_device.prepare()
from benchmarks.host_cases import StepCase, Steps, make_batch, make_trainer
from benchmarks.host_path import STRATEGIES

steps = Steps(null, "resnet18")
case = StepCase("r2gencmn", STRATEGIES["off"], precision="bfloat16", cuda_graph=True)
objective = steps.objective(case)
objective.register_forward_pre_hook(lambda *_: print("wait", torch.ones(1, device="cuda").item()))
trainer = make_trainer(objective, case, steps.device)
for _ in range(4):
    trainer._step([make_batch(objective.uses_negatives)])
assert not trainer.graphs.possible
sys.stdout.flush()
os._exit(0)
"""
CUDNN = 3  # torch.nn.attention.SDPBackend.CUDNN_ATTENTION
TAKES_CUDNN = not torch.__version__.startswith("2.10.")  # of itself


@pytest.fixture(scope="module")
def library():
    try:
        return build()
    except Unavailable as reason:
        pytest.skip(f"no null device: {reason}")


@pytest.fixture(scope="module")
def counted(library, tmp_path_factory):
    """The rows of the table, and every case as [kind, backbone, case, counts]."""
    out = tmp_path_factory.mktemp("host_path") / "counts.json"
    program = [sys.executable, "benchmarks/host_path.py", "--quick", "--out", str(out)]
    done = subprocess.run(program, cwd=ROOT, env=environment(library), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(out.read_text())["cases"]


def test_no_budget_is_exceeded(counted):
    table, cases = counted
    budgets = json.loads(BUDGETS.read_text())
    assert [row for row in held_against(budgets, cases) if row[4]] == []
    assert {case[1] for case in cases} == set(budgets["backbones"]) and "over" not in table


def test_a_step_waits_for_the_device_never(counted):
    """Whatever the backbone, strategy, precision, clipping, accumulation; nor does the guard, which reads every 25."""
    steps = [case for case in counted[1] if case[0] in ("step", "deep step", "replayed step")]
    assert len(steps) > 40
    waiting = {(name, case): counts for _, name, case, counts in steps if counts.get("waits")}
    assert waiting == {}
    assert {name for _, name, _, counts in steps if counts.get("unpinned_uploads")} == set()


def test_the_counts_are_of_real_work(counted):
    """Each step has launches and products, and the named waits are seen: a device that counts nothing has none."""
    for kind, *_, counts in counted[1]:
        if kind == "replayed step":
            assert counts["graph_launches"] == 1 and counts["launches"] < 60 and not counts.get("captured")
            continue
        # Of a search, the tokens after its recording are one launch each.
        assert counts["launches"] + counts.get("captured", 0) > 500 and counts["products"] > 25
        assert counts.get("waits", 0) == {"named wait": 1, "search": 7}.get(kind, 0)


def test_what_exceeds_its_budget_is_marked():
    budgets = {
        "waits of a search": 8,
        "copies of a step": 2,
        "backbones": {"r2gen": {"launches of a token": {}, "launches of a step": {"a": 9}}},
    }
    cases = [
        ("deep step", "r2gen", "a", {"launches": 6, "products": 4, "downloads": 3}),
        ("step", "r2gen", "b", {"launches": 1, "waits": 1, "unpinned_uploads": 0}),
        ("named wait", "r2gen", "c", {"launches": 1, "waits": 1, "unpinned_uploads": 0}),
    ]
    over = [row[0] for row in held_against(budgets, cases) if row[4]]
    copies = "r2gen: copies between host and device in a step, a"
    assert over == ["r2gen: launches of a step, a", copies, "waits in the worst of 1 cases: step"]


@pytest.mark.parametrize("capability", [90, 100])
def test_decoding_does_not_use_cudnn_attention(library, capability):
    program = [sys.executable, "-c", ATTENTION]
    done = subprocess.run(program, cwd=ROOT, env=environment(library, [capability]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = json.loads(done.stdout)
    assert (CUDNN in before or not TAKES_CUDNN) and CUDNN not in after


@pytest.mark.thorough
def test_steps_go_on_where_one_cannot_be_recorded(library):
    """A wait spoils the recording; torch 2.10 then leaves the generator of random numbers recording."""
    program = [sys.executable, "-c", WAITING]
    done = subprocess.run(program, cwd=ROOT, env=environment(library), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wait") == 4
