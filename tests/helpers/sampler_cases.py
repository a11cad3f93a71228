"""Small models and captions to sample with."""

import torch

from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.text.base import TextEmbedding
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

SCALES = [1, 2, 3, 4]


def build(visibility: str) -> tuple[ScaleTransformer, RQVAE]:
    torch.manual_seed(0)
    tokenizer = RQVAE(
        RQVAEConfig(
            scales=SCALES, codebook_size=48, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
        )
    ).eval()
    model = ScaleTransformer(
        GeneratorConfig(
            visibility=visibility,
            depth=2,
            width=32,
            heads=2,
            scales=SCALES,
            codebook_size=48,
            code_width=8,
            text_width=12,
            pooled_width=10,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, tokenizer


def captions(count: int, seed: int = 3) -> TextEmbedding:
    generator = torch.Generator().manual_seed(seed)
    return TextEmbedding(
        torch.randn(count, 5, 12, generator=generator),
        torch.ones(count, 5, dtype=torch.bool),
        torch.randn(count, 10, generator=generator),
    )
