"""Kernels by GPU: the memory layout of images, and torch's switches."""

import pytest
import torch

from modules.runtime.kernels import choose_kernels, prefers_channels_last


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
