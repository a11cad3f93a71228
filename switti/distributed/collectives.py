"""Collectives on small Python values: every rank's integers or objects, exchanged on the CPU through gloo.

All ranks must call each function at the same point. With one process they return what they were given. No GPU is
waited for: the values do not pass through the device's stream.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_created_for: tuple[Any, Any] | None = None  # (the default group, the gloo group created beside it)


def _cpu_group() -> Any:
    """A group with a CPU backend; None when there are no other ranks."""
    global _created_for
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    if "cpu:gloo" in dist.get_backend_config():
        return world
    if _created_for is None or _created_for[0] is not world:
        _created_for = (world, dist.new_group(backend="gloo"))
    return _created_for[1]


def all_reduce_sum(values: Sequence[int]) -> list[int]:
    """The element-wise sum over all ranks, each of which gives the same number of values."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The element-wise maximum over all ranks, each of which gives the same number of values."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def all_gather_object(value: Any) -> list[Any]:
    """Every rank's value, ordered by rank. The values are pickled, so keep them small and the calls rare."""
    group = _cpu_group()
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _all_reduce(values: Sequence[int], operation: Any) -> list[int]:
    group = _cpu_group()
    if group is None:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, operation, group=group)
    return tensor.tolist()
