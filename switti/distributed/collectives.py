"""What all ranks decide together: a few whole numbers, exchanged between processors without waiting for any device.

Every function is a collective: all ranks call it at the same point. With one process it returns what it was given.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_made_for: tuple[Any, Any] | None = None  # (the default group, the group for processors that goes with it)


def _group() -> Any:
    """A group whose tensors lie in main memory; None when there are no other ranks."""
    global _made_for
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    if "cpu:gloo" in dist.get_backend_config():
        return world
    if _made_for is None or _made_for[0] is not world:
        _made_for = (world, dist.new_group(backend="gloo"))
    return _made_for[1]


def summed(values: Sequence[int]) -> list[int]:
    """Element by element over all ranks, which give equally many."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values: Sequence[int]) -> list[int]:
    """Element by element over all ranks, which give equally many."""
    return _reduced(values, dist.ReduceOp.MAX)


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks; for rare and small things, since it is pickled."""
    group = _group()
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _reduced(values: Sequence[int], operation: Any) -> list[int]:
    group = _group()
    if group is None:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, operation, group=group)
    return tensor.tolist()
