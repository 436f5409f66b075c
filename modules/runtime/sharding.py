"""Parameters, gradients and optimiser state shared out over the processes: torch's fully_shard (FSDP2).

Between steps every parameter is a DTensor, of which a process has its rows. A block's parameters are whole while the
block computes; the others while the module does.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.runtime import distributed


class Shards:
    """Shares out ``module``; call it in the module's place.

    ``blocks`` are parts that compute one after another, of which one or two are whole at a time. With a ``dtype`` of
    half precision they are gathered in it; their gradients are added up in float32. Parameters may lie on the CPU: each
    block goes to ``device`` by itself. All methods are for all processes together.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], *, device: torch.device, dtype: torch.dtype):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        distributed.broadcast_weights(module)
        self.module: Any = module
        # Scalars cannot be cut: they are vectors of one number here, and the names say which.
        self.scalars = {name for name, value in module.named_parameters() if value.dim() == 0}
        for name in self.scalars:
            scalar = module.get_parameter(name)
            self._replace(name, nn.Parameter(scalar.data.view(1), requires_grad=scalar.requires_grad))
        for value in module.parameters():
            value.data = value.data.contiguous()  # rows of channels-last weights do not lie together
        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        half = dtype in (torch.float16, torch.bfloat16)
        policy = (
            MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False) if half else MixedPrecisionPolicy()
        )
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh)
        # Otherwise the first part that is run by itself would be taken for the whole.
        state_of: Any = fully_shard
        state_of.state(module)._lazy_init()
        self.units: list[Any] = [part for part in module.modules() if hasattr(part, "set_reshard_after_forward")]

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self.module(*given, **options)

    def _replace(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, last = name.rpartition(".")
        self.module.get_submodule(owner).register_parameter(last, parameter)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which the module has all its parameters, as if it had never been shared out.

        They may be read, and the module run differently in every process; what is written to them is lost at the end.
        ``state_dict`` and ``load_state_dict`` of the module would end it.
        """
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        shared = {name: self.module.get_parameter(name) for name in self.scalars}
        for name, value in shared.items():
            self._replace(name, nn.Parameter(value.data.view(()), requires_grad=value.requires_grad))
        try:
            yield
        finally:
            for name, value in shared.items():
                self._replace(name, value)
            for unit in self.units:
                unit.set_reshard_after_forward(unit is not self.module, recurse=False)
                unit.reshard()

    def state_dict(self) -> dict[str, Tensor]:
        """The module's state dict with whole tensors of any shape, on the CPU of the main process; empty elsewhere."""
        return _gathered({name: (value, name in self.scalars) for name, value in self.module.state_dict().items()})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load whole tensors of any shape; RuntimeError where names or shapes are others than the module's."""
        own = self.module.state_dict()
        self.module.load_state_dict(
            {name: _shared(value, own[name]) if name in own else value for name, value in state.items()}
        )

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict of the ``optimizer`` with whole tensors, on the CPU of the main process."""
        found, scalars = optimizer.state_dict(), self._scalar_numbers(optimizer)
        state = {
            number: _gathered({name: (value, number in scalars) for name, value in kept.items()})
            for number, kept in found["state"].items()
        }
        return {**found, "state": state}

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load what ``optimizer_state`` gave, or the state dict of a run that shared nothing out."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shared = {
            number: {
                name: _shared(value, parameters[number]) if isinstance(value, Tensor) and name != "step" else value
                for name, value in kept.items()
            }
            for number, kept in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": shared})

    def _scalar_numbers(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """Which of the optimiser's parameters are scalars."""
        own = {id(self.module.get_parameter(name)) for name in self.scalars}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {number for number, parameter in enumerate(parameters) if id(parameter) in own}


def _gathered(values: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
    """Whole tensors in the main process, nothing elsewhere; the bool says that one is a scalar."""
    kept = {}
    for name, (value, scalar) in values.items():
        value = value.full_tensor() if distributed.is_shared(value) else value
        if distributed.is_main_process():
            value = value.cpu() if isinstance(value, Tensor) else value
            kept[name] = value.view(()) if scalar and isinstance(value, Tensor) else value
    return kept


def _shared(value: Any, like: Any) -> Any:
    """``value``, of any shape, shared out as ``like`` is; itself where ``like`` is whole."""
    if not distributed.is_shared(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.view(like.shape) if value.numel() == like.numel() == 1 else value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
