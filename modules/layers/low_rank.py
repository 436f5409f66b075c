"""Low-rank adapters on linear layers: LoRA (Hu et al., arXiv 2106.09685), as peft makes them.

A layer W (out, in) gains B A alpha / r, where A (r, in) starts at random and B (out, r) at 0: nothing changes at first.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

ALL_LINEAR = "all-linear"
ADAPTER = "lora_"  # in the names of the adapters' parameters
# Classes of layers that take adapters. Attention of torch reads the weights of the layer inside it without calling it,
# so that it takes them as a whole.
_LINEAR, _TORCH_ATTENTION = ("Linear", "Conv1D"), "MultiheadAttention"


def add_adapters(model: nn.Module, layers: Collection[str], *, rank: int, alpha: int, dropout: float = 0.0) -> None:
    """Give the ``layers`` of ``model``, named in full, adapters, and freeze everything else."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=sorted(layers), bias="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # which way round GPT-2's weights are
        inject_adapter_in_model(config, model)
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in adapted:
        # What adapters read keeps its dtype until autocast changes it, whatever dtype their weights have: dropout
        # would round it otherwise.
        layer.cast_input_dtype_enabled = False
        # Of torch's attention: the sum of weights and adapters is taken before autocast.
        layer.leaves_autocast = type(layer.get_base_layer()).__name__ == _TORCH_ATTENTION


def named_layers(model: Any, targets: Sequence[str], without: Collection[str] = ()) -> list[str]:
    """Full names of the linear layers of ``model`` whose names end in one of ``targets``, or ALL_LINEAR alone.

    None with a part in ``without``, nor the output layer. ValueError, with the names there are, where one has none.
    """
    output = model.get_output_embeddings()
    found = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in _LINEAR and module is not output and not any(part in name for part in without)
    ]
    if list(targets) == [ALL_LINEAR]:
        return found
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in found):
            there = sorted({name.rpartition(".")[2] for name in found})
            raise ValueError(f"lora_targets {target}: no linear layer of that name; there are {', '.join(there)}")
    return [name for name in found if f".{name}".endswith(tuple(f".{target}" for target in targets))]


def attention_layers(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Full names of the trained linear layers of attention in a vision model of any library.

    ``run`` runs it once: a layer whose weights are read without calling it (timm's BEiT, Swin v2) takes no adapters.
    """
    inside: list[str] = []
    called: dict[str, bool] = {}
    hooks = []
    for name, module in model.named_modules():
        kind, trained = type(module).__name__, any(value.requires_grad for value in module.parameters(recurse=False))
        # An mlp within attention is of relative positions.
        linear = kind in _LINEAR and name.startswith(tuple(inside)) and "mlp" not in name
        if trained and (linear or kind == _TORCH_ATTENTION):
            called[name] = False
            hooks.append(module.register_forward_hook(lambda *given, name=name: called.update({name: True})))
        elif name and "attention" in kind.lower():
            inside.append(f"{name}.")
    run()
    for hook in hooks:
        hook.remove()
    return [name for name, was_called in called.items() if was_called]


def merge_adapters(model: nn.Module) -> None:
    """Add all adapters in ``model`` to the layers that they belong to, which get their former names again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: tuple[str, ...] = ()  # a whole attention merges the layer in it too
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.startswith(inside):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, _merged(module))
            inside = (f"{name}.",)


def _merged(layer: Any) -> nn.Module:
    """The layer under the adapters of ``layer``, with them added to its weights."""
    if hasattr(layer, "unload_and_optionally_merge_module"):  # of torch's attention
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    layer.merge(safe_merge=True)
    return layer.get_base_layer()


def adapter_files(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (of any shape) and configuration of the adapters on ``model``, as peft's PeftModel reads them."""
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}, plain
