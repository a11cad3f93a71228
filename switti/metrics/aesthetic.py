"""LAION's aesthetic predictor v2: five linear maps on the unit image embedding of OpenAI's CLIP ViT-L/14; 1 to 10.

Shape suffixes: B images, D width of the embedding.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switti.errors import UserError, first_line
from switti.files import kind_of
from switti.metrics.clip_score import load_open_clip
from switti.metrics.config import MetricsConfig
from switti.metrics.scores import DualEncoder, MeanScore
from switti.weights.torch_files import check_torch_file

FILE = "sac+logos+ava1-l14-linearMSE.pth"
# Numbered as published; dropout stands at 1, 3 and 5.
_SIZES = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}


class AestheticHead(nn.Module):
    """[B, D] → [B]; without activations, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, *_SIZES.values()]
        self.layers = nn.ModuleDict(
            {
                place: nn.Linear(inputs, outputs)
                for place, inputs, outputs in zip(_SIZES, widths, widths[1:], strict=False)
            }
        )

    def forward(self, x_BD: Tensor) -> Tensor:
        for layer in self.layers.values():
            x_BD = layer(x_BD)
        return x_BD[:, 0]


class Aesthetic:
    """uint8 images → scores; captions do not matter."""

    def __init__(self, encoder: DualEncoder, head: AestheticHead, device: torch.device | str = "cpu") -> None:
        self.encoder = encoder
        self.head = head.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, captions: list[str]) -> Tensor:
        """[B, 3, H, W] → [B]."""
        return self.head(F.normalize(self.encoder.encode_images(images_B3HW).float(), dim=-1))


def load_head(file: str | Path) -> AestheticHead:
    """The published head. UserError if the file is missing or holds something else."""
    setting = f"metrics.aesthetic={file}"
    if kind_of(file) != "file":
        raise UserError(
            f"{setting}: no such file; download {FILE} of github.com/christophschuhmann/improved-aesthetic-predictor"
        )
    try:
        check_torch_file(Path(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
        head = AestheticHead(state["layers.0.weight"].shape[1])
        head.load_state_dict(state)
    except (RuntimeError, OSError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{setting} does not hold the aesthetic head ({first_line(error)})") from error
    return head


def build_aesthetic(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, MeanScore]:
    """As `metrics.names` builds it."""
    head = load_head(str(config.aesthetic))
    encoder = load_open_clip(config.aesthetic_model, config.aesthetic_clip, device, "metrics.aesthetic_clip")
    wanted = head.layers["0"].in_features
    if encoder.width != wanted:
        raise UserError(
            f"metrics.aesthetic={config.aesthetic} needs an embedding of {wanted} numbers, but "
            f"metrics.aesthetic_model={config.aesthetic_model} gives {encoder.width}"
        )
    return "aesthetic_laion_v2", MeanScore(Aesthetic(encoder, head, device))
