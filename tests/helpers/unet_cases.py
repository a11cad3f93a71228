"""A tiny UNet of diffusers, and inputs for it."""

from typing import Any

import torch

from switti.diffusion.objective import Condition


def tiny_unet(seed: int = 0, **changes: Any) -> Any:
    """Two levels, the finer one with attention; 16×16×4 latents, 6 wide text, guidance embedding 32 wide."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    settings = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 6,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "time_cond_proj_dim": 32,
    }
    return UNet2DConditionModel(**settings | changes).eval()


def rows(
    count: int, seed: int = 1, length: int = 77
) -> tuple[torch.Tensor, torch.Tensor, Condition, torch.Tensor]:
    """Latents, times, text and extra guidance for `tiny_unet`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 16, 16, generator=generator)
    time = torch.randint(1000, (count,), generator=generator)
    text = Condition(torch.randn(count, length, 6, generator=generator))
    return x, time, text, torch.arange(count, dtype=torch.float32)
