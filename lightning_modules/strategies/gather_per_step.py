"""FSDP2 for manual optimization: parameters are sharded between steps and gathered for the duration of a step.

Between steps each rank holds its shard of the weights, the EMA and the optimizer's state. From the first micro-batch of
a step to the last, weights and gradients are unsharded on every rank, and nothing is communicated: any number of losses
and backward passes, gradients with respect to one layer and second derivatives work as in a single process. Gradients
are averaged once a step, unsharded, before each rank keeps its shard of them.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.strategies.parallel import sharded_units
from switti.distributed.optimizer_state import shard_like


def shard_between_steps(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network over the mesh as a single unit; of a ModuleDict, which has no forward pass, each entry."""
    for unit in module.values() if isinstance(module, nn.ModuleDict) else (module,):
        if not isinstance(unit, FSDPModule):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def unshard(module: nn.Module) -> None:
    """Before each micro-batch: unsharded weights on every rank until `reshard_with_gradients`. No-op if not sharded."""
    for unit in sharded_units(module):
        unit.set_requires_gradient_sync(False, recurse=False)
        unit.set_reshard_after_backward(False, recurse=False)
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def reshard_with_gradients(module: nn.Module) -> None:
    """After the last micro-batch: each rank keeps its shard of weights and gradients, which are equal on all ranks."""
    units = sharded_units(module)
    if not units:
        return
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    for unit in units:
        unit.reshard()
    for name, parameter in module.named_parameters():
        gradient = gradients[name]
        parameter.grad = None if gradient is None else shard_like(gradient, parameter)


def full_tensor(value: Tensor) -> Tensor:
    """A tensor, sharded or not, unsharded and without gradient; a collective if it is sharded."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, unsharded on every rank."""
    return {name: full_tensor(value) for name, value in module.state_dict().items()}


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter, sharded or not, a value that every rank has."""
    parameter.copy_(shard_like(value.to(parameter), parameter))
