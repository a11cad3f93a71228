"""Settings of RQ-VAE training: the reconstruction losses and the upkeep of the codebook. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from switti.config_values import AT_LEAST_1, FRACTION, NOT_NEGATIVE, OFF_OR_POSITIVE, check
from switti.errors import UserError
from switti.scales import check_scales


@dataclass
class ReconstructionLossConfig:
    """Weights of the loss terms on reconstructed images, and the discriminator."""

    l1: float = 1.0
    """Weight of the mean absolute error, on images in [-1, 1]."""
    mse: float = 0.0
    """Weight of the mean squared error, on images in [-1, 1]."""
    lpips: float = 1.0
    """Weight of the perceptual distance LPIPS. 0: its network is not loaded."""
    lpips_net: Literal["vgg", "alex"] = "vgg"
    """Network of LPIPS: VGG16 or AlexNet."""
    lpips_start_step: int = 0
    """Optimizer step at which the perceptual term begins; its network costs more than a small tokenizer."""
    lpips_share: float = 1.0
    """Share of a micro-batch's images, in (0, 1], on which the perceptual term is computed; at least one image."""
    adversarial: float = 0.1
    """Weight of the adversarial term. 0: no discriminator. 0.1 is Real-ESRGAN's, whose discriminator this is; the paper
    gives none."""
    start_step: int = 0
    """Optimizer step at which the discriminator and the adversarial term begin."""
    gan: Literal["bce", "hinge"] = "bce"
    """Loss on the discriminator's logits: binary cross-entropy, or hinge."""
    r1: float = 0.0
    """Weight of the R1 gradient penalty on real images, computed in float32. 0: none."""
    adaptive: bool = False
    """Scale the adversarial term so that its gradient at the decoder's last layer is as large as that of the other
    terms, measured by each rank on its own images."""
    discriminator_features: int = 64
    """Channels of the discriminator's first convolution."""

    def validate(self, path: str) -> None:
        names = ("l1", "mse", "lpips", "lpips_start_step", "adversarial", "start_step", "r1")
        check(self, path, NOT_NEGATIVE, *names)
        check(self, path, (lambda value: 0.0 < value <= 1.0, "must lie in (0, 1]"), "lpips_share")
        if self.l1 + self.mse + self.lpips == 0:
            raise UserError(f"{path}.l1, .mse and .lpips are all 0: nothing would be reconstructed")
        check(self, path, AT_LEAST_1, "discriminator_features")


@dataclass
class TokenizerLossConfig(ReconstructionLossConfig):
    """RQ-VAE pretraining: the terms on images, the quantizer's loss, and the upkeep of the codebook."""

    lpips_net: Literal["vgg", "alex"] = "alex"
    adversarial: float = 0.0
    vq: float = 1.0
    """Weight of the quantizer's loss, which includes the commitment term (tokenizer.commitment)."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """How codes learn: by the gradient of the quantizer's loss, or each as the moving average of the residual vectors
    that chose it, over all ranks."""
    codebook_decay: float = 0.99
    """Decay of that moving average per step, in (0, 1)."""
    init_codebook: Literal["data", "kmeans", "random"] = "data"
    """First codes: residual vectors of the first batch drawn at random (data), the k-means centers of them (kmeans), or
    normally distributed numbers (random)."""
    init_batches: int = 1
    """First steps before each of which the codes are initialized from all images seen so far. At least 1."""
    restart_dead_every: int = 20
    """Steps after which codes that no rank has chosen in the meantime move to random residual vectors of the current
    batch. 0: never."""
    restart_until: float = 0.7
    """Share of the run in [0, 1] after which dead codes are left alone, so that the codebook settles."""
    pyramids: list[list[int]] = field(default_factory=list)
    """Further lists of scales: each step takes tokenizer.scales or one of these, all equally often. One that ends with
    a smaller side is trained on smaller images, so that one run covers several resolutions."""
    flip: bool = False
    """Mirror half of the training images."""

    def validate(self, path: str) -> None:
        super().validate(path)
        check(self, path, NOT_NEGATIVE, "vq")
        check(self, path, (lambda value: 0.0 < value < 1.0, "must lie in (0, 1)"), "codebook_decay")
        check(self, path, AT_LEAST_1, "init_batches")
        check(self, path, OFF_OR_POSITIVE, "restart_dead_every")
        check(self, path, FRACTION, "restart_until")
        for scales in self.pyramids:
            check_scales(scales, f"{path}.pyramids")
