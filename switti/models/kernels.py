"""Kernel backends of attention and norms: PyTorch's fused kernels, one kernel over packed scales, or batched products.

"auto" chooses:

- On a CPU in bfloat16, batched products in pieces, which are faster there than the fused kernel; norms in pieces in
  every type. Weights in bfloat16 infer in tiles there (`infers_in_tiles`).
- In training on an NVIDIA GPU of compute capability 8.0 or more, `torch.nn.attention.varlen` for a non-causal model in
  bfloat16 or float16 whose heads have a multiple of 8 channels, 256 at most: all scales of all images in one call. Not
  where PyTorch lacks it (before 2.10), and not with deterministic algorithms (trainer.deterministic), which its
  backward pass does not offer on every GPU.
- Everywhere else PyTorch's fused kernel, one call a scale. A causal model is among these: packed, its scales' keys are
  copied once for each finer scale, twice the keys and values at 512 px. "varlen" asks for that nevertheless.

The other names are for comparisons, and for a plan that simulates a GPU's step on a CPU.
"""

from typing import Literal

import torch
from torch import Tensor

from switti.errors import UserError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    # Before torch 2.10.
    varlen_attn = None  # type: ignore[assignment]

Backend = Literal["auto", "fused", "products", "varlen"]
WIDEST_HEAD = 256


def attends_by_products(backend: Backend, q: Tensor) -> bool:
    """Whether attention runs as batched products. They are faster than the fused kernel in bfloat16 on a CPU."""
    if backend == "auto":
        return q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return backend == "products"


def attends_packed(
    backend: Backend, visibility: str, device: torch.device, dtype: torch.dtype, head_width: int
) -> bool:
    """Whether all scales attend in one call of the variable-length kernel; dtype: of queries, keys and values.

    Raises UserError where "varlen" is asked for and cannot run.
    """
    obstacle = _packing_obstacle(device, dtype, head_width)
    if backend == "varlen" and obstacle is not None:
        raise UserError(f"attention backend varlen {obstacle}; use auto")
    if backend != "auto":
        return backend == "varlen"
    if obstacle is not None or visibility == "causal" or torch.are_deterministic_algorithms_enabled():
        return False
    # ROCm's devices are named "cuda", too.
    return torch.version.hip is None and torch.cuda.is_available() and _capability(device) >= (8, 0)


def _packing_obstacle(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    if varlen_attn is None:
        return f"needs torch 2.10 or newer, not {torch.__version__}"
    if device.type != "cuda":
        return f"needs a GPU, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 (trainer.precision=bf16-mixed), not {str(dtype)[6:]}"
    if head_width % 8 or head_width > WIDEST_HEAD:
        return f"takes heads with a multiple of 8 channels up to {WIDEST_HEAD}, not {head_width}"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


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
