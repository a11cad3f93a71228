"""Optimizer state by parameter name, unsharded or sharded over ranks as the parameters are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from switti.errors import UserError


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state_dict() with the names of its parameters in place of their numbers.

    PyTorch's own function gives a state to parameters that have not been stepped, by a step without gradients that
    counts: the first real step of an optimizer that begins late would not be its first.
    """
    numbered, names = optimizer.state_dict(), ordered_names(model, optimizer)
    state = {names[number]: fields for number, fields in numbered["state"].items()}
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in numbered["param_groups"]]
    return {"state": state, "param_groups": groups}


def ordered_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of an optimizer's parameters, in the order of its groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def empty_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    prefix: str,
    entries: Mapping[str, TensorStorageMetadata],
) -> dict[str, dict[str, Tensor]]:
    """Empty tensors for the optimizer entries in a checkpoint; parameters never stepped have none.

    entries: of the checkpoint, by <prefix>.<parameter>.<field>.
    """
    parameters = dict(model.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for name in ordered_names(model, optimizer):
        for key, entry in fields_of(entries, f"{prefix}.{name}").items():
            state.setdefault(name, {})[key] = _empty_entry(entry, parameters[name])
    return state


def _empty_entry(entry: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    # A moment, sharded as its parameter is.
    if entry.size and entry.size == parameter.shape:
        return torch.empty_like(parameter)
    return torch.empty(entry.size, dtype=entry.properties.dtype, device=parameter.device)


def fill_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Load a state by parameter name. groups: their settings, in the order of the optimizer's own."""
    numbers = {name: number for number, name in enumerate(ordered_names(model, optimizer))}
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({
        "state": {numbers[name]: fields for name, fields in state.items()},
        "param_groups": [{**g, "params": mine["params"]} for g, mine in zip(groups, own, strict=True)],
    })  # fmt: skip


def fields_of(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Entries <name>.<field> by field."""
    return {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.rpartition(".")[0] == name}


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """An unsharded tensor that every rank has, sharded as a parameter `like` of its shape; any other one as it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# ---- entries of a checkpoint ------------------------------------------------------------------------------------


def take_groups(rest: dict[str, Any], path: Path) -> list[list[dict[str, Any]]]:
    """Pops each optimizer's groups, with the names of their parameters, from the entries beside the tensors."""
    optimizers = rest.pop("optimizer_groups", None)
    valid = isinstance(optimizers, list) and all(
        isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(isinstance(name, str) for group in groups for name in group["params"])
        for groups in optimizers
    )
    if not valid or not isinstance(optimizers, list):
        raise UserError(f"{path} is not a checkpoint: it holds no groups of parameters")
    return optimizers


def take_states(checkpoint: dict[str, Any], count: int, path: Path) -> list[dict[str, Any]]:
    """Pops the optimizers' state_dict()s from a checkpoint in one file."""
    states = checkpoint.pop("optimizer_states", None)
    if not isinstance(states, list) or len(states) != count:
        raise UserError(f"{path} does not hold the states of the run's optimizers ({count})")
    for plain in states:
        fields = plain.get("state") if isinstance(plain, dict) else None
        if not isinstance(fields, dict) or not all(isinstance(item, dict) for item in fields.values()):
            raise UserError(f"{path} does not hold the states of the run's optimizers")
        if not isinstance(plain.get("param_groups"), list):
            raise UserError(f"{path} holds an optimizer without groups of parameters")
    return states
