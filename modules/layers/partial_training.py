"""Training a part of a visual extractor: its last stages, its normalisation layers or its biases.

What is frozen has neither gradients nor new statistics: it computes as in evaluation.
"""

from torch import nn

from modules.layers.visual_extractor_weights import HEADS

DOMINANT = 0.8  # share of the parameters from which on a module is what its own children are stages of


def freeze_all_but(model: nn.Module, part: str, name: str) -> list[nn.Module]:
    """Freeze ``model`` except ``part`` (last:N, norm, bias); returns the modules that stay in evaluation mode.

    ValueError, with the extractor's ``name``, for more stages than it has, or a part without parameters.
    """
    learning = {key for key, value in model.named_parameters() if value.requires_grad}
    chosen = learning & (_last(model, int(part[5:]), name) if part.startswith("last:") else _KINDS[part](model))
    if not chosen:
        raise ValueError(f"unfreeze {part}: visual_extractor {name} has no such parameters")
    for key, value in model.named_parameters():
        value.requires_grad_(key in chosen)
    return [
        module
        for module in model.modules()
        if not any(value.requires_grad for value in module.parameters()) and module is not model
    ]


def stages(model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each stage, the last one with all that follows it (a final norm)."""
    prefix, module = "", model
    after: list[tuple[str, nn.Module]] = []
    whole = sum(value.numel() for value in model.parameters())
    while True:
        children = [(key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]
        largest = max(children, key=lambda pair: _count(pair[1]), default=None)
        if largest is None or _count(largest[1]) < DOMINANT * whole or not any(True for _ in largest[1].children()):
            break
        position = [key for key, _ in children].index(largest[0])
        after = [(prefix + key, child) for key, child in children[position + 1 :]] + after
        prefix, module = f"{prefix}{largest[0]}.", largest[1]
    found = [[f"{prefix}{key}.{inner}" for inner, _ in child.named_parameters()] for key, child in children]
    for key, child in after:
        found[-1] += [f"{key}.{inner}" for inner, _ in child.named_parameters() if not key.startswith(HEADS)]
    return found


def _count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _last(model: nn.Module, number: int, name: str) -> set[str]:
    found = stages(model)
    if number > len(found):
        raise ValueError(f"unfreeze last:{number}: visual_extractor {name} has {len(found)} stages")
    return {key for stage in found[-number:] for key in stage}


def _norms(model: nn.Module) -> set[str]:
    """Parameters of normalisation layers, whatever library they come from."""
    return {
        f"{place}.{key}"
        for place, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, _ in module.named_parameters(recurse=False)
    }


def _biases(model: nn.Module) -> set[str]:
    return {key for key, _ in model.named_parameters() if key.rpartition(".")[2] == "bias"}


_KINDS = {"norm": _norms, "bias": _biases}
