"""Kernels by GPU: the memory layout of images, and torch's switches."""

from types import SimpleNamespace

import pytest
import torch

from modules.config import Config
from modules.run.data import views_are_alike
from modules.runtime.kernels import choose_kernels, prefers_channels_last, tune


@pytest.mark.parametrize(
    ("capability", "precision", "tf32", "wanted"),
    [
        (None, "float32", False, True),  # a CPU
        ((6, 1), "float16", False, False),
        ((7, 0), "float32", True, False),  # has no TF32
        ((7, 0), "float16", False, True),
        ((8, 0), "float32", False, False),
        ((8, 0), "float32", True, True),
        ((9, 0), "bfloat16", False, True),
    ],
)
def test_images_lie_channels_last_where_tensor_cores_take_part(capability, precision, tf32, wanted):
    assert prefers_channels_last(capability, precision, tf32) is wanted


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose_kernels(tf32=False, deterministic=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_convolutions_are_tuned_where_asked_and_never_where_only_deterministic_ones_may_run():
    try:
        tune(True)
        assert torch.backends.cudnn.benchmark
        tune(False)
        assert not torch.backends.cudnn.benchmark
        torch.use_deterministic_algorithms(True)
        tune(True)
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("counts", "views", "alike"),
    [((2, 2), "paired", True), ((2, 1), "paired", False), ((3, 2), "paired", True), ((2, 1), "separate", True)],
)
def test_numbers_of_images_repeat_where_all_studies_have_as_many(counts, views, alike):
    studies = [SimpleNamespace(image_paths=("x.png",) * count) for count in counts]
    data = SimpleNamespace(annotation=SimpleNamespace(splits={"train": studies}))
    assert views_are_alike(Config(views=views), data) is alike
