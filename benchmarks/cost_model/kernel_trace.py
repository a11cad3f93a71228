"""Kernel trace: launches, operations and bytes of what a GPU would run, from a dispatch mode on tensors without data.

An operation reads each of its arguments once and writes its results once; expanded dimensions are read once. What
counts as a kernel is in `launches`.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cost_model.launches import launches_of
from benchmarks.cost_model.trace import FORMULAS

aten = torch.ops.aten

# Of the first argument as many rows are read as are written.
_READS_ROWS = {"embedding", "index", "index_select", "gather"}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
}


class Kernel(NamedTuple):
    """An operation of a GPU: its ATen name, launches, operations in `dtype`, bytes read and written."""

    name: str
    launches: int
    operations: int
    dtype: torch.dtype
    bytes: int
    attention: bool = False


Kernels = Counter[Kernel]


class KernelTrace(TorchDispatchMode):
    """Kernels by `section`, which the caller may set."""

    def __init__(self) -> None:
        super().__init__()
        self.section = ""
        self.sections: dict[str, Kernels] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if launches := launches_of(func):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            formula = FORMULAS.get(func.overloadpacket)
            operations = formula(*args, **kwargs, out_val=result) if formula else 0
            kernel = Kernel(
                func.overloadpacket.__name__,
                launches,
                operations,
                inputs[0].dtype if inputs else torch.float32,
                _bytes(func.overloadpacket.__name__, inputs, outputs),
                func.overloadpacket in _ATTENTION,
            )
            self.sections.setdefault(self.section, Counter())[kernel] += 1
        return result


def _bytes(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(_size(tensor) for tensor in outputs)
    if name in _READS_ROWS:
        return 2 * written + sum(_size(tensor) for tensor in inputs[1:])
    # What is copied over is not read.
    read = inputs[1:] if name == "copy_" else inputs
    return written + sum(_size(tensor) for tensor in read)


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that differ in their place."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


class FusedAttention(TorchFunctionMode):
    """Scaled dot-product attention as a GPU's fused kernels compute it, on a machine that has none to ask.

    Without a mask FlashAttention; with one the memory-efficient kernel, which takes it as a bias.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].device.type != "cuda":
            return func(*args, **kwargs)
        q, k, v = args[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if mask is None:
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        # The bias, and its copy with rows that are a multiple of eight long.
        bias = F.pad(mask.to(q.dtype), (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
        bias = bias.expand(*q.shape[:-1], k.shape[-2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, False)[0]


def launches(kernels: Kernels) -> int:
    return sum(kernel.launches * count for kernel, count in kernels.items())


def operations(kernels: Kernels) -> int:
    return sum(kernel.operations * count for kernel, count in kernels.items())


def deepen(few: Kernels, one_more: Kernels, blocks: int) -> Kernels:
    """Kernels with `blocks` more blocks than `few`, of which `one_more` has one."""
    names: Iterable[Kernel] = few.keys() | one_more.keys()
    counts = {name: few[name] + blocks * (one_more[name] - few[name]) for name in names}
    return Counter({name: count for name, count in counts.items() if count})
