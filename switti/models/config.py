"""Settings of the scale transformer. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Literal

from switti.config_values import check, check_sizes
from switti.errors import UserError
from switti.scales import PYRAMIDS, check_scales


@dataclass
class GeneratorConfig:
    """Scale transformer; the defaults are the paper's 2.5 B model at 512 px.

    The ladder of Figures 3 and 4 is `norms`, `head_precision`, `ffn` and `visibility`.
    """

    visibility: Literal["causal", "non_causal"] = "non_causal"
    """Scales that a token attends to: its own scale only (non_causal, Switti), or its own and all coarser ones
    (causal, Switti AR). Section 3.3."""
    head_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the classifier head under trainer.precision=bf16-mixed. A bfloat16 head makes activations grow until
    training diverges (Section 3.2, Figure 3)."""
    norms: Literal["sandwich", "pre"] = "sandwich"
    """Normalization of each sub-layer: RMSNorm before and after it (sandwich), or LayerNorm before it only (pre).
    Section 3.2, Figure 4."""
    ffn: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward network: SwiGLU with hidden width 8/3 · width and no biases, or GELU with hidden width 4 · width.
    Section 3.2, Figure 4."""
    query_key_norm: Literal["layer", "rms"] = "layer"
    """Normalization of queries and keys over the full width, before the split into heads: LayerNorm without gain
    (released weights), or RMSNorm (first version of the paper)."""
    depth: int = 30
    """Number of transformer blocks, 1 to 512."""
    width: int = 1920
    """Channels of the residual stream; a multiple of 4 · heads, and of 8 with crop_condition. The paper's models have
    64 · depth."""
    heads: int = 30
    """Attention heads. The paper's models have as many as blocks, so that a head has 64 channels."""
    scales: list[int] = field(default_factory=lambda: list(PYRAMIDS[512]))
    """Side lengths of the token maps, from coarse to fine. Follows tokenizer.scales."""
    codebook_size: int = 4096
    """Number of codes, the classes that the head predicts. Follows tokenizer.codebook_size."""
    code_width: int = 32
    """Channels of a code. Follows tokenizer.code_width."""
    text_width: int = 2048
    """Channels of a caption's token states, the input of cross-attention. Follows text.width."""
    pooled_width: int = 1280
    """Channels of the pooled caption, the input of AdaLN. Follows text.pooled_width."""
    crop_condition: bool = True
    """Condition every block on the size of the original image and the position of the crop."""
    crop_base: int = 512
    """Length of an image's shorter side in px in whose units the crop condition is given. Follows data.crop_base."""
    rope: bool = True
    """Rotary position embedding in two dimensions (Section 3.2); false: learned embeddings of all positions."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies; positive."""
    rope_size: float = 128.0
    """Extent of the rotary coordinates: at every scale positions run from 0 to this value, so that the corners of all
    scales coincide. Positive."""

    def validate(self, path: str) -> None:
        check_scales(self.scales, f"{path}.scales")
        sizes = (
            "depth",
            "width",
            "heads",
            "codebook_size",
            "code_width",
            "text_width",
            "pooled_width",
            "crop_base",
        )
        check_sizes(self, sizes, path)
        check(self, path, (lambda value: 0 < value < math.inf, "must be positive"), "rope_theta", "rope_size")
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
