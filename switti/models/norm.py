"""Normalization layers fused with AdaLN modulation and the residual sum.

Shape suffixes: B batch, L tokens, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switti.models.kernels import Backend, normalizes_in_pieces

# Elements handled at a time, so that every pass over them but the first finds them in the CPU cache.
PIECE = 2**19


def pieces(batch: int, length: int, width: int) -> Iterator[tuple[slice, slice]]:
    """(slice of B, slice of L) of about PIECE elements."""
    rows = max(1, min(length, PIECE // width))
    group = max(1, PIECE // (length * width)) if rows == length else 1
    for first in range(0, batch, group):
        for row in range(0, length, rows):
            yield slice(first, first + group), slice(row, row + rows)


class ModulatedRMS(torch.autograd.Function):
    """addend + x / sqrt(mean(x²) + eps) · gain, piece by piece, with few passes over the data forward and backward.

    x [B, L, D]; gain [B, 1, D]; addend None, [B, 1, D] or [B, L, D]. Computes in float32 at least; the result has type
    `dtype` and is rounded once with an addend. Autograd's own formulation needs three times as many passes, each over
    the full tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, addend: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:2], 1, dtype=exact)
        wide_gain = gain.to(exact)
        for rows, tokens in pieces(*x.shape):
            wide = x[rows, tokens].to(exact)
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            factor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            inverse[rows, tokens] = factor
            # Not in place where `wide` is x itself.
            wide = wide * factor if x.dtype == exact else wide.mul_(factor)
            if addend is None:
                if x.dtype != exact:
                    # Rounded before the gain, as in the released code.
                    wide = wide.to(x.dtype).to(exact)
                wide.mul_(wide_gain[rows])
            else:
                part = addend[rows] if addend.shape[1] == 1 else addend[rows, tokens]
                torch.addcmul(part.to(exact), wide, wide_gain[rows], out=wide)
            out[rows, tokens] = wide
        ctx.save_for_backward(x, gain, inverse)
        ctx.addend = None if addend is None else (addend.shape, addend.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        exact, (batch, _, width) = inverse.dtype, x.shape
        dx = torch.empty_like(x)
        d_gain, d_shift = (x.new_zeros(batch, 1, width, dtype=exact) for _ in range(2))
        shifted = ctx.addend is not None and ctx.addend[0] != x.shape
        with torch.autocast(x.device.type, enabled=False):
            column = gain.transpose(-1, -2).to(exact)
            for rows, tokens in pieces(*x.shape):
                wide, above = x[rows, tokens].to(exact), gradients[0][rows, tokens].to(exact)
                factor = inverse[rows, tokens]
                product = wide * above
                # A sum over tokens.
                d_gain[rows] += factor.transpose(-1, -2) @ product
                if shifted:
                    d_shift[rows] += above.sum(dim=1, keepdim=True)
                along = (product @ column[rows]).mul_(factor.pow(3)).div_(width)
                dx[rows, tokens] = (above * gain[rows]).mul_(factor).sub_(torch.mul(wide, along, out=product))
        d_addend = None
        if ctx.addend is not None:
            d_addend = (d_shift if shifted else gradients[0]).to(ctx.addend[1])
        return dx, d_gain.to(gain.dtype), d_addend, None, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain over the last dimension.

    Statistics are taken in float32 (float64 for float64 input). Without addend, or not in pieces, the result is cast to
    the input's type before the gain, as in the released code.
    """

    def __init__(self, width: int, eps: float = 1e-6, backend: Backend = "auto") -> None:
        super().__init__()
        self.eps = eps
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, factor: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        """norm(x), times `factor` [B, 1, D] and plus `addend` [B, 1, D] or [B, L, D] where given.

        In pieces, autocast's type is returned except where an addend has x's shape: what follows is a matrix product.
        """
        if not normalizes_in_pieces(self.backend, x) or x.dim() != 3:
            return combine(unit_rms_norm(x, self.eps) * self.weight, factor, addend)
        weight = self.weight.float() if self.weight.dtype.itemsize < 4 else self.weight
        gain = weight.expand(len(x), 1, -1) if factor is None else weight * factor
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
    """The identity, with the arguments of `RMSNorm`."""

    def forward(self, x: Tensor, factor: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
        return combine(x, factor, addend)


def combine(x: Tensor, factor: Tensor | None, addend: Tensor | None) -> Tensor:
    """addend + x · factor, whichever is given."""
    if factor is None:
        return x if addend is None else addend + x
    return x * factor if addend is None else torch.addcmul(addend, x, factor)


def unit_layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension without gain and bias, in the type of `x`."""
    with _own_type(x):
        return F.layer_norm(x, (x.shape[-1],), eps=eps)


def unit_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension without gain, in the type of `x`."""
    with _own_type(x):
        return F.rms_norm(x, (x.shape[-1],), eps=eps)


def _own_type(x: Tensor) -> torch.autocast:
    """Autocast off: on a GPU it would copy bfloat16 inputs of norms to float32 and keep the copies for the backward
    pass, although the kernels take statistics in float32 anyway. On a CPU it leaves norms alone."""
    return torch.autocast(x.device.type, enabled=False)
