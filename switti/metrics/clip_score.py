"""CLIPScore as in the paper: the raw cosine under a named OpenCLIP backbone (ViT-H/14 laion2B there, ≈ 0.35).

Other conventions exist (100·max(cos, 0); 2.5·max(cos, 0) with ViT-B/32), so each value carries its backbone's name.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from switti.errors import UserError, first_line
from switti.metrics.config import MetricsConfig
from switti.metrics.scores import MeanCosine
from switti.weights.read import TORCH_FILES
from switti.weights.torch_files import check_torch_file

_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


class OpenClipEncoder:
    """An open_clip network with its own preprocessing (`switti.metrics.scores.DualEncoder`); all injected."""

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.width = self.encode_texts([""]).shape[-1]

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] → [B, D]. Through PIL, as the published preprocessing resizes with PIL's bicubic."""
        batch = torch.stack([self.preprocess(to_pil_image(image)) for image in images_B3HW.cpu()])
        return self.model.encode_image(batch.to(self.device)).float()

    @torch.no_grad()
    def encode_texts(self, captions: list[str]) -> Tensor:
        """B captions, cut at the backbone's context (77 tokens) → [B, D]."""
        return self.model.encode_text(self.tokenizer(captions).to(self.device)).float()


def clip_score_name(model: str) -> str:
    """Label of the metric: "ViT-H-14" → "clip_score_vit_h_14"."""
    return "clip_score_" + model.lower().replace("-", "_").replace("/", "_")


def load_open_clip(
    model: str,
    weights: str,
    device: torch.device | str = "cpu",
    setting: str = "metrics.clip_weights",
    resize: str | None = None,
) -> OpenClipEncoder:
    """Architecture by name; weights from a file or from a tag that open_clip can find.

    Args:
        setting: that names the weights, for messages.
        resize: open_clip's image_resize_mode, if another than the weights' own.

    Raises:
        UserError: either of them fails.
    """
    import open_clip

    if weights.endswith(_WEIGHT_SUFFIXES) and not Path(weights).is_file():
        raise UserError(f"{setting}={weights}: no such file")
    if Path(weights).is_file() and weights.endswith(TORCH_FILES):
        check_torch_file(Path(weights))
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained=weights, image_resize_mode=resize
        )
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(
            f"{setting}={weights} cannot be loaded as {model} ({reason}); "
            "give a local weights file, or fetch the weights where there is a network"
        ) from error
    return OpenClipEncoder(network, preprocess, tokenizer, device)


def build_clip_score(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, MeanCosine]:
    """As `metrics.names` builds it."""
    encoder = load_open_clip(config.clip_model, config.clip_weights, device)
    return clip_score_name(config.clip_model), MeanCosine(encoder)
