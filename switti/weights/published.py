"""Published weights on model hubs: the releases, and the two buffers by which their files differ from ours.

Published generators carry two buffers that can be recomputed: `lvl_1L` [1, L], the scale of each position, and
`attn_bias_for_masking` [1, 1, L, L], 0 where a position may look and −inf elsewhere: 357 MB at 1024 px. Both variants
have the same keys and shapes; only the mask's values, or config.json, distinguish them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from switti.models.transformer import ScaleTransformer
from switti.scales import Pyramid

Visibility = Literal["causal", "non_causal"]

LEVELS, MASK, HITS = "lvl_1L", "attn_bias_for_masking", "quantize.ema_vocab_hit_SV"
# Of every published generator.
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Release:
    """What a hub repository holds, where its own config.json does not say so. file: the one that is wanted."""

    resolution: int
    visibility: Visibility | None = None
    file: str | None = None


GENERATORS = {
    "yresearch/Switti": Release(512, "non_causal"),
    "yresearch/Switti-AR": Release(512, "causal"),
    "yresearch/Switti-1024": Release(1024, "non_causal"),
    "yresearch/Switti-1024-AR": Release(1024, "causal"),
}
TOKENIZER = "yresearch/VQVAE-Switti"
TOKENIZERS = {
    TOKENIZER: Release(512),
    "FoundationVision/var": Release(256, file="vae_ch160v4096z32.pth"),
}


def visible_keys(pyramid: Pyramid, visibility: Visibility) -> Tensor:
    """Boolean [L, L], True where query (row) sees key (column), as published files store it."""
    levels_L = pyramid.levels()
    if visibility == "causal":
        return levels_L[:, None] >= levels_L[None, :]
    return levels_L[:, None] == levels_L[None, :]


def generator_to_published(model: ScaleTransformer) -> dict[str, Tensor]:
    """The model's weights with the two buffers of the published files, float32 and int64, on the CPU."""
    pyramid = model.pyramid
    visible_LL = visible_keys(pyramid, model.config.visibility)
    mask_LL = torch.zeros(visible_LL.shape).masked_fill_(~visible_LL, -torch.inf)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return {**state, LEVELS: pyramid.levels()[None], MASK: mask_LL[None, None]}
