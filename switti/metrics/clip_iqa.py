"""CLIP-IQA (arXiv 2207.12396): an image's similarity with "Good photo." against "Bad photo.", without a reference.

Which CLIP answers decides the level of the values, so each carries its network's name. Shape suffixes: B images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from switti.metrics.pick_score import load_transformers_clip
from switti.metrics.scores import DualEncoder

PROMPTS = ("Good photo.", "Bad photo.")
LOGIT_SCALE = 100.0  # every CLIP ends its training there


class ClipIqa:
    """uint8 images [B, 3, H, W] → probability of the good prompt against the bad one, [B] in [0, 1]."""

    def __init__(self, encoder: DualEncoder, name: str) -> None:
        self.encoder = encoder
        self.name = name
        self.prompts_2D = F.normalize(encoder.encode_texts(list(PROMPTS)).float(), dim=-1)

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> Tensor:
        images_BD = F.normalize(self.encoder.encode_images(images_B3HW).float(), dim=-1)
        return (LOGIT_SCALE * images_BD @ self.prompts_2D.T).softmax(dim=-1)[:, 0]


def load_clip_iqa(source: str, device: torch.device | str = "cpu") -> ClipIqa:
    """With a CLIP in transformers format, from a hub id or a local folder. UserError names the source."""
    files = "the model, tokenizer and preprocessor files of a CLIP such as openai/clip-vit-base-patch16"
    name = source.rstrip("/").rsplit("/", 1)[-1].lower().replace("-", "_")
    return ClipIqa(load_transformers_clip(source, f"--clip-iqa {source}", files, device), f"clip_iqa_{name}")
