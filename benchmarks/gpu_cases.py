"""What scripts/gpu_check.py runs: training steps and searches with published sizes, and tiny ones to compare values.

Weights and data are random, and nothing is downloaded.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.host_cases import GivenFeatures, StepCase, build_backbone, make_batch, make_trainer
from models import backbone_class, settings_class
from models.base import Backbone, VisualFeatures
from modules.data.batches import Batch
from modules.decoding.options import DecodingOptions
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.environment import autocast
from modules.training.settings import LoopSettings
from modules.training.trainer import Trainer

WORDS, SIDE = 760, 224  # published: IU X-Ray's vocabulary, the side of an image
TINY_SIDE, TINY_LENGTH = 64, 12
HALF = "half"  # bfloat16 where the GPU computes in it, float16 where not
# Trainers that capture whole steps as CUDA graphs have this setting.
CAN_CAPTURE = "cuda_graph" in LoopSettings.__dataclass_fields__


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """A training step of R2GenCMN with ITHN whose time is measured."""

    precision: str = HALF
    tf32: bool = False
    channels_last: bool = True
    batch_size: int = 16
    views: int = 2
    length: int = 60
    side: int = SIDE
    compiled: bool = False
    captured: bool = False

    def __str__(self) -> str:
        parts = [
            f"{self.precision}{' with TF32' if self.tf32 else ''}",
            "channels last" if self.channels_last else "channels first",
            f"batch {self.batch_size}, {self.views} view{'s' if self.views > 1 else ''}, {self.length} tokens",
            *([f"{self.side} px, narrow"] if self.side != SIDE else []),
            *(["compiled"] if self.compiled else []),
            *(["one CUDA graph"] if self.captured else []),
        ]
        return ", ".join(parts)


STEPS = (
    TimedStep("float32", channels_last=False),
    TimedStep("float32"),
    TimedStep("float32", tf32=True),
    TimedStep(channels_last=False),
    TimedStep(),
    *([TimedStep(captured=True)] if CAN_CAPTURE else []),
    TimedStep(views=1),
    TimedStep(views=1, batch_size=64, length=100),
    TimedStep(compiled=True),
)
TINY_STEP = {"batch_size": 2, "length": TINY_LENGTH, "side": TINY_SIDE}
# Backbone, strategy, precision: whose waits are looked for.
WAITING = (
    ("r2gencmn", "ithn", HALF),
    ("r2gencmn", "contrastive", "float16"),
    ("r2gen", "ithn", "float32"),
    ("xpronet", "off", HALF),
    ("visualgpt", "ithn", "float16"),
)
SEARCHES: tuple[dict[str, Any], ...] = (
    {"beam_size": 3},
    {"sample_method": "greedy"},
    {"beam_size": 4, "group_size": 2},
    {"beam_size": 3, "guidance": 0.5},
)


def half_precision(device: torch.device) -> str:
    """The half precision that ``--precision auto`` chooses on a GPU."""
    with torch.cuda.device(device):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def tiny_objective(name: str, strategy: str) -> Objective:
    """A backbone 32 wide on ResNet-18 under ``strategy``; the same weights at every call."""
    torch.manual_seed(0)
    backbone = build_backbone(name, VisualExtractor("resnet18", image_size=TINY_SIDE))
    return Objective(backbone, ITHNSettings(strategy=strategy, embedding_dim=16), n_samples=4)


def tiny_trainer(name: str, strategy: str, precision: str, device: torch.device) -> tuple[Trainer, list[Batch]]:
    """A trainer of such an objective on ``device``, and the batch of its step."""
    objective = tiny_objective(name, strategy).to(device).train()
    group = [make_batch(objective.uses_negatives, length=TINY_LENGTH)]
    return make_trainer(objective, StepCase(name, precision=precision), device), group


def timed_trainer(step: TimedStep, device: torch.device) -> tuple[Trainer, list[Batch]]:
    """The trainer and batch of ``step``: published sizes on ResNet-101, and for small images ResNet-18."""
    torch.manual_seed(0)
    tiny, rows = step.side != SIDE, step.batch_size
    extractor = VisualExtractor(
        "resnet18" if tiny else "resnet101", channels_last=step.channels_last, image_size=step.side
    )
    backbone = build_backbone("r2gencmn", extractor) if tiny else published_backbone("r2gencmn", extractor)
    objective = Objective(backbone, ITHNSettings(strategy="ithn"), n_samples=rows).to(device).train()
    if step.compiled:
        objective.compile()
    trainer = make_trainer(objective, StepCase("r2gencmn", precision=step.precision), device)
    if step.captured:
        trainer.loop = dataclasses.replace(trainer.loop, cuda_graph=True)
    sizes = {"rows": rows, "views": step.views, "side": step.side, "words": 50 if tiny else WORDS}
    return trainer, [make_batch(True, length=step.length, **sizes)]


def published_backbone(name: str, extractor: torch.nn.Module) -> Backbone:
    """The backbone ``name`` with its published sizes."""
    return backbone_class(name)(visual_extractor=extractor, num_ids=WORDS + 1, settings=settings_class(name)())


def take_step(trainer: Trainer, group: list[Batch]) -> None:
    """One optimiser step."""
    trainer._step(group)
    trainer.position.steps += 1


def milliseconds(work: Callable[[], object], device: torch.device, times: int, warm: int = 4) -> tuple[float, float]:
    """Of one call among ``times`` in a row: until the device is done, and until the host could go on."""
    for _ in range(warm):
        work()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    host = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start) / times, 1000 * host / times


def kernels(work: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Number and milliseconds of the GPU's kernels and copies in one call, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        work()
        torch.cuda.synchronize(device)
    events = [event for event in recorded.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum(event.device_time for event in events) / 1000


def gradients(name: str, group: Batch, device: torch.device) -> dict[str, Tensor]:
    """Gradients of the tiny objective with ITHN in evaluation mode, on the CPU, by parameter; "loss" is the loss."""
    objective = tiny_objective(name, "ithn").eval().to(device)
    loss = objective(group.to(device), 2)["loss"]
    loss.backward()
    found = {part: value.grad for part, value in objective.named_parameters() if value.grad is not None}
    return {part: value.detach().cpu() for part, value in {**found, "loss": loss}.items()}


def largest_difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest relative difference in norm of two sets of gradients; infinite where one lacks a parameter."""
    if ours.keys() != reference.keys():
        return float("inf")
    return max(float((ours[name] - value).norm() / value.norm().clamp_min(1e-6)) for name, value in reference.items())


def tiny_reports(name: str, device: torch.device, **decoding: Any) -> Tensor:
    """Tokens (B, L) that the tiny backbone generates from given features, on the CPU."""
    torch.manual_seed(1)
    patches, mean = torch.randn(6, 20, 2048), torch.randn(20, 2048)
    backbone = build_backbone(name, GivenFeatures()).eval().to(device)
    backbone.mean_patches = mean.to(device)
    return search(backbone, patches.to(device), "float32", 40, **decoding).cpu()


def search(backbone: Backbone, patches: Tensor, precision: str, length: int, **decoding: Any) -> Tensor:
    """Tokens (B, L) for features (B, S, C)."""
    features = VisualFeatures(patches, None, patches.mean(1))
    with torch.inference_mode(), autocast(patches.device, precision):
        options = DecodingOptions(max_seq_length=length, **decoding)
        return backbone.search(None, features=features, decoding=options).tokens


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in products and convolutions for the block; it is off before and after."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
