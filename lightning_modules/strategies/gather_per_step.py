"""Sharding of networks that are trained by hand: divided between steps, whole within one.

Between steps each rank holds its part of the weights, the average and the optimiser's state. From the first pass of a
step to the last, weights and gradients are whole on every rank, and nothing is exchanged: any number of losses and
passes, gradients with respect to one layer and second derivatives work as in a single process. Gradients are averaged
whole, once a step, before each rank keeps its part of them.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.strategies.parallel import sharded_units
from switti.distributed.optimizer_state import part_of


def divide_weights(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a network among the mesh as a single unit; of a ModuleDict, which has no pass of its own, each entry."""
    for unit in module.values() if isinstance(module, nn.ModuleDict) else (module,):
        if not isinstance(unit, FSDPModule):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def hold_whole(module: nn.Module) -> None:
    """Before each pass of a step: whole weights on every rank, until `divide_step`. Nothing if they are not divided."""
    for unit in sharded_units(module):
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def divide_step(module: nn.Module) -> None:
    """After the passes of a step: each rank keeps its part of weights and gradients, which all ranks have alike."""
    units = sharded_units(module)
    if not units:
        return
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    for unit in units:
        unit.reshard()
    for name, parameter in module.named_parameters():
        gradient = gradients[name]
        parameter.grad = None if gradient is None else part_of(gradient, parameter)


def whole(value: Tensor) -> Tensor:
    """A tensor, divided or not, whole and without gradient; all ranks must ask if it is divided."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, whole on every rank."""
    return {name: whole(value) for name, value in module.state_dict().items()}


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, divided or not, a value that every rank has."""
    parameter.copy_(part_of(value.to(parameter), parameter))
