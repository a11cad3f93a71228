"""Quality of a tokenizer (Table 1): fidelity, rFID, codebook use and error by scale.

Shape suffixes: B images, K scales, V codebook entries, HH the square latent.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from switti.losses.perceptual import AlexNetFeatures, build_lpips
from switti.metrics.clip_iqa import ClipIqa
from switti.metrics.collection import to_bytes
from switti.metrics.fid import FrechetDistance, InceptionFeatures
from switti.metrics.image_quality import lpips_distance, psnr, ssim
from switti.metrics.scale_statistics import ScaleStatistics
from switti.tokenizer.rqvae import RQVAE

# Images that are decoded after every scale.
DECODED_BY_SCALE = 32


@dataclass(frozen=True)
class QualityNetworks:
    """Networks that several tokenizers are measured with. lpips: by the name of the metric; clip_iqa: None skips it.

    features: uint8 images → [B, `num_features`] for the distance of the sets, rfid_<features_name>.
    """

    lpips: dict[str, nn.Module]
    features: AlexNetFeatures | InceptionFeatures
    features_name: str
    clip_iqa: ClipIqa | None = None


def build_quality_networks(
    device: torch.device | str, clip_iqa: ClipIqa | None = None, inception: Path | None = None
) -> QualityNetworks:
    """LPIPS with both published trunks; the features of Inception from a weights file, else of AlexNet."""
    lpips = {"lpips_vgg": build_lpips("vgg").to(device), "lpips_alex": build_lpips("alex").to(device)}
    if inception is None:
        return QualityNetworks(lpips, AlexNetFeatures().to(device), "alexnet", clip_iqa)
    return QualityNetworks(
        lpips, InceptionFeatures(inception, "--inception ").to(device), "inception", clip_iqa
    )


@dataclass(frozen=True)
class TokenizerReport:
    """values: metric → value. by_scale: metric → one value a scale. images: metric → value, one dict an image."""

    values: dict[str, float]
    by_scale: dict[str, list[float]]
    images: list[dict[str, float]] = field(repr=False)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def reconstruct(model: RQVAE, image_B3HW: Tensor) -> Tensor:
    """Images in [-1, 1] → what their tokens keep of them, in [0, 1], on the model's device."""
    image_B3HW = image_B3HW.to(device_of(model))
    decoded_B3HW = model.decode(model.tokens_to_latent(model.tokenize(image_B3HW)))
    return (decoded_B3HW.clamp(-1, 1) + 1) / 2


def latent_errors(f_BCHH: Tensor, latents_BCHH: list[Tensor]) -> Tensor:
    """Share of the latent's energy that is missing after each scale, ‖f − f_hat‖² / ‖f‖²: [B, K], 1 for f_hat = 0."""
    energy_B = f_BCHH.square().sum((1, 2, 3))
    missing = [(f_BCHH - f_hat_BCHH).square().sum((1, 2, 3)) for f_hat_BCHH in latents_BCHH]
    return torch.stack(missing, dim=1) / energy_B[:, None]


def psnr_by_scale_name(images: int) -> str:
    """Name of the metric by scale that is measured on the first DECODED_BY_SCALE of `images` images."""
    return f"psnr_of_first_{min(images, DECODED_BY_SCALE)}"


class TokenizerQuality:
    """Adds up over batches of images; in one process.

    By scale, besides codebook use: the share of the latent missing after each scale and, of the first
    DECODED_BY_SCALE images, the mean PSNR when scales 0 … k alone are decoded.
    """

    def __init__(self, model: RQVAE, networks: QualityNetworks) -> None:
        self.model = model
        self.networks = networks
        self.statistics = ScaleStatistics(model.pyramid, model.config.codebook_size)
        self.distance = FrechetDistance(networks.features.num_features)
        self.images: list[dict[str, float]] = []
        self._errors_K = torch.zeros(model.pyramid.count, dtype=torch.float64)
        self._psnrs_K = torch.zeros(model.pyramid.count, dtype=torch.float64)

    @torch.no_grad()
    def update(self, image_B3HW: Tensor) -> None:
        """Images in [-1, 1] of the tokenizer's own size."""
        model = self.model
        image_B3HW = image_B3HW.to(device_of(model))
        f_BCHH = model.encode(image_B3HW)
        tokens_BL = model.quantize.tokenize(f_BCHH)
        latents_BCHH = list(model.quantize.latents(tokens_BL))
        decoded_B3HW = self._decode(latents_BCHH[-1])
        target_B3HW = (image_B3HW + 1) / 2
        if left := max(0, DECODED_BY_SCALE - len(self.images)):
            for scale, f_hat_BCHH in enumerate(latents_BCHH):
                values_B = psnr(self._decode(f_hat_BCHH[:left]), target_B3HW[:left])
                self._psnrs_K[scale] += values_B.sum().cpu()
        self._errors_K += latent_errors(f_BCHH, latents_BCHH).double().sum(0).cpu()
        self.statistics.update(tokens_BL.cpu())
        for images_B3HW, real in ((target_B3HW, True), (decoded_B3HW, False)):
            self.distance.update(self.networks.features(to_bytes(images_B3HW)).cpu(), real=real)
        columns = {"psnr": psnr(decoded_B3HW, target_B3HW), "ssim": ssim(decoded_B3HW, target_B3HW)}
        for name, network in self.networks.lpips.items():
            columns[name] = lpips_distance(network, decoded_B3HW, target_B3HW)
        if (clip_iqa := self.networks.clip_iqa) is not None:
            columns[clip_iqa.name] = clip_iqa(to_bytes(decoded_B3HW))
        rows = zip(*(values_B.tolist() for values_B in columns.values()), strict=True)
        self.images += [dict(zip(columns, row, strict=True)) for row in rows]

    def _decode(self, f_hat_BCHH: Tensor) -> Tensor:
        return (self.model.decode(f_hat_BCHH).clamp(-1, 1) + 1) / 2

    def compute(self) -> TokenizerReport:
        """Means over images, and metrics of the set (nan where those need more images)."""
        count = len(self.images)
        values = {name: sum(row[name] for row in self.images) / count for name in self.images[0]}
        values[f"rfid_{self.networks.features_name}"] = float(self.distance.compute())
        statistics = self.statistics.compute()
        values["codebook_use"] = float(statistics["codebook_use_total"])
        by_scale = {name: statistics[name].tolist() for name in ("codebook_use", "perplexity")}
        by_scale["latent_error"] = (self._errors_K / count).tolist()
        by_scale[psnr_by_scale_name(count)] = (self._psnrs_K / min(count, DECODED_BY_SCALE)).tolist()
        return TokenizerReport(values, by_scale, self.images)
