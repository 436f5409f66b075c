"""Fused kernels that deviate on a device, or raise there, are not used; those of a GPU are written out here."""

import logging

import pytest
import torch
from torch import Tensor

from modules.layers import batch_statistics, device_check, fused_recurrence, relational_memory, visual_extractor
from modules.layers.device_check import DeviceCheck, Difference, difference
from modules.layers.relational_memory import RelationalMemory
from modules.layers.visual_extractor import VisualExtractor
from tests.layers import test_batch_statistics as norms
from tests.layers.test_fused_recurrence import cell, cell_backward

torch.set_num_threads(1)
CPU = torch.device("cpu")


def attend(query: Tensor, key: Tensor, value: Tensor, seed: Tensor, dropout: float) -> Tensor:
    probs = (query @ key.transpose(-2, -1) / query.size(-1) ** 0.5).softmax(-1)
    kept = torch.rand(probs.shape, generator=torch.Generator().manual_seed(int(seed))) >= dropout
    return probs * kept / (1 - dropout) @ value


def attention(query, key, value, bias, with_sums, dropout):
    seed = torch.randint(2**31, ())
    attended = attend(query, key, value, seed, dropout).transpose(1, 2).contiguous().transpose(1, 2)
    return attended, torch.empty(0), seed, torch.tensor(0)


def attention_backward(grad, query, key, value, bias, attended, sums, seed, offset, dropout, wanted):
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (query, key, value)]
        again = attend(*given, seed, dropout)
    return *torch.autograd.grad(again, given, grad), None


def another_mask(*given):
    *before, seed, offset, dropout, wanted = given
    return attention_backward(*before, seed + 1, offset, dropout, wanted)


def no_mask(*given):
    *before, dropout, wanted = given
    return attention_backward(*before, 0.0, wanted)


def dropped_to_nan(*given):
    attended, *rest = attention(*given)
    return attended.log() if given[-1] else attended, *rest


def scaled(kernel, which=0):
    """``kernel`` with a result that is a little larger."""

    def wrong(*given):
        found = kernel(*given)
        if isinstance(found, Tensor):
            return found * 1.05
        return *found[:which], found[which] * 1.05, *found[which + 1 :]

    return wrong


def raising(*_):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


RECURRENCE = {
    "cell": cell,
    "cell_backward": cell_backward,
    "attention": attention,
    "attention_backward": attention_backward,
}
NORMS = {name: getattr(norms, name) for name in ("statistics", "apply_statistics", "backward_reduce", "backward_apply")}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No check has been made, and the kernels of a GPU are written out."""
    for module, kernels in ((fused_recurrence, RECURRENCE), (batch_statistics, NORMS)):
        for name, kernel in kernels.items():
            monkeypatch.setattr(module, name, kernel)
    for check in (relational_memory.KERNELS, batch_statistics.KERNELS):
        monkeypatch.setattr(check, "passed", {})
    monkeypatch.setattr(relational_memory, "is_possible", lambda *_: True)
    monkeypatch.setitem(visual_extractor.COUNTED_BY, "cpu", 8)


class Recurrent:
    """R2Gen's memory in training; ``fused`` counts the uses of the fused kernels."""

    check, name = relational_memory.KERNELS, "R2Gen's relational memory"

    def __init__(self, monkeypatch):
        torch.manual_seed(0)
        self.memory, self.words, self.fused = RelationalMemory(32, 3, 2), torch.randn(4, 5, 32), 0
        apply = relational_memory.FusedRecurrence.apply

        def counted(*given):
            self.fused += given[0].shape == (5, 4, 32)  # not the check's own problem
            return apply(*given)

        monkeypatch.setattr(relational_memory.FusedRecurrence, "apply", counted)

    def take(self) -> Tensor:
        return self.memory(self.words)

    def plain(self) -> Tensor:
        known = self.words.transpose(0, 1), self.memory.token_gates(self.words.transpose(0, 1))
        kept = torch.nn.functional.dropout(torch.ones(5, 3, 4, 4, 2), 0.1)
        return relational_memory.Recurrence.apply(
            *known, self.memory.initial(self.words), 2, kept, *self.memory.weights()
        )


class Normalising:
    """Images with batch normalisation in training, of studies of which one lacks a view."""

    check, name = batch_statistics.KERNELS, "batch normalisation of the present images"

    def __init__(self, monkeypatch):
        torch.manual_seed(0)
        self.extractor = VisualExtractor("resnet18", image_size=32).train()
        self.extractor.model = norms.Sizes()
        self.images, self.there = torch.randn(3, 2, 3, 32, 32), torch.ones(3, 2, dtype=torch.bool)
        self.there[1, 1] = False

    @property
    def fused(self) -> int:
        return sum(size == 8 for size in self.extractor.model.seen)

    def take(self) -> Tensor:
        return self.extractor(self.images, self.there)[0]

    def plain(self) -> Tensor:
        whole = self.extractor.model(self.images.flatten(0, 1)[self.there.flatten()]).flatten(2).transpose(1, 2)
        whole = torch.cat([whole[:3], torch.zeros(1, 16, 6), whole[3:]])
        return whole.unflatten(0, (3, 2)).flatten(1, 2)


PATHS = (Recurrent, Normalising)
WRONG = [
    (Recurrent, fused_recurrence, "cell", scaled(cell)),
    (Recurrent, fused_recurrence, "cell", scaled(cell, 1)),
    (Recurrent, fused_recurrence, "cell", scaled(cell, 2)),
    (Recurrent, fused_recurrence, "cell_backward", scaled(cell_backward)),
    (Recurrent, fused_recurrence, "cell_backward", scaled(cell_backward, 1)),
    (Recurrent, fused_recurrence, "cell_backward", raising),
    (Recurrent, fused_recurrence, "attention", scaled(attention)),
    (Recurrent, fused_recurrence, "attention", dropped_to_nan),
    (Recurrent, fused_recurrence, "attention", raising),
    (Recurrent, fused_recurrence, "attention_backward", scaled(attention_backward)),
    (Recurrent, fused_recurrence, "attention_backward", scaled(attention_backward, 1)),
    (Recurrent, fused_recurrence, "attention_backward", scaled(attention_backward, 2)),
    (Recurrent, fused_recurrence, "attention_backward", another_mask),
    (Recurrent, fused_recurrence, "attention_backward", no_mask),
    (Normalising, batch_statistics, "statistics", scaled(norms.statistics)),
    (Normalising, batch_statistics, "statistics", raising),
    (Normalising, batch_statistics, "apply_statistics", scaled(norms.apply_statistics)),
    (Normalising, batch_statistics, "backward_reduce", scaled(norms.backward_reduce)),
    (Normalising, batch_statistics, "backward_reduce", scaled(norms.backward_reduce, 1)),
    (Normalising, batch_statistics, "statistics", scaled(norms.statistics, 1)),
    (Normalising, batch_statistics, "backward_apply", scaled(norms.backward_apply)),
    (Normalising, batch_statistics, "backward_apply", raising),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tf32", [False, True])
def test_right_kernels_are_used_and_checked_once(monkeypatch, caplog, path, tf32):
    case, compared, compare = path(monkeypatch), [], path.check.compare

    def noted(*given):
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.is_autocast_enabled("cpu")
        compared.append(given)
        return compare(*given)

    monkeypatch.setattr(case.check, "compare", noted)
    products, states, before = torch.backends.cuda.matmul, [], torch.backends.cuda.matmul.allow_tf32
    products.allow_tf32 = tf32
    try:
        for _ in range(2):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=path is Recurrent):
                case.take()
            states.append(torch.get_rng_state())
        assert products.allow_tf32 == tf32
    finally:
        products.allow_tf32 = before
    assert torch.equal(*states), "the check draws no number of the run"
    assert len(compared) == 1 and case.fused == 2 and not caplog.records


@pytest.mark.parametrize("path, module, name, kernel", WRONG)
def test_wrong_kernels_are_not_used(monkeypatch, caplog, path, module, name, kernel):
    case = path(monkeypatch)
    monkeypatch.setattr(module, name, kernel)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, "ithn"):
        first, _ = case.take(), case.take()
    assert not case.fused
    torch.manual_seed(3)
    assert torch.equal(first, case.plain())
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{case.name}: fused kernels are not used on cpu: ") and line.endswith("are unaffected")
    assert ("RuntimeError: no kernel image is available for execution" in line) == (kernel is raising)
    assert ("the largest relative difference is " in line) == (kernel is not raising)


def test_differences_stay_far_from_what_is_allowed():
    for check, sizes in ((relational_memory.KERNELS, (3, 2, 32)), (batch_statistics.KERNELS, ())):
        found = [each.value / each.most for each in check.compare(CPU, *sizes)]
        assert max(found) < 0.5, found


def test_a_check_within_a_pass_without_gradients(monkeypatch):
    case = Recurrent(monkeypatch)
    with torch.inference_mode():
        case.take()
    assert case.fused == 1


def test_one_that_comes_up_while_a_graph_is_recorded_waits(monkeypatch):
    compared = []
    check = DeviceCheck("a path", lambda device: compared.append(device) or [Difference(0.0, 1.0)])
    monkeypatch.setattr(check, "_worst", lambda device: max(check.compare(device)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    gpu = torch.device("cuda:0")
    assert not check.passes(gpu) and not compared
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert check.passes(gpu) and check.passes(gpu) and compared == [gpu]


def test_on_a_null_device_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(device_check, "_nothing_is_computed", False)
    check = DeviceCheck("a path", raising)
    device_check.pass_unchecked()
    assert check.passes(CPU)


def test_what_is_not_a_number_is_no_rounding():
    one = torch.ones(2)
    for bad in (float("nan"), float("inf")):
        assert not difference([one, one * bad], [one, one], 0.5).is_rounding()
    assert difference([one, one * 1.25], [one, one], 0.3) == Difference(0.25, 0.3)
