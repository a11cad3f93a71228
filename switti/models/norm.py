"""Normalisations. Shape suffixes: D width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · gain over the last dimension.

    Statistics are taken in float32 (float64 for float64 input); the result is cast to the input's type before the
    gain, as in the released code: bfloat16 input with a float32 gain gives float32.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight


def unit_layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension without gain and bias."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


def unit_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension without gain."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)
