"""Batches of images that are filled up in training, with the kernels that need a GPU written out."""

import pytest
import torch
from torch import Tensor, nn

from modules.layers import batch_statistics, visual_extractor
from modules.layers.batch_statistics import StatisticsOfFirst
from modules.layers.visual_extractor import VisualExtractor

torch.set_num_threads(1)


def _shaped(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).sum(1)


def statistics(x: Tensor, eps: float):
    """torch.batch_norm_stats: mean and 1 / standard deviation, (C,) each."""
    values = _at_least_float32(x).transpose(0, 1).flatten(1)
    return values.mean(1), (values.var(1, correction=0) + eps).rsqrt()


def apply_statistics(x, weight, bias, mean, inverse, eps):
    """torch.batch_norm_elemt."""
    normalised = (x - _shaped(mean, x)) * _shaped(inverse, x)
    return (normalised if weight is None else normalised * _shaped(weight, x) + _shaped(bias, x)).to(x.dtype)


def backward_reduce(grad, x, mean, inverse, weight, of_input, of_weight, of_bias):
    """torch.batch_norm_backward_reduce: sums of grad and of grad (x - mean), gradients of weight and bias."""
    of_grad, product = _sum(_at_least_float32(grad)), _sum(grad * (x - _shaped(mean, x)))
    return of_grad, product, product * inverse if of_weight else None, of_grad if of_bias else None


def backward_apply(grad, x, mean, inverse, weight, of_grad, product, values):
    """torch.batch_norm_backward_elemt."""
    assert values.dtype == torch.int32
    centred = (x - _shaped(mean, x)) * _shaped(inverse**2 * product / values, x)
    scale = inverse if weight is None else inverse * weight
    return ((grad - _shaped(of_grad / values, x) - centred) * _shaped(scale, x)).to(x.dtype)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    for replacement in (statistics, apply_statistics, backward_reduce, backward_apply):
        monkeypatch.setattr(batch_statistics, replacement.__name__, replacement)
    monkeypatch.setattr(batch_statistics.KERNELS, "passed", {})


def trained(extractor: VisualExtractor, images: Tensor, present: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state after a step over ``images`` (B, N, 3, H, W)."""
    extractor.zero_grad()
    patches, _, pooled = extractor(images, present)
    weights = torch.linspace(-1, 1, patches.numel(), dtype=patches.dtype).view_as(patches)
    ((patches * weights).sum() + pooled.square().sum()).backward()
    gradients = {f"gradient of {name}": value.grad for name, value in extractor.named_parameters()}
    return {"patches": patches, "pooled": pooled} | gradients | extractor.state_dict()


@pytest.mark.parametrize("batch_norm, channels_last", [("joint", True), ("per_view", False)])
def test_a_step_over_images_that_are_filled_up_is_the_same(monkeypatch, batch_norm, channels_last):
    torch.manual_seed(0)
    extractor = VisualExtractor("resnet18", image_size=32, batch_norm=batch_norm, channels_last=channels_last).double()
    start = {name: value.clone() for name, value in extractor.state_dict().items()}
    images, present = torch.randn(4, 2, 3, 32, 32, dtype=torch.float64), torch.ones(4, 2, dtype=torch.bool)
    present[1:3, 1] = False
    found, sizes = [], []
    extractor.model.register_forward_pre_hook(lambda _, inputs: sizes[-1].append(len(inputs[0])))
    for multiple in (1, 8):
        monkeypatch.setitem(visual_extractor.COUNTED_BY, "cpu", multiple)
        extractor.load_state_dict(start)
        sizes.append([])
        step = trained(extractor.train(), images, present)
        found.append({name: value.detach().clone() for name, value in step.items()})
    assert sizes == ([[6], [8]] if batch_norm == "joint" else [[4, 2], [8, 8]])
    plain, filled = found
    assert any(not torch.equal(filled[name], start[name]) for name in start if "running_var" in name)
    for name in plain:
        torch.testing.assert_close(
            filled[name], plain[name], rtol=1e-5, atol=1e-6, msg=lambda text, of=name: f"{of}: {text}"
        )


def test_layers_without_weights_or_running_statistics_and_those_that_rest():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    plain, resting = nn.BatchNorm1d(3, affine=False, track_running_stats=False), nn.BatchNorm1d(3).eval()
    inputs = [x[:3].clone().requires_grad_(), x.clone().requires_grad_()]
    expected = plain.double()(inputs[0])
    with StatisticsOfFirst(3):
        found, rested = plain(inputs[1]), resting.double()(x)
    torch.testing.assert_close(found[:3], expected)
    assert torch.equal(rested, resting(x)) and torch.equal(resting.running_mean, torch.zeros_like(resting.running_mean))
    expected.square().sum().backward()
    found[:3].square().sum().backward()
    torch.testing.assert_close(inputs[1].grad[:3], inputs[0].grad)
    assert not inputs[1].grad[3:].any()


class Sizes(nn.Module):
    """Notes the number of images of each call; batch normalisation makes them depend on one another in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.BatchNorm2d(6))
        self.seen = []

    def forward(self, images):
        self.seen.append(len(images))
        return self.layers(images)


@pytest.mark.parametrize("training", [False, True])
def test_numbers_of_images_repeat(monkeypatch, training):
    """An epoch of 30 batches of 16 studies with one view or two, as on a GPU and as on a CPU."""
    torch.manual_seed(0)
    extractor = VisualExtractor("resnet18", image_size=32)
    extractor.model = Sizes()
    extractor.train(training)
    images, sizes, outputs = torch.randn(16, 2, 3, 32, 32), [], []
    start = {name: value.clone() for name, value in extractor.state_dict().items()}
    for multiple in (1, 8):
        monkeypatch.setitem(visual_extractor.COUNTED_BY, "cpu", multiple)
        extractor.load_state_dict(start)
        extractor.model.seen.clear()
        draw, found = torch.Generator().manual_seed(1), []
        for _ in range(30):
            there = torch.ones(16, 2, dtype=torch.bool)
            there[:, 1] = torch.rand(16, generator=draw) < 0.6
            found.append(extractor(images * there[..., None, None, None], there)[0].detach())
        sizes.append(set(extractor.model.seen))
        outputs.append((torch.stack(found), *extractor.model.layers[1].buffers()))
    assert len(sizes[0]) > 6 and sizes[1] <= {16, 24, 32}
    for plain, filled in zip(*outputs, strict=True):
        torch.testing.assert_close(filled, plain)


def test_statistics_of_all_processes_leave_the_number_as_it_is(monkeypatch):
    monkeypatch.setitem(visual_extractor.COUNTED_BY, "cpu", 8)
    extractor = VisualExtractor("resnet18", image_size=32)
    extractor.model = Sizes()
    extractor.model.layers[1] = nn.SyncBatchNorm(6)
    extractor.train()(torch.randn(3, 2, 3, 32, 32), torch.tensor([[True, True], [True, False], [True, True]]))
    assert extractor.model.seen == [5]
