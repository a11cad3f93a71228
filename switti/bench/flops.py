"""Floating-point operations of matrix products in the scale transformer, from its shapes.

Symbols: B batch, L tokens, T caption tokens, D width, C caption width, P pooled width, V vocabulary, N depth.
"""

from switti.models.config import GeneratorConfig
from switti.scales import Pyramid


def attention_pairs(pyramid: Pyramid, visibility: str) -> int:
    """(query, key) pairs that are computed: within scales, or to all tokens up to the own scale."""
    if visibility == "non_causal":
        return sum(size * size for size in pyramid.sizes)
    return sum(size * stop for size, (_, stop) in zip(pyramid.sizes, pyramid.spans, strict=True))


def forward_flops(config: GeneratorConfig, batch: int, text_tokens: int) -> int:
    """Of one forward pass over all scales; a multiplication with an addition counts as two."""
    pyramid, width = Pyramid(tuple(config.scales)), config.width
    length = pyramid.length
    feed_forward = 3 * width * (width * 8 // 3) if config.ffn == "swiglu" else 8 * width * width
    per_token = 4 * width * width + 2 * width * width + feed_forward  # qkv + proj, cross q + proj, FFN
    attention = 2 * width * (attention_pairs(pyramid, config.visibility) + length * text_tokens)
    caption = text_tokens * config.text_width * 2 * width + 6 * width * width
    outside = length * width * (config.codebook_size + config.code_width) + 2 * width * width
    outside += width * (config.pooled_width + width * config.crop_condition)
    return 2 * batch * (config.depth * (length * per_token + attention + caption) + outside)


def training_flops(config: GeneratorConfig, batch: int, text_tokens: int) -> int:
    """Of a training step: the backward pass has twice the products of the forward pass."""
    return 3 * forward_flops(config, batch, text_tokens)
