"""Cases for the null device: a training step and a search of every backbone, as deep as published and narrow."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.null_device import NullDevice
from models import backbone_class, settings_class
from models.base import Backbone, VisualFeatures
from modules.data.batches import Batch, Pair
from modules.data.transforms import train_transform
from modules.decoding.options import DecodingOptions
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.layers.relational_memory import RelationalMemory
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.environment import autocast
from modules.runtime.stopping import GracefulShutdown
from modules.training.settings import LoopSettings, OptimSettings
from modules.training.trainer import Trainer

WORDS, ROWS, VIEWS, LENGTH, SIDE, PATCHES = 50, 4, 2, 60, 64, 49
NARROW: dict[str, dict[str, Any]] = {
    "r2gen": {"rm_d_model": 32, "rm_num_heads": 2},
    "r2gencmn": {"topk": 8, "cmm_size": 64, "cmm_dim": 32},
    "xpronet": {"topk": 5, "d_img_ebd": 32, "d_txt_ebd": 16, "num_cluster": 14},
    "visualgpt": {},
    "hf": {},
}
# What its constructor takes besides.
MORE: dict[str, dict[str, Any]] = {
    "xpronet": {"no_finding": 0},
    "visualgpt": {"begin_id": 5, "end_id": 5, "pad_token": 5},
}


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One optimiser step; fields that are not given are those of a plain run."""

    backbone: str
    ithn: dict[str, Any] = dataclasses.field(default_factory=lambda: {"strategy": "off"})
    precision: str = "float32"
    optim: dict[str, Any] = dataclasses.field(default_factory=dict)
    batches: int = 1  # accumulated
    missing_views: bool = False
    frozen: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # the backbone's
    cuda_graph: bool = False
    processes: int = 1  # as many as this one believes to train with


class GivenFeatures(nn.Module):
    """Stands for an extractor in a search whose features are given: 2048 wide, as ResNet-101's."""

    width, patches_per_view = 2048, PATCHES


def build_backbone(name: str, extractor: nn.Module, **settings: Any) -> Backbone:
    """The backbone ``name`` around ``extractor``, 32 wide and as deep as published."""
    narrow = {"d_model": 32, "d_ff": 32, "num_heads": 2, **NARROW[name], **settings}
    return backbone_class(name)(
        visual_extractor=extractor, num_ids=WORDS, settings=settings_class(name)(**narrow), **MORE.get(name, {})
    )


def make_batch(
    negatives: bool,
    missing_views: bool = False,
    length: int = LENGTH,
    pinned: bool = True,
    *,
    rows: int = ROWS,
    views: int = VIEWS,
    side: int = SIDE,
    words: int = WORDS,
) -> Batch:
    """A batch of random pixels and words, as a loader with workers hands it over."""

    def pair(length: int) -> Pair:
        tokens = torch.randint(1, words, (rows, length))
        tokens[:, 0] = tokens[:, -1] = 0
        present = torch.ones(rows, views, dtype=torch.bool)
        present[: rows // 2, 1:] = not missing_views
        pixels = torch.randint(0, 256, (rows, views, 3, side, side), dtype=torch.uint8)
        return Pair(pixels, present, tokens, torch.ones(rows, length, dtype=torch.bool), torch.ones(rows, 14))

    numbers, transform = torch.arange(rows), train_transform(side, (0.5,) * 3, (0.5,) * 3)
    batch = Batch(
        pair(length),
        pair(length - 3) if negatives else None,
        torch.ones(rows, dtype=torch.bool) if negatives else None,
        numbers,
        numbers,
        [""] * rows,
        [""] * rows,
        transform=transform,
    )
    return batch.pin_memory() if pinned else batch


def make_trainer(objective: nn.Module, case: StepCase, device: torch.device) -> Trainer:
    """The trainer of a run, without data, validation and checkpoints."""

    def none(*_: Any) -> dict:
        return {}

    return Trainer(
        objective,
        OptimSettings(**case.optim),
        LoopSettings(),
        loader=None,
        validate=none,
        likelihood=none,
        save=none,
        on_epoch=none,
        shutdown=GracefulShutdown(),
        device=device,
        precision=case.precision,
        cuda_graph=case.cuda_graph,
    )


@contextlib.contextmanager
def pretended(processes: int) -> Iterator[None]:
    """Have this process believe that it is the first of several; what they would send is left out."""
    if processes == 1:
        yield
        return
    from torch.nn.parallel import distributed as wrapper
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # The other processes' shapes are 0 here, as all that is read from the device.
    own, wrapper._verify_param_shape_across_processes = wrapper._verify_param_shape_across_processes, lambda *_: None
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        wrapper._verify_param_shape_across_processes = own


class Steps:
    """Takes the steps of cases, which share an extractor: building one is slow."""

    def __init__(self, null: NullDevice, extractor: str = "resnet101"):
        self.null, self.name, self.device = null, extractor, torch.device("cuda:0")
        self.extractors: dict[bool, VisualExtractor] = {}

    def objective(self, case: StepCase) -> Objective:
        """The objective of ``case`` on the device."""
        if case.frozen not in self.extractors:
            self.extractors[case.frozen] = VisualExtractor(
                self.name, channels_last=True, image_size=SIDE, frozen=case.frozen
            )
        backbone = build_backbone(case.backbone, self.extractors[case.frozen], **case.settings)
        settings = ITHNSettings(**{"embedding_dim": 16, **case.ithn})
        return Objective(backbone, settings, n_samples=ROWS).to(self.device).train()

    def take(self, case: StepCase, steps: int = 1) -> Counter[str]:
        """What ``steps`` steps of ``case`` do after those that create the optimiser's state, fill caches and record."""
        with pretended(case.processes):
            return self._take(case, steps)

    def _take(self, case: StepCase, steps: int) -> Counter[str]:
        objective = self.objective(case)
        trainer = make_trainer(objective, case, self.device)
        group = [make_batch(objective.uses_negatives, case.missing_views) for _ in range(case.batches)]

        def step() -> None:
            if case.processes > 1:  # a batch before the step's last: the others are not there to receive gradients
                with trainer.parallel.no_sync():
                    trainer._forward_backward(group[0], 1, torch.tensor(100), share=0.5)
                return
            trainer._step(group)
            trainer.position.steps += 1

        for _ in range(2 if case.cuda_graph else 1):
            step()
        with self.null.counting() as found:
            for _ in range(steps):
                step()
        return found


def recurrence(null: NullDevice, device: torch.device) -> Counter[str]:
    """What R2Gen's memory does in a step with ITHN, forward and backward, for reports of 60 tokens."""
    memory = RelationalMemory(32, num_slots=3, num_heads=2).to(device).train()
    words = torch.zeros(2 * ROWS, LENGTH - 1, 32, device=device, requires_grad=True)
    memory(words).sum().backward()
    with null.counting() as found:
        memory(words).sum().backward()
    return found


def graphs(name: str, ithn: dict[str, Any], device: torch.device) -> tuple[int, list[str]]:
    """How many graphs 20 epochs with --compile make, of reports of any length, and why graphs end.

    A backbone that ends a graph at a named place has several pieces, each made once or twice.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    shallow = {"num_layers": 1, **({"gpt2_layers": 1} if name == "visualgpt" else {})}
    backbone = build_backbone(name, VisualExtractor("resnet18", image_size=SIDE), **shallow)
    objective = Objective(backbone, ITHNSettings(**{"embedding_dim": 16, **ithn}), n_samples=ROWS).to(device)
    objective.train().compile(backend="eager")
    for epoch in range(1, 21):
        batch = make_batch(objective.uses_negatives, length=10 + epoch * 7 % 13, pinned=device.type == "cuda")
        objective(batch.to(device), epoch, token_count=torch.tensor(30 + epoch))["loss"].backward()
    return counters["stats"]["unique_graphs"], list(counters["graph_break"])


def search(
    null: NullDevice, name: str, precision: str = "float32", masked: bool = True, **decoding: Any
) -> Counter[str]:
    """What a search of 60 tokens does that ends at the last one, for studies whose second view may be missing."""
    device = torch.device("cuda:0")
    backbone = build_backbone(name, GivenFeatures()).to(device).eval()
    backbone.mean_patches = torch.zeros(VIEWS * PATCHES, 2048, device=device)
    patches = torch.zeros(ROWS, VIEWS * PATCHES, 2048, device=device)
    there = torch.ones(patches.shape[:2], dtype=torch.bool, device=device)
    features = VisualFeatures(patches, there if masked else None, patches.mean(1))
    options = DecodingOptions(max_seq_length=60, **decoding)
    seeds = range(ROWS) if options.sample_method == "sample" else None

    with torch.inference_mode(), autocast(device, precision), null.counting() as found:
        backbone.search(None, features=features, decoding=options, seeds=seeds)
    return found
