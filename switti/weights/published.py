"""Published weights: what is out there, and how its keys differ from ours. `switti.weights.load` reads them.

Published generators carry two buffers that can be recomputed: `lvl_1L` [1, L], the scale of each position, and
`attn_bias_for_masking` [1, 1, L, L], 0 where a position may look and −inf elsewhere: 357 MB at 1024 px. Both variants
have the same keys and shapes; only the mask's values, or config.json, tell them apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from switti.errors import UserError
from switti.models.transformer import ScaleTransformer
from switti.scales import MAX_SCALES, Pyramid

Visibility = Literal["causal", "non_causal"]

LEVELS, MASK, HITS = "lvl_1L", "attn_bias_for_masking", "quantize.ema_vocab_hit_SV"
HEAD_WIDTH = 64  # of every published generator


@dataclass(frozen=True)
class Release:
    """What a hub repository holds, as far as its own config.json does not say so. file: the one that is wanted."""

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


# ---- the generator's keys ---------------------------------------------------------------------------------------


class Published(NamedTuple):
    """state: ours. visibility: what the mask says, None without one. fields: of GeneratorConfig, read off shapes."""

    state: dict[str, Tensor]
    visibility: Visibility | None
    fields: dict[str, Any]


def generator_from_published(state: Mapping[str, Tensor], source: str = "these weights") -> Published:
    """Published (or our own) weights as ours: the two buffers are checked and dropped.

    Raises UserError if this is no scale transformer, or if a buffer is not what its pyramid makes it.
    """
    found = generator_fields(state, source)
    scales: list[int] | None = found.get("scales")
    visibility = None
    if MASK in state:
        if scales is None:
            raise UserError(f"{source} holds {MASK} without {LEVELS}, which says what it masks")
        visibility = _read_mask(state[MASK], Pyramid(tuple(scales)), source)
    ours = {key: value for key, value in state.items() if key not in (LEVELS, MASK)}
    return Published(ours, visibility, found)


def generator_fields(state: Mapping[str, Tensor], source: str = "these weights") -> dict[str, Any]:
    """Fields of GeneratorConfig that the weights themselves show. `scales` needs the buffer `lvl_1L`.

    What they cannot show: visibility, heads, head_precision, query_key_norm, rope_theta and rope_size.
    """
    needed = ["word_embed.weight", "text_pooler.weight", "head.weight", "blocks.0.cross_attn.to_kv.weight"]
    _check_tables(state, needed, "scale transformer", source)
    width, code_width = state["word_embed.weight"].shape[:2]
    found = {
        "depth": _count(state, "blocks", "cross_attn.to_kv.weight"),
        "width": width,
        "code_width": code_width,
        "codebook_size": state["head.weight"].shape[0],
        "pooled_width": state["text_pooler.weight"].shape[1],
        "text_width": state["blocks.0.cross_attn.to_kv.weight"].shape[1],
        "crop_condition": "crop_proj.weight" in state,
        "rope": "pos_1LC" not in state,
        "ffn": "swiglu" if "blocks.0.ffn.gate_proj.weight" in state else "gelu",
        "norms": "sandwich" if "blocks.0.self_attention_norm2.weight" in state else "pre",
    }
    return found | ({"scales": _read_levels(state[LEVELS], source)} if LEVELS in state else {})


def _check_tables(state: Mapping[str, Tensor], needed: Sequence[str], kind: str, source: str) -> None:
    """UserError unless weights hold these matrices (or, of a tokenizer, convolutions)."""
    missing = [key for key in needed if key not in state]
    if missing:
        raise UserError(f"{source} is no {kind}: {', '.join(missing)} missing")
    for key in needed:
        if state[key].ndim not in (2, 4) or not state[key].numel():
            raise UserError(f"{source} is no {kind}: {key} is {list(state[key].shape)}")


def _count(state: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    """How many parts <prefix>.0.<suffix>, <prefix>.1.<suffix>, … there are."""
    return next(i for i in range(len(state) + 1) if f"{prefix}.{i}.{suffix}" not in state)


def _read_levels(levels_1L: Tensor, source: str) -> list[int]:
    levels_L = levels_1L.flatten().long()
    if levels_L.numel() == 0 or not 0 <= int(levels_L.min()) <= int(levels_L.max()) < MAX_SCALES:
        raise UserError(f"{source}: {LEVELS} is no pyramid of square token maps")
    sides = [math.isqrt(size) for size in levels_L.bincount().tolist()]
    if 0 in sides or sides != sorted(set(sides)) or not torch.equal(levels_L, Pyramid(tuple(sides)).levels()):
        raise UserError(f"{source}: {LEVELS} is no pyramid of square token maps")
    return sides


def _read_mask(mask_11LL: Tensor, pyramid: Pyramid, source: str) -> Visibility | None:
    """The variant that a mask stands for; None if it could be either (a pyramid of one scale)."""
    if tuple(mask_11LL.shape) != (1, 1, pyramid.length, pyramid.length):
        raise UserError(f"{source}: {MASK} is {list(mask_11LL.shape)}, {LEVELS} has {pyramid.length} tokens")
    mask_LL = mask_11LL[0, 0]
    open_LL = mask_LL == 0
    if not bool((open_LL | (mask_LL == -torch.inf)).all()):
        raise UserError(f"{source}: {MASK} holds other values than 0 and -inf")
    variants: tuple[Visibility, ...] = ("causal", "non_causal")
    fitting = [variant for variant in variants if torch.equal(open_LL, pyramid.dense_mask(variant))]
    if not fitting:
        raise UserError(f"{source}: {MASK} is neither causal nor non-causal for scales {list(pyramid.sides)}")
    return fitting[0] if len(fitting) == 1 else None


def generator_to_published(model: ScaleTransformer) -> dict[str, Tensor]:
    """The model's weights with the two buffers of the published files, float32 and int64, on the CPU."""
    pyramid = model.pyramid
    visible_LL = pyramid.dense_mask(model.config.visibility)
    mask_LL = torch.zeros(visible_LL.shape).masked_fill_(~visible_LL, -torch.inf)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    return {**state, LEVELS: pyramid.levels()[None], MASK: mask_LL[None, None]}


# ---- the tokenizer's keys ---------------------------------------------------------------------------------------


def tokenizer_fields(state: Mapping[str, Tensor], source: str = "these weights") -> dict[str, Any]:
    """Fields of RQVAEConfig that the weights themselves show: all but scales, phi_ratio and commitment."""
    needed = ["quantize.embedding.weight", "encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"]
    _check_tables(state, needed, "RQ-VAE", source)
    codebook_size, code_width = state["quantize.embedding.weight"].shape[:2]
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, "encoder.down", "block.0.conv1.weight")
    return {
        "codebook_size": codebook_size,
        "code_width": code_width,
        "channels": channels,
        "multipliers": [
            state[f"encoder.down.{i}.block.0.conv1.weight"].shape[:1].numel() // channels
            for i in range(levels)
        ],
        "residual_blocks": _count(state, "encoder.down.0.block", "conv1.weight"),
        "phi_count": _count(state, "quantize.quant_resi.qresi_ls", "weight"),
    }


def tokenizer_from_published(state: Mapping[str, Tensor], scales: Sequence[int]) -> dict[str, Tensor]:
    """Weights for a pyramid: they do not depend on it, but for the statistics of how often codes were chosen.

    Those [N, V] are kept when they count that many scales, and start from zero otherwise.
    """
    hits = state.get(HITS)
    if hits is None or len(hits) != len(scales):
        hits = torch.zeros(len(scales), state["quantize.embedding.weight"].shape[0])
    return {**state, HITS: hits}
