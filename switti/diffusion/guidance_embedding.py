"""Sinusoidal embedding of the guidance strength, the extra input of guidance-distilled networks (Section 3.3)."""

import math

import torch
from torch import Tensor

GUIDANCE_WIDTH = 512


def guidance_embedding(strength_B: Tensor, width: int = GUIDANCE_WIDTH) -> Tensor:
    """E(g) [B, width] in float32: sines, then cosines of 1000·g·10000^(−k/(h−1)), h = ⌊width/2⌋, and a 0 if odd.

    strength_B: extra guidance g of ε_c + g·(ε_c − ε_u); 0 is none. It is diffusers' `timestep_cond`.
    """
    half = width // 2
    exponent_K = torch.arange(half, dtype=torch.float32, device=strength_B.device)
    frequency_K = torch.exp(exponent_K * -(math.log(10000.0) / (half - 1)))
    angle_BK = (strength_B.float() * 1000.0)[:, None] * frequency_K[None]
    embedding_BE = torch.cat([angle_BK.sin(), angle_BK.cos()], dim=1)
    return torch.nn.functional.pad(embedding_BE, (0, width % 2))
