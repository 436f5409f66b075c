"""Several processes, joined by gloo: they compute what one does, and one process is the identity."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from modules.ithn.objective import Objective
from modules.mining.cosine_search import top_k_cosine
from modules.runtime import distributed
from modules.training.sync_norm import with_common_statistics
from tests.gloo_support import run_together
from tests.tiny_backbone import make_objective, rows_of, tiny_batch

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7, 3, 8], [6, 3, 12, 5, 4, 4]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


# ---- the objective


def build() -> Objective:
    return make_objective(alpha=0.5, detach_negative=False, mask_identical=True, previous_epoch_start=True, n_samples=6)


def whole_batch():
    batch = tiny_batch(LENGTHS, NEGATIVE_LENGTHS)
    batch.has_negative[4] = False
    batch.report_key[5] = batch.report_key[0]
    return batch


def two_epochs() -> dict:
    """Losses and gradients of the second epoch on this process's rows, and what the first one left behind."""
    objective, share = build(), len(LENGTHS) // distributed.world_size()
    if not distributed.is_main_process():  # the first process's weights count
        nn.init.zeros_(objective.backbone.logit.weight)
    parallel = distributed.data_parallel(objective)
    batch = rows_of(whole_batch(), slice(distributed.rank() * share, (distributed.rank() + 1) * share))
    parallel(batch, 2)["loss"].backward()
    objective.zero_grad()
    terms = parallel(batch, 3)
    terms["loss"].backward()
    return {
        "terms": {name: value.detach() for name, value in terms.items()},
        "gradients": {name: parameter.grad for name, parameter in objective.named_parameters()},
        "kept": objective.previous.harder,
    }


def test_two_processes_equal_one(tmp_path):
    found, expected = run_together(two_epochs, 2, tmp_path), two_epochs()
    for result in found:
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, **EXACT, msg=name)
        torch.testing.assert_close(result["kept"], expected["kept"], rtol=1e-6, atol=1e-6)
        for name in ("contrastive", "cosine", "cos_harder", "retrieval_accuracy"):
            torch.testing.assert_close(result["terms"][name], expected["terms"][name], **EXACT, msg=name)
    assert torch.equal(found[0]["kept"], found[1]["kept"])
    mean = sum(result["terms"]["loss"] for result in found) / 2
    torch.testing.assert_close(mean, expected["terms"]["loss"], **EXACT)


def compiled() -> dict:
    """Gradients of the second epoch, of the objective as it is and compiled."""
    found, share = [], len(LENGTHS) // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for backend in (None, "aot_eager"):
        objective = build()
        if backend:
            objective.compile(backend=backend)
        parallel = distributed.data_parallel(objective)
        for epoch in (2, 3):
            objective.zero_grad()
            parallel(rows_of(whole_batch(), own), epoch)["loss"].backward()
        found.append([parameter.grad for parameter in objective.parameters()])
    return {"eager": found[0], "compiled": found[1]}


@pytest.mark.slow
def test_compiled_processes_have_the_same_gradients(tmp_path):
    for result in run_together(compiled, 2, tmp_path):
        torch.testing.assert_close(result["compiled"], result["eager"], **EXACT)


# ---- batch normalisation


def normalised() -> dict:
    """Outputs, gradients and running statistics of a network with batch normalisation on this process's rows."""
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.BatchNorm1d(5, momentum=None),
    ).double()
    images = torch.randn(7, 3, 5, 5, dtype=torch.float64)
    # Of two processes one has 4 rows, the other 3.
    own = images[distributed.rank() :: distributed.world_size()]
    network = with_common_statistics(layers)
    names = list(network.state_dict())
    parallel, out = distributed.data_parallel(network), None
    for _ in range(2):
        network.zero_grad()
        out = parallel(own)
        (out.pow(3).sum() * distributed.world_size()).backward()
    evaluated = network.eval()(images)
    return {
        "out": out.detach(),
        "names": names,
        "evaluated": evaluated.detach(),
        "gradients": [parameter.grad for parameter in network.parameters()],
        "buffers": [buffer.double() for buffer in network.buffers()],
    }


def test_common_statistics_are_those_of_one_process_with_all_rows(tmp_path):
    found, expected = run_together(normalised, 2, tmp_path), normalised()
    for rank, result in enumerate(found):
        torch.testing.assert_close(result["out"], expected["out"][rank::2], **EXACT)
        torch.testing.assert_close(result["gradients"], expected["gradients"], **EXACT)
        torch.testing.assert_close(result["buffers"], expected["buffers"], **EXACT)
        torch.testing.assert_close(result["evaluated"], expected["evaluated"], **EXACT)
        assert "1.num_batches_tracked" in result["names"]


# ---- what travels


def travelled() -> dict:
    """What comes of five batches shared out in turn, and of values that one process knows."""
    rank, world = distributed.rank(), distributed.world_size()
    texts = [{"ids": [f"é{number}"]} for number in range(5)][rank::world]
    rows = [torch.full((2 if number < 4 else 1, 3), number, dtype=torch.float64) for number in range(5)][rank::world]
    gathered, few = distributed.gather_batches(texts, rows), distributed.gather_batches(texts[:1], rows[:1])
    values = distributed.broadcast_object({"BLEU": 0.1, "METEOR": None} if rank == 0 else None)
    with distributed.main_process_first():
        pass
    table = distributed.broadcast_rows(np.ones((2, 3), np.float32) if rank == 0 else None, (2, 3))
    layer = nn.BatchNorm1d(2)
    layer.running_mean.fill_(rank)
    distributed.average_running_statistics(layer)
    weights = nn.Linear(1, 1)
    weights.weight.data.fill_(rank)
    distributed.broadcast_weights(weights)
    return {
        "ids": None if gathered is None else [text["ids"][0] for text in gathered[0]],
        "rows": None if gathered is None else torch.cat(gathered[1])[:, 0].tolist(),
        "few": None if few is None else len(few[0]),
        "values": values,
        "table": float(table.sum()),
        "mean": layer.running_mean.tolist(),
        "weight": weights.weight.item(),
    }


@pytest.mark.thorough
def test_what_travels_arrives_in_order(tmp_path):
    alone = travelled()
    assert alone["ids"] == ["é0", "é1", "é2", "é3", "é4"] and alone["rows"] == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    for world in (2, 3, 6):  # of six processes one has no batch
        first, *others = run_together(travelled, world, tmp_path)
        assert first == alone | {"few": min(world, 5), "mean": [(world - 1) / 2] * 2}
        for other in others:
            assert other == first | {"ids": None, "rows": None, "few": None}


# ---- mining


def mined() -> dict:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(900, 12)).astype(np.float32)
    vectors[500:600] = vectors[:100]  # ties
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = rng.integers(0, 300, 900)
    index, similarity = top_k_cosine(vectors, 5, [np.arange(900), groups], memory_mb=1)
    return {"index": torch.from_numpy(index), "similarity": torch.from_numpy(similarity)}


def test_a_shared_search_finds_the_same_bytes(tmp_path):
    alone = mined()
    for result in run_together(mined, 3, tmp_path):
        assert torch.equal(result["index"], alone["index"]) and torch.equal(result["similarity"], alone["similarity"])


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    module = nn.Linear(1, 1)
    assert (distributed.is_distributed(), distributed.rank(), distributed.world_size()) == (False, 0, 1)
    assert distributed.gather_with_gradient(x) is distributed.gather(x) is distributed.all_reduce_sum(x) is x
    assert distributed.broadcast_object(x) is x and distributed.data_parallel(module) is module


def test_on_a_gpu_the_wrapper_moves_no_input(monkeypatch):
    """Given device_ids, it would upload the number of tokens in every batch, and wait."""
    given = {}
    on_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 0))]))
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "broadcast_weights", lambda module: None)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda module, **settings: given.update(settings))
    distributed.data_parallel(on_gpu)
    assert given["gradient_as_bucket_view"] and given.get("device_ids") is None
