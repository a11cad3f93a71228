"""PickScore v1 as in the paper: the raw cosine of image and caption under its fine-tuned CLIP-H (≈ 0.22)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switti.errors import UserError, first_line
from switti.metrics.config import MetricsConfig
from switti.metrics.scores import MeanCosine
from switti.text.quiet import quiet_transformers
from switti.weights.transformers_folder import check_folder

_TEXT_TOKENS = 77


class TransformersClipEncoder:
    """A transformers CLIPModel with its processor (`switti.metrics.scores.DualEncoder`); both injected."""

    def __init__(self, model: Any, processor: Any, device: torch.device | str = "cpu") -> None:
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.processor = processor
        self.device = torch.device(device)
        self.width: int = int(self.model.config.projection_dim)

    @torch.no_grad()
    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] → [B, D]."""
        batch = self.processor(images=list(images_B3HW.cpu()), return_tensors="pt").to(self.device)
        return self.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output.float()

    @torch.no_grad()
    def encode_texts(self, captions: list[str]) -> Tensor:
        """B captions, cut at 77 tokens → [B, D]."""
        batch = self.processor(
            text=captions, padding=True, truncation=True, max_length=_TEXT_TOKENS, return_tensors="pt"
        ).to(self.device)
        outputs = self.model.get_text_features(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        return outputs.pooler_output.float()


def load_pick_score(source: str, device: torch.device | str = "cpu") -> TransformersClipEncoder:
    """From a hub id or a local folder with model and processor files. UserError names the source and the remedy."""
    files = "PickScore v1 and the tokenizer and preprocessor files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    return load_transformers_clip(source, f"metrics.pick_score={source}", files, device)


def load_transformers_clip(
    source: str, setting: str, files: str, device: torch.device | str = "cpu"
) -> TransformersClipEncoder:
    """Any CLIP in transformers format. setting, files: names of the source and of the required files in messages."""
    from transformers import CLIPModel, CLIPProcessor

    local = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(f"{setting}: no such folder; give one in transformers format, or a hub id")
    if local.is_dir():
        check_folder(local, setting)
    place = str(local) if local.is_dir() else source
    try:
        with quiet_transformers():
            loaded: Any = CLIPModel.from_pretrained(
                place, local_files_only=local.is_dir(), output_loading_info=True, dtype=torch.float32
            )
            processor = CLIPProcessor.from_pretrained(place, local_files_only=local.is_dir())
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{setting} cannot be loaded ({reason}); give a local folder with {files}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{setting} lacks weights such as {sorted(info['missing_keys'])[0]}")
    return TransformersClipEncoder(model, processor, device)


def build_pick_score(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, MeanCosine]:
    """As `metrics.names` builds it."""
    return "pick_score_v1", MeanCosine(load_pick_score(config.pick_score, device))
