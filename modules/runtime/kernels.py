"""Which of torch's kernels a run uses: what is quickest on a GPU of some capability, or by flag repeatable."""

import os

import torch


def choose_kernels(*, tf32: bool, deterministic: bool) -> None:
    """Set torch's switches for this process.

    cuDNN's attention stays off: on Hopper and Blackwell torch prefers it in half precision for the shapes of decoding,
    and it builds a plan for every new number of keys, which is every step.
    """
    # torch by itself allows TF32 in convolutions and not in matrix products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cuda.enable_cudnn_sdp(False)
    if deterministic:
        # cuBLAS reads it at its first call; without it torch refuses some products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True


def tune(wanted: bool) -> None:
    """Have cuDNN time its convolutions for every new number of images, unless only deterministic ones may be used.

    It pays where the numbers repeat, not where every batch of a training has one of its own.
    """
    torch.backends.cudnn.benchmark = wanted and not torch.are_deterministic_algorithms_enabled()


def prefers_channels_last(capability: tuple[int, int] | None, precision: str, tf32: bool) -> bool:
    """Whether images should lie in memory channels last on a GPU of ``capability``, None for a CPU.

    Tensor cores want it: from Volta on in half precision, from Ampere on with TF32. Plain float32 does not, and on
    Volta it can take 1.6 times as long.
    """
    if capability is None:
        return True
    if precision == "float32":
        return tf32 and capability >= (8, 0)
    return capability >= (7, 0)
