"""Settings of the text encoder. Imports no torch: configs are composed before torch is loaded."""

from dataclasses import dataclass
from typing import Literal, get_args

from switti.errors import UserError
from switti.suggestions import printable, shortened

MINILM_WIDTH = 384
MINILM_POSITIONS = 512
CLIP_POSITIONS = 77
MAX_WIDTH = 1 << 16
Encoder = Literal["minilm", "clip_pair"]


@dataclass
class TextConfig:
    """Which frozen network turns captions into conditions, and how long a caption may be.

    minilm: the sentence encoder that ships in a pip package; 384 channels, pooled by a masked mean.
    clip_pair: the paper's pair, CLIP ViT-L/14 and OpenCLIP ViT-bigG/14: 768 + 1280 channels, pooled 1280, 77 tokens.

    width, pooled_width: channels of the token states and of the pooled state; must fit the loaded networks.
    max_length: tokens per caption, special tokens included; longer captions are cut, shorter ones padded.
    clip_l, big_g: hub id or local folder in transformers format; read by clip_pair only.
    """

    encoder: Encoder = "minilm"
    width: int = MINILM_WIDTH
    pooled_width: int = MINILM_WIDTH
    max_length: int = 32
    clip_l: str = "openai/clip-vit-large-patch14"
    big_g: str = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"

    def validate(self, path: str) -> None:
        if self.encoder not in get_args(Encoder):
            known = ", ".join(get_args(Encoder))
            raise UserError(f"{path}.encoder={printable(self.encoder)} is not one of {known}")
        for name in ("width", "pooled_width"):
            if not 1 <= getattr(self, name) <= MAX_WIDTH:
                raise UserError(
                    f"{path}.{name}={shortened(getattr(self, name))} must lie in [1, {MAX_WIDTH}]"
                )
        positions = MINILM_POSITIONS if self.encoder == "minilm" else CLIP_POSITIONS
        if not 3 <= self.max_length <= positions:
            raise UserError(
                f"{path}.max_length={self.max_length} must lie in [3, {positions}] "
                f"for {path}.encoder={self.encoder}"
            )
        if self.encoder == "minilm":
            for name in ("width", "pooled_width"):
                if getattr(self, name) != MINILM_WIDTH:
                    raise UserError(
                        f"{path}.{name}={getattr(self, name)} must be {MINILM_WIDTH} "
                        f"for {path}.encoder=minilm"
                    )
        elif not (self.clip_l and self.big_g):
            raise UserError(f"{path}.clip_l and {path}.big_g must name a hub id or a local folder")
