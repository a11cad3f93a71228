"""Fidelity of reconstructions (Table 1): PSNR, SSIM, LPIPS, on images in [0, 1].

Shape suffixes: B images.
"""

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, peak 1, [B]; infinite for equal images."""
    error_B = (images_B3HW.double() - targets_B3HW.double()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error_B)


def ssim(images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
    """Structural similarity of each image, [B]: 11×11 Gaussian window, σ = 1.5, range 1, mirrored at the borders."""
    # Its variances are differences of convolutions, which bfloat16 would spoil.
    with torch.autocast(images_B3HW.device.type, enabled=False):
        values = structural_similarity_index_measure(
            images_B3HW.float(), targets_B3HW.float(), data_range=1.0, reduction="none"
        )
    if not isinstance(values, Tensor):
        raise TypeError("torchmetrics returned more than the similarity")
    return values.reshape(-1)


def lpips_distance(network: nn.Module, images_B3HW: Tensor, targets_B3HW: Tensor) -> Tensor:
    """LPIPS of each image, [B]; `network` from switti.losses.perceptual.build_lpips."""
    return network(images_B3HW * 2 - 1, targets_B3HW * 2 - 1).reshape(-1)


class ReconstructionQuality(Metric):
    """Means over images of psnr, ssim and (with a network) lpips. One sum each crosses processes.

    The mean of PSNR is taken over images, as published, not over pixels of all images.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, lpips_network: nn.Module | None = None, lpips_name: str = "lpips_alex") -> None:
        super().__init__()
        self.lpips_network = lpips_network
        self.names = ["psnr", "ssim", *([lpips_name] if lpips_network is not None else [])]
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, images_B3HW: Tensor, targets_B3HW: Tensor) -> None:
        """Adds reconstructions and their originals, float [B, 3, H, W]; both are clamped to [0, 1]."""
        images, targets = images_B3HW.clamp(0, 1), targets_B3HW.clamp(0, 1)
        values = [psnr(images, targets), ssim(images, targets)]
        if self.lpips_network is not None:
            values.append(lpips_distance(self.lpips_network, images, targets))
        self.sums += torch.stack([value.double().sum() for value in values]).to(self.sums.device)
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """Mean of each quantity by name; nan without images."""
        means = (self.sums / self.count).tolist()
        return dict(zip(self.names, means, strict=True))
