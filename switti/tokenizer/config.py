"""Settings of the RQ-VAE. Imports no torch."""

from dataclasses import dataclass, field

from switti.config_values import check_sizes
from switti.errors import UserError
from switti.scales import PYRAMIDS, check_scales
from switti.suggestions import shortened

MAX_LEVELS, MAX_MULTIPLIER = 8, 64


@dataclass
class RQVAEConfig:
    """Multi-scale residual-quantised autoencoder (Section 3.1). Defaults are the released 512 px tokenizer's."""

    scales: list[int] = field(default_factory=lambda: list(PYRAMIDS[512]))
    codebook_size: int = 4096
    code_width: int = 32
    channels: int = 160
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    residual_blocks: int = 2
    phi_count: int = 4
    phi_ratio: float = 0.5
    commitment: float = 0.25

    @property
    def downsampling(self) -> int:
        """Picture pixels per latent position and side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def resolution(self) -> int:
        """Side of the square picture in pixels that the last scale stands for."""
        return self.scales[-1] * self.downsampling

    def validate(self, path: str) -> None:
        check_scales(self.scales, f"{path}.scales")
        check_sizes(self, ("codebook_size", "code_width", "channels", "residual_blocks", "phi_count"), path)
        allowed = 1 <= len(self.multipliers) <= MAX_LEVELS
        if not allowed or not all(1 <= factor <= MAX_MULTIPLIER for factor in self.multipliers):
            raise UserError(
                f"{path}.multipliers={shortened(self.multipliers)} must be 1 to {MAX_LEVELS} numbers in "
                f"[1, {MAX_MULTIPLIER}]"
            )
        if not 0.0 <= self.phi_ratio <= 1.0:
            raise UserError(f"{path}.phi_ratio={self.phi_ratio} must lie in [0, 1]")
        if self.channels % 32:
            raise UserError(
                f"{path}.channels={self.channels} must be a multiple of 32 (GroupNorm has 32 groups)"
            )
