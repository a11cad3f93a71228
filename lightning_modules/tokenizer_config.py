"""Settings of RQ-VAE training: the losses on pictures, and the care of the codebook. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from switti.errors import UserError
from switti.scales import check_scales


@dataclass
class ReconstructionLossConfig:
    """Weights of the loss terms on pictures, and the discriminator.

    l1, mse: on pictures in [-1, 1]. lpips: 0 leaves the perceptual network out altogether.
    adversarial: 0 leaves the discriminator out altogether; 0.1 is the weight of Real-ESRGAN, from which the
      discriminator comes (the paper gives none).
    start_step: the discriminator and the adversarial term begin after so many steps.
    gan: loss on its logits. r1: weight of the gradient penalty on real pictures, computed in float32; 0: none.
    adaptive: scale the adversarial term so that it pulls at the decoder's last layer as hard as the others, judged by
      each rank on its own pictures.
    """

    l1: float = 1.0
    mse: float = 0.0
    lpips: float = 1.0
    lpips_net: Literal["vgg", "alex"] = "vgg"
    adversarial: float = 0.1
    start_step: int = 0
    gan: Literal["bce", "hinge"] = "bce"
    r1: float = 0.0
    adaptive: bool = False
    discriminator_features: int = 64

    def validate(self, path: str) -> None:
        for name in ("l1", "mse", "lpips", "adversarial", "start_step", "r1"):
            if getattr(self, name) < 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must not be negative")
        if self.l1 + self.mse + self.lpips == 0:
            raise UserError(f"{path}.l1, .mse and .lpips are all 0: nothing would be reconstructed")
        if self.discriminator_features < 1:
            raise UserError(f"{path}.discriminator_features={self.discriminator_features} must be at least 1")


@dataclass
class TokenizerLossConfig(ReconstructionLossConfig):
    """Pretraining: the terms on pictures, the quantiser's, and the care of the codebook.

    vq: weight of the quantiser's loss, which holds the commitment.
    codebook_update: gradient moves the codes by the quantiser's loss; ema makes each the moving average, with
      codebook_decay, of the residual rows that chose it, on all ranks.
    init_codebook: first codes from the encoder's rows of the first batch, drawn at random (data) or their k-means
      centres; random keeps the normal initialisation.
    init_batches: the codes are made anew before each of so many first steps, from all pictures seen by then.
    restart_dead_every: steps after which codes that no rank has chosen in the meantime move to random rows of the
      current batch; 0: never. restart_until: share of the run after which that ends, so that codes settle.
    pyramids: more pyramids; each step takes tokenizer.scales or one of these, all equally often. Their last sides may
      be smaller: the pictures are then made smaller, so that one training covers several resolutions.
    flip: mirror half of the training pictures.
    """

    lpips_net: Literal["vgg", "alex"] = "alex"
    adversarial: float = 0.0
    vq: float = 1.0
    codebook_update: Literal["gradient", "ema"] = "gradient"
    codebook_decay: float = 0.99
    init_codebook: Literal["data", "kmeans", "random"] = "data"
    init_batches: int = 1
    restart_dead_every: int = 20
    restart_until: float = 0.7
    pyramids: list[list[int]] = field(default_factory=list)
    flip: bool = False

    def validate(self, path: str) -> None:
        super().validate(path)
        if self.vq < 0:
            raise UserError(f"{path}.vq={self.vq} must not be negative")
        if not 0.0 < self.codebook_decay < 1.0:
            raise UserError(f"{path}.codebook_decay={self.codebook_decay} must lie in (0, 1)")
        if self.init_batches < 1:
            raise UserError(f"{path}.init_batches={self.init_batches} must be at least 1")
        if self.restart_dead_every < 0:
            raise UserError(
                f"{path}.restart_dead_every={self.restart_dead_every} must be 0 (off) or positive"
            )
        if not 0.0 <= self.restart_until <= 1.0:
            raise UserError(f"{path}.restart_until={self.restart_until} must lie in [0, 1]")
        for sides in self.pyramids:
            check_scales(sides, f"{path}.pyramids")
