"""A trained backbone as two torch.export programs, which run without this project's code.

encoder: pixels (B, N, 3, size, size) uint8 -> tensors of B rows; normalisation is inside, and every view is present.
step: tokens (B, T) int64 and those tensors -> log-probabilities (B, T, V+1) of the next token at every position.

The step keeps no state: for each next word it reads all words so far again, begin (0) first.
"""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from modules.data.transforms import Transform
from modules.inference.hub_format import VOCABULARY
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder, write_private

ENCODER, STEP, ABOUT = "encoder.pt2", "step.pt2", "program.json"
FORMAT = "ithn-program-1"
TRACED = 2  # studies and views of the traced examples, as torch treats a size of 1 as a constant


class EncoderProgram(nn.Module):
    """Maps pixels to the tensors that the step reads."""

    def __init__(self, backbone: nn.Module, transform: Transform):
        super().__init__()
        self.backbone, self.transform = backbone, transform

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Pixels (B, N, 3, size, size) uint8 to what the step reads of the studies, B rows in each tensor."""
        return self.backbone.encode(self.backbone.extract(self.transform.normalise(pixels)))


class StepProgram(nn.Module):
    """Maps the words so far to log-probabilities of the next one."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, *encoded: Tensor) -> Tensor:
        """Tokens (B, T) and the encoder's tensors to log-probabilities (B, T, V+1)."""
        return self.backbone.next_words(tokens, *encoded)


@torch.no_grad()
def export_programs(
    backbone: nn.Module, transform: Transform, *, num_views: int, length: int, num_ids: int
) -> tuple[ExportedProgram, ExportedProgram]:
    """Export the encoder and the step of ``backbone`` (on the CPU, in evaluation mode) for any number of studies.

    The number of views is free where the model reads several, the number of tokens where ``backbone.any_length``;
    otherwise tokens are padded with 0 to ``length``.
    """
    extractor = backbone.visual_extractor
    extractor.batch_norm = "joint"  # one call for all views; in evaluation there are no statistics of a batch
    encoder, step = EncoderProgram(backbone, transform), StepProgram(backbone)
    views = (1, 1) if num_views == 1 else (TRACED, TRACED + 1)
    examples = [_pixels(transform, TRACED + more, views[more]) for more in (0, 1)]
    encoded, larger = (encoder(pixels) for pixels in examples)
    tokens = _tokens(TRACED, min(length, 2 * TRACED) if backbone.any_length else length, num_ids)
    free = {"pixels": _free_sizes(*examples)}
    exported = torch.export.export(encoder, (examples[0],), dynamic_shapes=free, strict=False)
    free = {
        "tokens": {0: Dim.DYNAMIC} | ({1: Dim.DYNAMIC} if backbone.any_length else {}),
        "encoded": tuple(map(_free_sizes, encoded, larger)),
    }
    backbone.visual_extractor = nn.Identity()  # a program stores all weights of its module, used or not
    try:
        return exported, torch.export.export(step, (tokens, *encoded), dynamic_shapes=free, strict=False)
    finally:
        backbone.visual_extractor = extractor


def _free_sizes(example: Tensor, larger: Tensor) -> dict[int, Any]:
    return {axis: Dim.DYNAMIC for axis in range(example.dim()) if example.size(axis) != larger.size(axis)}


def _pixels(transform: Transform, studies: int, views: int) -> Tensor:
    return torch.randint(
        256,
        (studies, views, 3, transform.size, transform.size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(studies),
    )


def _tokens(studies: int, length: int, num_ids: int) -> Tensor:
    tokens = torch.randint(1, num_ids, (studies, length), generator=torch.Generator().manual_seed(length))
    tokens[:, 0] = 0
    return tokens


def write_programs(
    folder: Path, programs: Sequence[ExportedProgram], about: Mapping[str, Any], vocabulary: Mapping[str, Any]
) -> None:
    """Write both programs, the sizes needed to call them, and the vocabulary."""
    private_folder(folder)
    for name, program in zip((ENCODER, STEP), programs, strict=True):
        program.example_inputs = None
        file = io.BytesIO()
        with warnings.catch_warnings():  # about weights that share memory, on a GPU
            warnings.filterwarnings("ignore", message="No complete tensor found")
            torch.export.save(program, file)
        write_private(folder / name, file.getvalue())
    write_private(folder / VOCABULARY, json.dumps(vocabulary, ensure_ascii=False) + "\n")
    write_private(folder / ABOUT, json.dumps({"format": FORMAT, **about}, indent=2) + "\n")


@torch.no_grad()
def largest_difference(
    folder: Path, backbone: nn.Module, transform: Transform, *, num_views: int, length: int, num_ids: int
) -> float:
    """The largest difference in any log-probability between the programs in ``folder`` and ``backbone.forward``.

    Random pixels and words, in other numbers of studies, views and words than the programs were traced with. Reading
    a program can run code: ``folder`` must be one that ``write_programs`` has just written.
    InputError where a program's values are not finite or of another shape.
    """
    encoder, step = (torch.export.load(folder / name).module() for name in (ENCODER, STEP))
    worst = 0.0
    for studies, views, words in ((1, 1, 1), (3, num_views, length)):
        pixels = _pixels(transform, studies, views)
        tokens = _tokens(studies, words if backbone.any_length else length, num_ids)
        found = step(tokens, *encoder(pixels))
        wanted = backbone(transform.normalise(pixels), tokens).log_probs
        if found.shape != wanted.shape or not bool(found.isfinite().all()):
            raise InputError(
                f"{folder}: the programs do not give finite log-probabilities of shape {tuple(wanted.shape)}"
            )
        worst = max(worst, float((found - wanted).abs().max()))
    return worst
