"""Settings of the scale transformer. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from switti.config_values import check_sizes
from switti.errors import UserError
from switti.scales import PYRAMIDS, check_scales


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
    scales: list[int] = field(default_factory=lambda: list(PYRAMIDS[512]))
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
        check_scales(self.scales, f"{path}.scales")
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
