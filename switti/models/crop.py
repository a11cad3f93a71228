"""Crop condition: original size and crop position as Fourier features, always in float32.

Shape suffixes: B batch, N frequencies.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def center_crop_condition(height_B: Tensor, width_B: Tensor, base: int = 512) -> Tensor:
    """(height, width, top, left) of a centre crop after the shorter side is scaled to `base`, int32 [B, 4].

    Float32 truncation, as the released weights were trained with: some sizes give base − 1.
    """
    height, width = height_B.float(), width_B.float()
    ratio = base / torch.minimum(height, width)
    sizes = [torch.trunc(height * ratio), torch.trunc(width * ratio)]
    offsets = [torch.clamp(torch.floor((size - base) / 2), min=0) for size in sizes]
    return torch.stack([*sizes, *offsets], dim=1).to(torch.int32)


class FourierFeatures(nn.Module):
    """Sines and cosines of each number at fixed random frequencies: [B, 4] → [B, 8N].

    The frequencies are stored with the weights but never trained, and stay float32 whatever the model is cast to:
    arguments reach several thousand, where half precision would give unrelated features.
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
