"""Reconstruction losses of tokenizers: L1, MSE and LPIPS. For metrics see switti/metrics/image_quality.py.

Images are [B, 3, H, W] in [-1, 1].
"""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class ReconstructionLosses(NamedTuple):
    """Scalars: mean absolute and mean squared difference on the [-1, 1] scale, LPIPS (0 without a network)."""

    l1: Tensor
    mse: Tensor
    lpips: Tensor


def reconstruction_losses(
    image_B3HW: Tensor, target_B3HW: Tensor, perceptual: nn.Module | None = None, share: float = 1.0
) -> ReconstructionLosses:
    """All terms, unweighted.

    perceptual: LPIPS, (a, b) → [B, 1, 1, 1]; None: not computed. share: of the images, the first ones, that it sees.
    """
    image_B3HW = image_B3HW.float() if image_B3HW.dtype.itemsize < 4 else image_B3HW
    lpips = image_B3HW.new_zeros(())
    if perceptual is not None:
        seen = math.ceil(share * len(image_B3HW))
        lpips = perceptual(image_B3HW[:seen], target_B3HW[:seen]).float().mean()
    return ReconstructionLosses(
        F.l1_loss(image_B3HW, target_B3HW), F.mse_loss(image_B3HW, target_B3HW), lpips
    )
