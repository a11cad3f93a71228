"""Kernel backends of attention and norms: PyTorch's fused kernels, or batched products in pieces for CPUs.

"auto" chooses by device and type. The other two are for comparisons, and for a plan that simulates a GPU's step on a
CPU.
"""

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "fused", "products"]


def attends_by_products(backend: Backend, q: Tensor) -> bool:
    """Whether attention runs as batched products. They are faster than the fused kernel in bfloat16 on a CPU."""
    if backend == "auto":
        return q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return backend == "products"


def normalizes_in_pieces(backend: Backend, x: Tensor) -> bool:
    """Whether RMSNorm runs piece by piece, as is faster on a CPU. GPUs have a fused kernel and compilers make one."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" if backend == "auto" else backend == "products"


def infers_in_tiles(backend: Backend, x: Tensor) -> bool:
    """Whether a layer of bfloat16 weights runs as `cpu_tiles` does: on a CPU without gradients."""
    return (
        backend == "auto"
        and x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
