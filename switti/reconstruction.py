"""How far a reconstruction is from its picture: training losses and the usual figures.

Pictures are [B, 3, H, W] in [-1, 1].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure


class ReconstructionLosses(NamedTuple):
    """Scalars: mean absolute and mean squared difference on the [-1, 1] scale, LPIPS (0 without a network)."""

    l1: Tensor
    mse: Tensor
    lpips: Tensor


def reconstruction_losses(
    image_B3HW: Tensor, target_B3HW: Tensor, perceptual: nn.Module | None = None
) -> ReconstructionLosses:
    """All terms, unweighted. perceptual: LPIPS, (a, b) → [B, 1, 1, 1]; None: not computed."""
    image_B3HW = image_B3HW.float() if image_B3HW.dtype.itemsize < 4 else image_B3HW
    lpips = image_B3HW.new_zeros(())
    if perceptual is not None:
        lpips = perceptual(image_B3HW, target_B3HW).float().mean()
    return ReconstructionLosses(
        F.l1_loss(image_B3HW, target_B3HW), F.mse_loss(image_B3HW, target_B3HW), lpips
    )


@torch.no_grad()
def psnr(image_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [B]; the reconstruction is clamped first."""
    error_B = (image_B3HW.clamp(-1, 1) - target_B3HW).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error_B)


@torch.no_grad()
def ssim(image_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """Structural similarity of each picture (Gaussian window of σ 1.5, 11 px), [B]; the reconstruction is clamped."""
    # Its variances are differences of convolutions, which bfloat16 would spoil.
    with torch.autocast(image_B3HW.device.type, enabled=False):
        values = structural_similarity_index_measure(
            image_B3HW.clamp(-1, 1), target_B3HW, data_range=(-1.0, 1.0), reduction="none"
        )
    return torch.as_tensor(values).reshape(-1)
