"""Settings of the RQ-VAE and of the scale transformer. Imports no torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from switti.errors import UserError
from switti.suggestions import shortened

MAX_CROP_BASE = 1 << 20  # px; the condition is computed in float32


MAX_SCALES, MAX_TOKENS = 64, 1 << 18
# Far beyond any model, and small enough for a model of that size to be described at once.
_MOST = {
    "depth": 512, "width": 1 << 16, "heads": 1 << 10, "codebook_size": 1 << 20, "code_width": 1 << 12,
    "text_width": 1 << 16, "pooled_width": 1 << 16, "crop_base": MAX_CROP_BASE,
    "channels": 1 << 13, "residual_blocks": 64, "phi_count": 256,
}  # fmt: skip
MAX_LEVELS, MAX_MULTIPLIER = 8, 64


def _validate_scales(scales: list[int], path: str) -> None:
    shown = f"{path}.scales={shortened(scales)}"
    if not scales or scales[0] < 1 or any(b <= a for a, b in pairwise(scales)):
        raise UserError(f"{shown} must be positive, strictly increasing side lengths")
    if len(scales) > MAX_SCALES or sum(side * side for side in scales) > MAX_TOKENS:
        raise UserError(f"{shown} must be at most {MAX_SCALES} scales with {MAX_TOKENS:,} tokens together")


def check_sizes(config: object, names: Iterable[str], path: str) -> None:
    """UserError if one of these settings is below 1, or larger than any model's."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"{path}.{name}={shortened(value)} must be at least 1")
        if value > _MOST[name]:
            raise UserError(f"{path}.{name}={shortened(value)} must be at most {_MOST[name]}")


@dataclass
class RQVAEConfig:
    """Multi-scale residual-quantised autoencoder (Section 3.1). Defaults are the released 512 px tokenizer's."""

    scales: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32])
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
        _validate_scales(self.scales, path)
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


@dataclass
class GeneratorConfig:
    """Scale transformer. The ladder of Figures 3 and 4 is `norms`, `head_precision`, `ffn`, `visibility`.

    crop_base: the crop condition counts in pixels of an image whose shorter side has this length.
    """

    visibility: Literal["causal", "non_causal"] = "non_causal"
    head_precision: Literal["float32", "bfloat16"] = "float32"
    norms: Literal["sandwich", "pre"] = "sandwich"
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    query_key_norm: Literal["layer", "rms"] = "layer"
    depth: int = 30
    width: int = 1920
    heads: int = 30
    scales: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32])
    codebook_size: int = 4096
    code_width: int = 32
    text_width: int = 2048
    pooled_width: int = 1280
    crop_condition: bool = True
    crop_base: int = 512
    rope: bool = True
    rope_theta: float = 10_000.0
    rope_size: float = 128.0

    def validate(self, path: str) -> None:
        _validate_scales(self.scales, path)
        check_sizes(
            self,
            (
                "depth",
                "width",
                "heads",
                "codebook_size",
                "code_width",
                "text_width",
                "pooled_width",
                "crop_base",
            ),
            path,
        )
        for name in ("rope_theta", "rope_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{path}.{name}={getattr(self, name)} must be positive")
        if self.width % self.heads:
            raise UserError(f"{path}.width={self.width} must be a multiple of {path}.heads={self.heads}")
        if (self.width // self.heads) % 4:
            raise UserError(
                f"{path}.width={self.width} / {path}.heads={self.heads} must be a multiple of 4 "
                "(two axes of rotary pairs)"
            )
        if self.crop_condition and self.width % 8:
            raise UserError(f"{path}.width={self.width} must be a multiple of 8 for the crop condition")


# Of a generator's settings, those that weights trained with other values can be loaded into.
FREE_FIELDS = ("scales", "head_precision")
