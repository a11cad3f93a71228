"""Settings of the RQ-VAE. Imports no torch."""

from dataclasses import dataclass, field

from switti.config_values import FRACTION, check, check_sizes
from switti.errors import UserError
from switti.scales import PYRAMIDS, check_scales
from switti.suggestions import shortened

MAX_LEVELS, MAX_MULTIPLIER, MAX_PATCH = 8, 64, 32


@dataclass
class RQVAEConfig:
    """Multi-scale residual-quantized autoencoder (Section 3.1); the defaults are the released 512 px tokenizer's."""

    scales: list[int] = field(default_factory=lambda: list(PYRAMIDS[512]))
    """Side lengths of the token maps, from coarse to fine, strictly increasing. The last one times the downsampling is
    the side of the images in px."""
    codebook_size: int = 4096
    """Number of codes, shared by all scales."""
    code_width: int = 32
    """Channels of a code and of the latent."""
    channels: int = 160
    """Channels of the first convolution; a multiple of 32 (GroupNorm has 32 groups)."""
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Channels of each resolution level as multiples of `channels`. n levels downsample by 2^(n − 1); 1 to 8 levels."""
    patch_size: int = 1
    """Side in px of the patches that the encoder's first convolution takes as channels and that the decoder's last one
    emits, in [1, 32]; it multiplies the downsampling. 1: pixels, as published; 2 or 4 save most of a CPU's time."""
    linear_shortcut: bool = False
    """Add linear maps between image patches and latent to encoder and decoder, first the lowest frequencies of a cosine
    transform, so that the networks learn only what these miss. False, as published."""
    residual_blocks: int = 2
    """Residual blocks of each level of the encoder; the decoder has one more."""
    phi_count: int = 4
    """Number of 3×3 convolutions φ that refine a scale's upsampled codes; scales share the one nearest in progress."""
    phi_ratio: float = 0.5
    """Share of the convolved map in the output of φ, (1 − ratio) · h + ratio · conv(h), in [0, 1]."""
    commitment: float = 0.25
    """Weight β of the commitment term, which pulls the encoder's output towards the codes."""

    @property
    def downsampling(self) -> int:
        """Image pixels per latent position and side."""
        return self.patch_size * 2 ** (len(self.multipliers) - 1)

    @property
    def resolution(self) -> int:
        """Side in px of the square image that belongs to the last scale."""
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
        if not 1 <= self.patch_size <= MAX_PATCH:
            raise UserError(f"{path}.patch_size={self.patch_size} must lie in [1, {MAX_PATCH}]")
        check(self, path, FRACTION, "phi_ratio")
        if self.channels % 32:
            raise UserError(
                f"{path}.channels={self.channels} must be a multiple of 32 (GroupNorm has 32 groups)"
            )
