"""Settings of RQ-VAE pretraining. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from switti.errors import UserError


@dataclass
class TokenizerLossConfig:
    """Weights of the loss terms, and the care of the codebook.

    l1, mse: on pictures in [-1, 1]. lpips: 0 leaves the perceptual network out altogether. vq: of the quantiser's
      loss, which holds the commitment.
    init_codebook: first codes from the encoder's rows of the first batch, drawn at random (data) or their k-means
      centres; random keeps the normal initialisation.
    restart_dead_every: steps after which codes that no rank has chosen in the meantime move to random rows of the
      current batch; 0: never. restart_until: share of the run after which that ends, so that codes settle.
    flip: mirror half of the training pictures.
    """

    l1: float = 1.0
    mse: float = 0.0
    lpips: float = 1.0
    lpips_net: Literal["alex", "vgg"] = "alex"
    vq: float = 1.0
    init_codebook: Literal["data", "kmeans", "random"] = "data"
    restart_dead_every: int = 20
    restart_until: float = 0.7
    flip: bool = False

    def validate(self, path: str) -> None:
        for name in ("l1", "mse", "lpips", "vq"):
            if getattr(self, name) < 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must not be negative")
        if self.l1 + self.mse + self.lpips == 0:
            raise UserError(f"{path}.l1, .mse and .lpips are all 0: nothing would be reconstructed")
        if self.restart_dead_every < 0:
            raise UserError(
                f"{path}.restart_dead_every={self.restart_dead_every} must be 0 (off) or positive"
            )
        if not 0.0 <= self.restart_until <= 1.0:
            raise UserError(f"{path}.restart_until={self.restart_until} must lie in [0, 1]")
