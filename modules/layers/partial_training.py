"""Training a part of a visual extractor: its last stages, its normalisation layers, its biases, or adapters.

What is frozen has neither gradients nor new statistics: it computes as in evaluation, and a trained stage as in
training. What lies below the last stages can be computed once for each image (``Trunk``).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from modules.layers.low_rank import ADAPTER, add_adapters, attention_layers
from modules.layers.visual_extractor_weights import HEADS

LORA = "lora:"  # and a rank
DOMINANT = 0.8  # share of the parameters from which on a module's own children are the stages


def resting(model: nn.Module) -> list[nn.Module]:
    """The modules in ``model`` that stay in evaluation mode: nothing of them is trained.

    The dropout and stochastic depth of a stage that is trained are part of its training.
    """
    busy = {id(part) for module in model.modules() if _whole(module) for part in module.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in busy
        and not any(value.requires_grad for value in module.parameters())
        and module is not model
    ]


def freeze_all_but(model: nn.Module, part: str, name: str, run: Callable[[], Any]) -> None:
    """Freeze ``model`` except ``part`` (last:N, lora:RANK, norm, bias).

    ``run`` runs it once. ValueError, with the extractor's ``name``, for more stages than it has, or a part without
    parameters.
    """
    if part.startswith(LORA):
        _add_adapters(model, int(part[len(LORA) :]), name, run)
    learning = {key for key, value in model.named_parameters() if value.requires_grad}
    kind, _, number = part.partition(":")
    chosen = learning & (_last(model, int(number), name) if kind == "last" else _KINDS[kind](model))
    if not chosen:
        raise ValueError(f"unfreeze {part}: visual_extractor {name} has no such parameters")
    for key, value in model.named_parameters():
        value.requires_grad_(key in chosen)


def stages(model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each stage, the last one with all that follows it (a final norm)."""
    prefix, module = "", model
    after: list[tuple[str, nn.Module]] = []
    whole = sum(value.numel() for value in model.parameters())
    while True:
        children = _children(module)
        kinds = [type(child) for _, child in children]
        # Blocks of one kind; in a small model what lies before them may be larger.
        series = [pair for pair in children if kinds.count(type(pair[1])) == 1 and _is_series(pair[1])]
        largest = series[0] if len(series) == 1 else max(children, key=lambda pair: _count(pair[1]), default=None)
        if largest is None or isinstance(module, nn.ModuleList) or not any(True for _ in largest[1].children()):
            break
        if len(series) != 1 and _count(largest[1]) < DOMINANT * whole:
            break
        position = [key for key, _ in children].index(largest[0])
        after = [(prefix + key, child) for key, child in children[position + 1 :]] + after
        prefix, module = f"{prefix}{largest[0]}.", largest[1]
    found = [[f"{prefix}{key}.{inner}" for inner, _ in child.named_parameters()] for key, child in children]
    for key, child in after:
        found[-1] += [f"{key}.{inner}" for inner, _ in child.named_parameters() if not key.startswith(HEADS)]
    return found


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(key, child) for key, child in module.named_children() if any(True for _ in child.parameters())]


def _is_series(module: nn.Module) -> bool:
    """Whether ``module`` is blocks of one kind that follow one another, or holds nothing but such."""
    children = [child for _, child in _children(module)]
    kinds = {type(child) for child in children}
    if isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and len(children) > 1):
        return len(kinds) == 1 and kinds != {nn.Sequential}
    return len(children) == 1 and _is_series(children[0])


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


def _add_adapters(model: nn.Module, rank: int, name: str, run: Callable[[], Any]) -> None:
    layers = attention_layers(model, run)
    if not layers:
        raise ValueError(f"unfreeze {LORA}{rank}: visual_extractor {name} has no attention; give last:N, norm or bias")
    add_adapters(model, layers, rank=rank, alpha=rank)


def _adapters(model: nn.Module) -> set[str]:
    return {key for key, _ in model.named_parameters() if ADAPTER in key}


_KINDS = {"norm": _norms, "bias": _biases, "lora": _adapters}


class _Reached(Exception):
    """Ends a pass at the first trained stage; carries the tensor that the stage was given."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _first(given: tuple, named: dict) -> Tensor:
    return next(value for value in (*given, *named.values()) if isinstance(value, Tensor))


def _whole(module: nn.Module) -> bool:
    """Whether ``module`` is trained with all that it contains."""
    values = list(module.parameters())
    return bool(values) and all(value.requires_grad for value in values)


@contextlib.contextmanager
def _hooked(modules: list[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _standing_in(output: Any, count: int, *given: Any, **named: Any) -> Any:
    """What a module that is left out gives for ``count`` images: of its ``output`` for two, the shape alone."""
    return tree_map_only(
        Tensor, lambda value: value.new_zeros(1).expand(count, *value.shape[1:]) if len(value) == 2 else value, output
    )


class Trunk:
    """What lies below the first trained stage of ``model``: its output is stored, and the rest computed from it.

    Stored is the first tensor that the first trained stage is given, (rows, columns) of an image: channels by places
    of a grid, tokens by their width. ``example`` (2, 3, H, W) are images on the device of ``model``, which is in
    evaluation mode. ValueError, with the extractor's ``name``, where the stage needs more of an image than this tensor.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, resting: list[nn.Module], name: str, example: Tensor):
        self._model, self._image = model, example.shape[1:]
        inner = {id(child) for module in resting for child in module.modules() if child is not module}
        frozen = [module for module in resting if id(module) not in inner]
        trained = [module for module in model.modules() if _whole(module)]
        self._skipped: dict[nn.Module, Any] = {}
        handles = [module.register_forward_hook(self._record) for module in frozen]
        self._top: list[nn.Module] = trained  # until the first of them has been called
        try:
            stored = self._below(example)
        finally:
            for handle in handles:
                handle.remove()
        self._top = [module for module in trained if module is self._reached]
        self._stored_as = stored.shape[1:]
        self.patches_per_view, self.width = stored.flatten(2).shape[1:]
        whole = model(example)
        # Whatever the stage is given beside the tensor would come from modules that are left out.
        if not torch.allclose(self.above(stored.flatten(2)), whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item()):
            raise ValueError(
                f"visual_extractor {name}: what is trained cannot be computed from what lies below it; leave out "
                "--feature_cache"
            )

    def _record(self, module: nn.Module, given: Any, output: Any) -> None:
        self._skipped[module] = output

    def eval(self) -> "Trunk":
        """Evaluation mode, of the whole extractor."""
        self._model.eval()
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The weights and statistics that the stored features depend on."""
        trained = {
            key
            for place, module in self._model.named_modules()
            if any(value.requires_grad for value in module.parameters(recurse=False))
            for key in (f"{place}.{own}" for own in module.state_dict())
        }
        return {key: value for key, value in self._model.state_dict().items() if key not in trained}

    def __call__(self, images: Tensor) -> tuple[Tensor, None, None]:
        """Images (n, 1, 3, H, W) of one view each -> (n, rows, columns), in the place of an extractor's patches."""
        return self._below(images.squeeze(1)).flatten(2), None, None

    def _below(self, images: Tensor) -> Tensor:
        """The first tensor (n, ...) that the first trained stage is given for ``images`` (n, 3, H, W)."""

        def stop(module: nn.Module, given: tuple, named: dict) -> None:
            self._reached = module
            raise _Reached(_first(given, named))

        with _hooked(self._top, stop), torch.no_grad():
            try:
                self._model(images)
            except _Reached as reached:
                return reached.tensor
        raise AssertionError("no trained stage was reached")

    @torch.compiler.disable(reason="leaves out modules by replacing their forward")
    def above(self, stored: Tensor) -> Tensor:
        """What the whole extractor gives for the images whose stored tensors (n, rows, columns) these are."""
        count = len(stored)
        stored = stored.unflatten(2, self._stored_as[1:]) if len(self._stored_as) > 2 else stored

        def substitute(module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
            first = _first(given, named)
            return (
                tuple(stored if value is first else value for value in given),
                {key: stored if value is first else value for key, value in named.items()},
            )

        for module, output in self._skipped.items():
            module.forward = functools.partial(_standing_in, output, count)  # type: ignore[method-assign]
        try:
            with _hooked(self._top, substitute):
                return self._model(stored.new_zeros(1).expand(count, *self._image))
        finally:
            for module in self._skipped:
                del module.forward
