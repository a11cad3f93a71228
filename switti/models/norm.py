"""Normalisations that take the modulation and the residual sum along. Shape suffixes: B batch, L tokens, D width."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModulatedRMS(torch.autograd.Function):
    """addend + x / sqrt(mean(x²) + eps) · gain in few passes over the data, forward and backward.

    x [B, L, D]; gain [D] or [B, 1, D]; addend None, [B, 1, D] or [B, L, D]. Computes in float32 at least; the result
    has type `dtype`. Autograd's own formulation needs three times as many passes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, addend: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        out = wide * inverse
        if x.dtype != wide.dtype:  # rounded before the gain, as in the released code
            out = out.to(x.dtype).to(wide.dtype)
        out.mul_(gain)
        if addend is not None:
            out.add_(addend)
        ctx.save_for_backward(x, gain, inverse)
        ctx.addend = None if addend is None else (addend.shape, addend.dtype)
        return out.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        width = x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            wide, above = x.to(inverse.dtype), gradients[0].to(inverse.dtype)
            product = wide * above
            rows = inverse.transpose(-1, -2)
            d_gain = torch.matmul(rows, product)  # sum over tokens, [B, 1, D]
            column = gain.expand(len(x), 1, width).transpose(-1, -2).to(inverse.dtype)
            along = torch.matmul(product, column).mul_(inverse.pow(3)).div_(width)
            dx = (above * gain).mul_(inverse).sub_(torch.mul(wide, along, out=product))
            d_gain = d_gain.sum_to_size(gain.shape) if gain.dim() == 3 else d_gain.sum(dim=(0, 1))
            d_addend = None
            if ctx.addend is not None:
                shape, dtype = ctx.addend
                d_addend = gradients[0].sum_to_size(shape).to(dtype)
        return dx.to(x.dtype), d_gain.to(gain.dtype), d_addend, None, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain over the last dimension.

    Statistics are taken in float32 (float64 for float64 input). A bfloat16 module casts the result to the input's type
    before the gain, as the released code does.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, factor: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        """norm(x), times `factor` [B, 1, D] and plus `addend` [B, 1, D] or [B, L, D] where given.

        On a CPU, autocast's type is returned but where an addend has x's shape: what follows is a matrix product.
        GPUs have a fused kernel and compilers make one.
        """
        plain = torch.compiler.is_compiling() or x.device.type != "cpu"
        if plain or self.weight.dtype.itemsize < 4 or x.dim() != 3:
            return combine(F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight, factor, addend)
        gain = self.weight if factor is None else self.weight * factor
        if addend is not None and addend.shape == x.shape:
            dtype = addend.dtype
        elif torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return ModulatedRMS.apply(x, gain, addend, self.eps, dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with the arguments of `RMSNorm`."""

    def forward(self, x: Tensor, factor: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        return combine(super().forward(x), factor, addend)


class NoNorm(nn.Identity):
    """Nothing, with the arguments of `RMSNorm`."""

    def forward(self, x: Tensor, factor: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        return combine(x, factor, addend)


def combine(x: Tensor, factor: Tensor | None, addend: Tensor | None) -> Tensor:
    """addend + x · factor, whichever is given."""
    if factor is None:
        return x if addend is None else addend + x
    return x * factor if addend is None else torch.addcmul(addend, x, factor)


def unit_layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension without gain and bias."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def unit_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension without gain."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)
