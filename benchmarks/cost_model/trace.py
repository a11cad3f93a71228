"""Dispatch-mode trace of a training step: memory by kind, operations by type, bytes communicated.

Tensors may be real or fake. A tensor of torch's FakeTensorMode has shape, type and lifetime but no data, so that a step
of a model of any size can be traced on a small machine.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from benchmarks.cost_model.launches import launches_of
from switti.distributed.optimizer_state import local_shard

GATHERED, GRADIENTS = "gathered weights", "gradients"

Shape = tuple[int, ...]
aten = torch.ops.aten


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(gradient: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, q, k, v)


# Operations from the shapes of arguments: the fused attention of CPUs, which torch's own table lacks.
FUSED_ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
FORMULAS = flop_registry | {operation: shape_wrapper(f) for operation, f in FUSED_ON_CPU.items()}


class StepTrace(TorchDispatchMode):
    """Largest memory within the context, by kind, operations by type, and the bytes that collectives moved.

    A new tensor is counted under the current `phase`, which the caller sets; results of reduce-scatters count as
    gradients and storages that sharding fills and empties as gathered weights. Tensors that exist before are counted
    if they are given to `count`. A storage is counted once, however many tensors share it.

    operations: by the type of their results; a multiplication with an addition counts as two. kernels: launches.
    peaks: by `section`, which the caller may set too, bytes by kind when their sum peaks. received: bytes that this
    rank receives in "all-gather", "reduce-scatter" and "all-reduce", with ring algorithms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.section: tuple[str, ...] = ()
        self.operations: Counter[torch.dtype] = Counter()
        self.kernels = 0
        self.peaks: dict[tuple[str, ...], dict[str, int]] = {}
        self.received: Counter[str] = Counter()
        self._live: Counter[str] = Counter()
        self._known: dict[int, tuple[str, int]] = {}
        self._gathered: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._total = 0
        self._largest: dict[tuple[str, ...], int] = {}

    @property
    def peak(self) -> dict[str, int]:
        """Of all sections."""
        return max(self.peaks.values(), key=lambda kinds: sum(kinds.values()), default={})

    def count(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts these under `kind` from now on."""
        for tensor in tensors:
            self._set(local_shard(tensor).untyped_storage(), kind)

    def count_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Counts each gradient as one from the moment at which it is complete."""

        def complete(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.count([parameter.grad], GRADIENTS)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(complete)

    # ---- storages -------------------------------------------------------------------------------------------------

    def _set(self, storage: torch.UntypedStorage, kind: str | None) -> None:
        """Notes the storage's size now, as `kind` or as what it was."""
        self._note_size(id(storage), storage, kind)
        if self._total > self._largest.get(self.section, 0):
            # Sharding empties storages in place, which is not an operation that a dispatch mode sees.
            for key, reference in list(self._gathered.items()):
                if (gathered := reference()) is not None and gathered.nbytes() != self._known[key][1]:
                    self._note_size(key, gathered, GATHERED)
        if self._total > self._largest.get(self.section, 0):
            self._largest[self.section], self.peaks[self.section] = self._total, dict(self._live)

    def _note_size(self, key: int, storage: torch.UntypedStorage, kind: str | None) -> None:
        size = storage.nbytes()
        if key in self._known:
            before, old_size = self._known[key]
            kind = kind or before
            self._change(before, -old_size)
        else:
            kind = kind or self.phase
            weakref.finalize(storage, self._forget, key)
        if kind == GATHERED and key not in self._gathered:
            self._gathered[key] = weakref.ref(storage)
        self._known[key] = kind, size
        self._change(kind, size)

    def _forget(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self._gathered.pop(key, None)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self._live[kind] += size
        self._total += size

    # ---- operations in the context -------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # Traced as the local tensors that it consists of.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.kernels += launches_of(func)
        if formula := FORMULAS.get(func.overloadpacket):
            computed = next(t for t in tree_leaves(result) if isinstance(t, Tensor))
            self.operations[computed.dtype] += formula(*args, **(kwargs or {}), out_val=result)
        made, kind = result, None
        if func.namespace == "c10d":
            kind = self._exchange(func, args)
            made = result if kind is None else args[0]
        # The parameters copied out of a gathered buffer.
        elif func is torch.ops.fsdp.split_with_sizes_copy.default:
            made, kind = kwargs["out"], GATHERED  # type: ignore[index]
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                self._set(tensor.untyped_storage(), kind)
        return result

    def _exchange(self, func: Any, args: tuple[Any, ...]) -> str | None:
        """Adds a collective's bytes; the kind of its first argument, where that is its result."""
        name = func.overloadpacket.__name__
        operand, times, label = {
            "_allgather_base_": (0, 1, "all-gather"),
            "_reduce_scatter_base_": (1, 1, "reduce-scatter"),
            "allreduce_": (0, 2, "all-reduce"),
        }.get(name, (None, 0, ""))
        if operand is None:
            return None
        tensors = [t for t in tree_leaves(args[operand]) if isinstance(t, Tensor)]
        group = next(a for a in args if isinstance(a, torch.ScriptObject))
        ranks = torch.distributed.ProcessGroup.unbox(group).size()
        self.received[label] += times * sum(t.nbytes for t in tensors) * (ranks - 1) // ranks
        return GRADIENTS if label == "reduce-scatter" else None
