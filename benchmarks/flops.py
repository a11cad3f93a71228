"""FLOPs of the scale transformer's matrix products, in closed form from its shapes.

Symbols: B batch, L tokens, T caption tokens, D width, C caption width, P pooled width, V vocabulary, N depth.
"""

from collections.abc import Mapping, Sequence

from switti.models.config import GeneratorConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.scales import Pyramid


def attention_pairs(pyramid: Pyramid, visibility: str) -> int:
    """(query, key) pairs that are computed: within scales, or to all tokens up to and including their scale."""
    if visibility == "non_causal":
        return sum(size * size for size in pyramid.sizes)
    return sum(size * stop for size, (_, stop) in zip(pyramid.sizes, pyramid.spans, strict=True))


def forward_flops(config: GeneratorConfig, batch: int, text_tokens: int) -> int:
    """Of one forward pass over all scales; a multiplication with an addition counts as two."""
    pyramid, width = Pyramid(tuple(config.scales)), config.width
    length = pyramid.length
    attention = 2 * width * (attention_pairs(pyramid, config.visibility) + length * text_tokens)
    caption = _caption(config, text_tokens)
    outside = length * width * config.code_width + 2 * width * width
    outside += width * (config.pooled_width + width * config.crop_condition)
    blocks = config.depth * (length * _per_token(config) + attention + caption)
    return 2 * batch * (blocks + outside) + head_flops(config, batch)


def _caption(config: GeneratorConfig, text_tokens: int) -> int:
    """Products of one block and caption: keys, values and modulation."""
    return text_tokens * config.text_width * 2 * config.width + 6 * config.width * config.width


def _per_token(config: GeneratorConfig) -> int:
    """Products of one block and token but for attention: qkv + proj, cross q + proj, feed-forward."""
    width = config.width
    feed_forward = 3 * width * (width * 8 // 3) if config.ffn == "swiglu" else 8 * width * width
    return 4 * width * width + 2 * width * width + feed_forward


def head_flops(config: GeneratorConfig, batch: int) -> int:
    """The head's part of `forward_flops`, which runs in float32."""
    return 2 * batch * Pyramid(tuple(config.scales)).length * config.width * config.codebook_size


def scale_flops(config: GeneratorConfig, scale: int, rows: int, text_tokens: int) -> int:
    """Of sampling one scale with `rows` rows (twice the images under guidance), without the caption's part."""
    pyramid, width = Pyramid(tuple(config.scales)), config.width
    size, stop = pyramid.sizes[scale], pyramid.spans[scale][1]
    seen = stop if config.visibility == "causal" else size
    attention = 2 * width * size * (seen + text_tokens)
    outside = size * width * (config.codebook_size + (config.code_width if scale else 0))
    return 2 * rows * (config.depth * (size * _per_token(config) + attention) + outside)


def sampling_flops(
    config: GeneratorConfig, schedule: GuidanceSchedule, batch: int, text_tokens: int
) -> list[int]:
    """Of sampling each scale; the first one's with the captions' part, which all scales share."""
    causal = config.visibility == "causal"
    rows = [
        batch * (1 + schedule.needs_unconditional(k, causal))
        for k in range(Pyramid(tuple(config.scales)).count)
    ]
    flops = [scale_flops(config, k, count, text_tokens) for k, count in enumerate(rows)]
    flops[0] += 2 * max(rows) * config.depth * _caption(config, text_tokens)
    return flops


def training_flops(config: GeneratorConfig, batch: int, text_tokens: int) -> int:
    """Of a training step: the backward pass has twice the products of the forward pass."""
    return 3 * forward_flops(config, batch, text_tokens)


def pruned_sampling_flops(
    config: GeneratorConfig,
    rows: Sequence[int],
    text_tokens: int,
    counts: Mapping[int, int],
    first_block: int,
) -> int:
    """Of sampling all scales with `rows` rows each, without the caption's part.

    counts: pruned scale → number of its tokens that blocks from `first_block` on compute.
    """
    pyramid, width = Pyramid(tuple(config.scales)), config.width
    causal, total, kept = config.visibility == "causal", 0, 0
    full_blocks = first_block if counts else config.depth

    def block(tokens: int, seen: int) -> int:
        return tokens * _per_token(config) + 2 * width * tokens * (seen + text_tokens)

    for scale, (size, (_, stop)) in enumerate(zip(pyramid.sizes, pyramid.spans, strict=True)):
        computed = counts.get(scale, size)
        kept += computed
        blocks = full_blocks * block(size, stop if causal else size)
        blocks += (config.depth - full_blocks) * block(computed, kept if causal else computed)
        outside = size * width * (config.codebook_size + (config.code_width if scale else 0))
        total += 2 * rows[scale] * (blocks + outside)
    return total
