"""Crop condition: original size and crop position as Fourier features, always in float32.

Shape suffixes: B batch, N frequencies.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def crop_condition(height_B: Tensor, width_B: Tensor, where_B2: Tensor, base: int) -> Tensor:
    """(height, width, top, left) of a square crop after the shorter side is scaled to `base` px, int32 [B, 4].

    height_B, width_B: of the original image, in pixels. where_B2: (vertical, horizontal) position in [0, 1]; 0.5 is a
    center crop. Sizes are truncated in float32, as the released weights were trained with: some give base − 1.
    Offsets are rounded, halves down, which for a center crop is the released floor((size − base) / 2).
    """
    height, width = height_B.float(), width_B.float()
    ratio = base / torch.minimum(height, width)
    size_B2 = torch.stack([torch.trunc(height * ratio), torch.trunc(width * ratio)], dim=1)
    offset_B2 = torch.ceil((size_B2 - base) * where_B2.float() - 0.5).clamp_min(0)
    return torch.cat([size_B2, offset_B2], dim=1).to(torch.int32)


def center_crop_condition(height_B: Tensor, width_B: Tensor, base: int = 512) -> Tensor:
    """`crop_condition` of a center crop, int32 [B, 4]."""
    return crop_condition(height_B, width_B, torch.full((len(height_B), 2), 0.5), base)


class FourierFeatures(nn.Module):
    """Sines and cosines of each number at fixed random frequencies: [B, 4] → [B, 8N].

    The frequencies are stored with the weights but never trained, and stay float32 whatever the model is cast to:
    arguments reach several thousand, where 16-bit precision would give unrelated features.
    """

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(frequencies, dtype=torch.float32), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourierFeatures":
        kept = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype in (torch.bfloat16, torch.float16) and kept.dtype == torch.float32:
            self.weight.data = kept.to(self.weight.device)
        return self

    def forward(self, values_B4: Tensor) -> Tensor:
        # This order of float32 operations is the released one; others differ by 1e-4.
        arguments = ((values_B4.to(self.weight.dtype)[..., None] * self.weight) * 2) * math.pi
        return torch.cat([arguments.sin(), arguments.cos()], dim=-1).flatten(1)
