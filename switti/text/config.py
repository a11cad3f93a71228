"""Settings of the text encoder. Imports no torch: configs are composed before torch is loaded."""

from dataclasses import dataclass

from switti.config_values import check
from switti.errors import UserError
from switti.import_path import check_choice, is_import_path

MINILM_WIDTH = 384
MINILM_POSITIONS = 512
CLIP_POSITIONS = 77
MAX_WIDTH = 1 << 16
MAX_POSITIONS = 1 << 16
ENCODERS = ("minilm", "clip_pair")


@dataclass
class TextConfig:
    """The frozen network that turns captions into conditions."""

    encoder: str = "minilm"
    """`minilm`: the sentence encoder that ships in a pip package, 384 channels. `clip_pair`: the paper's CLIP ViT-L/14
    and OpenCLIP ViT-bigG/14 side by side, 768 + 1280 channels, pooled 1280. Or `package.module:Name`, an encoder of
    your own (docs/extending.md)."""
    width: int = MINILM_WIDTH
    """Channels of a caption's token states; must be those of the encoder (384, or 2048 for the paper's pair)."""
    pooled_width: int = MINILM_WIDTH
    """Channels of the pooled caption; must be those of the encoder (384, or 1280 for the paper's pair)."""
    max_length: int = 32
    """Tokens of a caption, special tokens included: longer captions are cut, shorter ones padded. 3 to 512 for minilm,
    3 to 77 for clip_pair (the paper: 77)."""
    clip_l: str = "openai/clip-vit-large-patch14"
    """Hub id or local folder of CLIP ViT-L/14 in transformers format; read by clip_pair only."""
    big_g: str = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    """Hub id or local folder of OpenCLIP ViT-bigG/14 in transformers format; read by clip_pair only."""

    @property
    def is_built_in(self) -> bool:
        """Whether the encoder is one of this library's; another one is code that `encoder` names."""
        return not is_import_path(self.encoder)

    def validate(self, path: str) -> None:
        check_choice(f"{path}.encoder", self.encoder, ENCODERS)
        limits = (lambda value: 1 <= value <= MAX_WIDTH, f"must lie in [1, {MAX_WIDTH}]")
        check(self, path, limits, "width", "pooled_width")
        positions = {"minilm": MINILM_POSITIONS, "clip_pair": CLIP_POSITIONS}.get(self.encoder, MAX_POSITIONS)
        least = 3 if self.is_built_in else 1
        if not least <= self.max_length <= positions:
            raise UserError(
                f"{path}.max_length={self.max_length} must lie in [{least}, {positions}] "
                f"for {path}.encoder={self.encoder}"
            )
        if self.encoder == "minilm":
            words = f"must be {MINILM_WIDTH} for {path}.encoder=minilm"
            check(self, path, (lambda value: value == MINILM_WIDTH, words), "width", "pooled_width")
        elif self.encoder == "clip_pair" and not (self.clip_l and self.big_g):
            raise UserError(f"{path}.clip_l and {path}.big_g must name a hub id or a local folder")
