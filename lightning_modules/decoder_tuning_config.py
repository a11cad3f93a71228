"""Settings of the RQ-VAE decoder's tuning. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from switti.errors import UserError


@dataclass
class DecoderTuningConfig:
    """Weights of the loss terms, and the discriminator.

    l1: on pictures in [-1, 1]. lpips: 0 leaves the perceptual network out altogether.
    adversarial: 0 leaves the discriminator out altogether; 0.1 is the weight of Real-ESRGAN, from which the
      discriminator comes (the paper gives none).
    start_step: the discriminator and the adversarial term begin after so many steps.
    gan: loss on its logits. r1: weight of the gradient penalty on real pictures, computed in float32; 0: none.
    adaptive: scale the adversarial term so that it pulls at the decoder's last layer as hard as the others, judged by
      each rank on its own pictures.
    """

    l1: float = 1.0
    lpips: float = 1.0
    lpips_net: Literal["vgg", "alex"] = "vgg"
    adversarial: float = 0.1
    start_step: int = 0
    gan: Literal["bce", "hinge"] = "bce"
    r1: float = 0.0
    adaptive: bool = False
    discriminator_features: int = 64

    def validate(self, path: str) -> None:
        for name in ("l1", "lpips", "adversarial", "start_step", "r1"):
            if getattr(self, name) < 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must not be negative")
        if self.l1 + self.lpips == 0:
            raise UserError(f"{path}.l1 and {path}.lpips are both 0: nothing would be reconstructed")
        if self.discriminator_features < 1:
            raise UserError(f"{path}.discriminator_features={self.discriminator_features} must be at least 1")
