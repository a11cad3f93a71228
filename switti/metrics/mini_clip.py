"""A small dual encoder for machines without a model hub: two trained heads on frozen MiniLM and frozen AlexNet.

Its `mini_clip_score` and `mini_clip_top1` measure whether images follow their captions within the domain it was trained
on (emoji-like images). It is not CLIP, and its values are comparable only with values of the same heads.

Shape suffixes: B images or captions, F image numbers of the trunk, P pooled text width, D common space.
"""

from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switti.config_values import from_values
from switti.errors import UserError
from switti.files import kind_of, read_json_object
from switti.losses.perceptual import AlexNetTrunk
from switti.metrics.config import EMBEDDED, MetricsConfig
from switti.metrics.retrieval import CaptionRetrieval
from switti.metrics.scores import MatchedAndShuffledCosine
from switti.text.config import MAX_WIDTH, MINILM_POSITIONS
from switti.text.minilm import MiniLMEncoder
from switti.weights.fill import fill
from switti.weights.read import read_weights

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_MAP_CHANNELS = (64, 192, 384, 256, 256)
_FINEST = 8
_MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class MiniClipConfig:
    """Sizes of the heads; written beside the weights.

    picture_side: px at which the trunk looks. grids: rows and columns on which each of its five maps is pooled, 0 for
    none of it.
    """

    text_width: int = 384
    hidden: int = 384
    width: int = 256
    max_length: int = 48
    picture_side: int = 128
    grids: list[int] = field(default_factory=lambda: [1, 1, 1, 1, 2])

    @property
    def image_width(self) -> int:
        """Numbers per image."""
        return sum(channels * grid**2 for channels, grid in zip(_MAP_CHANNELS, self.grids, strict=True))

    def validate(self, path: str) -> None:
        for name, least, most in (
            ("text_width", 1, MAX_WIDTH),
            ("hidden", 1, MAX_WIDTH),
            ("width", 1, MAX_WIDTH),
            ("max_length", 3, MINILM_POSITIONS),
            ("picture_side", 32, 1024),
        ):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"{path}.{name}={getattr(self, name)} must lie in [{least}, {most}]")
        if len(self.grids) != len(_MAP_CHANNELS) or not all(0 <= grid <= _FINEST for grid in self.grids):
            raise UserError(
                f"{path}.grids={self.grids} must be {len(_MAP_CHANNELS)} numbers in [0, {_FINEST}]"
            )
        if not any(self.grids):
            raise UserError(f"{path}.grids={self.grids} leaves nothing of an image")


class Head(nn.Module):
    """Standardize, one hidden layer, project: [B, F] → [B, D] of unit length."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: int, hidden: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, width)

    @torch.no_grad()
    def standardize_like(self, features_BF: Tensor) -> None:
        """Takes mean and deviation of the inputs from a sample of them."""
        self.mean.copy_(features_BF.mean(0))
        self.deviation.copy_(features_BF.std(0).clamp(min=1e-3))

    def forward(self, features_BF: Tensor) -> Tensor:
        hidden = F.gelu(self.hidden(self.dropout((features_BF - self.mean) / self.deviation)))
        return F.normalize(self.out(self.dropout(hidden)), dim=-1)


class MiniClipHeads(nn.Module):
    """The trained part. scale is the logarithm of the inverse temperature of InfoNCE."""

    def __init__(self, config: MiniClipConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.image = Head(config.image_width, config.hidden, config.width, dropout)
        self.text = Head(config.text_width, config.hidden, config.width, dropout)
        self.scale = nn.Parameter(torch.tensor(2.66))


class ImageDescription(nn.Module):
    """Frozen AlexNet → [B, F]: early maps for colour and outline, late ones on a grid for shapes and positions."""

    def __init__(self, config: MiniClipConfig) -> None:
        super().__init__()
        self.trunk, self.grids = AlexNetTrunk(config.picture_side), config.grids

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """uint8, or float in [0, 1]."""
        maps = self.trunk(images_B3HW)
        pooled = [
            values.mean(dim=(2, 3)) if grid == 1 else F.adaptive_avg_pool2d(values, grid).flatten(1)
            for values, grid in zip(maps, self.grids, strict=True)
            if grid
        ]
        return torch.cat(pooled, dim=1)


class MiniClip:
    """Dual encoder out of frozen networks and trained heads (`switti.metrics.scores.DualEncoder`)."""

    def __init__(self, heads: MiniClipHeads, device: torch.device | str = "cpu") -> None:
        self.heads = heads.eval().requires_grad_(False).to(device)
        self.width = heads.config.width
        self.images = ImageDescription(heads.config).to(device)
        self.captions = MiniLMEncoder(heads.config.max_length, device)

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """uint8, or float in [0, 1], [B, 3, H, W] → [B, D] of unit length."""
        return self.heads.image(self.images(images_B3HW))

    @torch.no_grad()
    def encode_texts(self, captions: list[str]) -> Tensor:
        """B captions → [B, D] of unit length."""
        return self.heads.text(self.captions.encode(captions).pooled_BP)


def embedded_folder() -> Path:
    """Folder of the heads that ship with the package."""
    return Path(str(resources.files("switti") / "assets" / "mini_clip"))


def load_heads(source: str | Path = EMBEDDED) -> MiniClipHeads:
    """Heads from "embedded" or a folder of `experiments.tools.train_mini_clip`. UserError names what is missing."""
    folder = embedded_folder() if source == EMBEDDED else Path(source)
    for name in (CONFIG, WEIGHTS):
        if kind_of(folder / name) is None:
            raise UserError(
                f"metrics.mini_clip={source}: {folder / name} is missing; train it with "
                f"python -m experiments.tools.train_mini_clip --data SHARDS --out {folder}"
            )
    try:
        sizes = read_json_object(folder / CONFIG, _MAX_CONFIG_BYTES).get("heads", {})
        with torch.device("meta"):
            heads = MiniClipHeads(from_values(MiniClipConfig, sizes, "heads"))
        state = {name: value.float() for name, value in read_weights(folder / WEIGHTS).items()}
        fill(heads, state, str(folder / WEIGHTS))
    except UserError as error:
        raise UserError(
            f"metrics.mini_clip={source}: {folder} does not hold mini-CLIP heads ({error})"
        ) from error
    return heads


def describe(config: MiniClipConfig) -> dict[str, Any]:
    """The sizes as written to config.json under "heads"."""
    return asdict(config)


def _encoder(config: MetricsConfig, device: torch.device | str, networks: dict[str, Any]) -> MiniClip:
    """The one that both metrics share."""
    if "mini_clip" not in networks:
        networks["mini_clip"] = MiniClip(load_heads(config.mini_clip), device)
    return networks["mini_clip"]


def build_mini_clip_score(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, Any]
) -> tuple[str, MatchedAndShuffledCosine]:
    """As `metrics.names` builds it."""
    return "mini_clip_score", MatchedAndShuffledCosine(_encoder(config, device, networks))


def build_mini_clip_top1(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, Any]
) -> tuple[str, CaptionRetrieval]:
    """As `metrics.names` builds it."""
    return "mini_clip_top1", CaptionRetrieval(_encoder(config, device, networks), "mini_clip")
