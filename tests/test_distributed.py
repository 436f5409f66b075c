"""Two processes with batch B against one with batch 2B, in float64, and the identity of one process."""

import torch
import torch.distributed as dist
from tiny_backbone import TinyBackbone, rows_of, tiny_batch
from torch.nn.parallel import DistributedDataParallel

from modules import distributed
from modules.objective import Objective

LENGTHS, NEGATIVE_LENGTHS = [5, 9, 4, 7, 3, 8], [6, 3, 12, 5, 4, 4]
WORLD = 2


def build() -> Objective:
    torch.manual_seed(0)
    return Objective(TinyBackbone(), embedding_dim=5, alpha=0.5, detach_negative=False, mask_identical=True,
                     previous_epoch_start=True, n_samples=6).double()


def whole_batch():
    batch = tiny_batch(LENGTHS, NEGATIVE_LENGTHS)
    batch.has_negative[4] = False
    batch.report_key[5] = batch.report_key[0]
    return batch


def two_epochs(objective, wrapped, batch) -> dict:
    """Losses and gradients of the second epoch, and what the first one left behind."""
    wrapped(batch, 2)["loss"].backward()
    objective.zero_grad()
    terms = wrapped(batch, 3)
    terms["loss"].backward()
    return {"terms": {name: value.detach() for name, value in terms.items()},
            "gradients": {name: parameter.grad for name, parameter in objective.named_parameters()},
            "kept": objective.previous.harder}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    objective = build()
    rows = slice(0, 3) if rank == 0 else slice(3, 6)
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
    torch.save(two_epochs(objective, wrapped, rows_of(whole_batch(), rows)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, args=(str(tmp_path),), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    objective = build()
    expected = two_epochs(objective, objective, whole_batch())
    exact = {"rtol": 1e-10, "atol": 1e-10}
    for result in found:
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, **exact, msg=name)
        torch.testing.assert_close(result["kept"], expected["kept"], rtol=1e-6, atol=1e-6)
        for name in ("contrastive", "cosine", "cos_harder", "retrieval_accuracy"):
            torch.testing.assert_close(result["terms"][name], expected["terms"][name], **exact, msg=name)
    mean = sum(result["terms"]["loss"] for result in found) / WORLD
    torch.testing.assert_close(mean, expected["terms"]["loss"], **exact)


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.is_distributed(), distributed.rank(), distributed.world_size()) == (False, 0, 1)
    assert distributed.gather_with_gradient(x) is distributed.gather(x) is distributed.all_reduce_sum(x) is x
