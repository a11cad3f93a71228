"""The sampler: scale by scale from a caption to a latent (Section 3.5).

Shape suffixes: B images, P tokens of a scale, V vocabulary, C code width, T caption tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from switti.errors import UserError
from switti.models.pruning import TokenPruning
from switti.models.transformer import Condition, ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.filters import draw_tokens, gumbel_softmax, gumbel_temperature
from switti.sampling.guidance import GuidanceSchedule
from switti.sampling.noise import ScaleNoise
from switti.text.base import TextEmbedding
from switti.tokenizer.rqvae import RQVAE

LARGEST_LOGIT = 1e35
# noise(scale, (P, V)) → Exp(1) draws [B, P, V], or what makes them; None selects the most probable token.
Noise = Callable[[int, tuple[int, int]], Tensor | ScaleNoise | None]


@dataclass
class ScaleTrace:
    """Record of one scale, passed to `on_scale_end`.

    tokens_BP is None where the codebook was mixed softly (soft_BPV then holds the weights). noise_BPV: all draws, where
    they were given or needed.
    cache_bytes: size of the key/value caches of all blocks, 0 for a non-causal model.
    """

    scale: int
    logits: Tensor
    guided_BPV: Tensor
    tokens_BP: Tensor | None
    soft_BPV: Tensor | None
    noise_BPV: Tensor | None
    latent_BCHW: Tensor
    cache_bytes: int


@dataclass(frozen=True)
class PromptSwitch:
    """From `scale` on, images follow these captions (one each) instead of the first ones (Section 3.4)."""

    text: TextEmbedding
    scale: int


def _conditions(
    model: ScaleTransformer,
    text: TextEmbedding,
    null: TextEmbedding,
    crop_B4: Tensor | None,
    schedule: GuidanceSchedule,
) -> Condition:
    """Condition of the rows [conditional; unconditional], or of the conditional rows alone without guidance."""
    if schedule.last_guided < 0:
        return model.prepare(text.tokens_BTC, text.mask_BT, text.pooled_BP, crop_B4)
    batch = len(text.pooled_BP)
    both = TextEmbedding.concatenate([text, null.expand(batch)])
    crop = None if crop_B4 is None else torch.cat([crop_B4, crop_B4])
    return model.prepare(both.tokens_BTC, both.mask_BT, both.pooled_BP, crop)


def _choose(
    config: SamplingConfig,
    schedule: GuidanceSchedule,
    ratio: float,
    scale: int,
    logits: Tensor,
    guided: Tensor,
    noise: Tensor | ScaleNoise | None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(tokens, None, guided, noise) or (None, soft weights, guided·(1 + r), noise), depending on Gumbel smoothing."""
    soft = config.gumbel and config.gumbel_start <= scale < schedule.stop and noise is not None
    if soft:
        guided = guided * (1.0 + ratio)
    if guided.device.type == "cpu":
        _check_finite(guided, logits, config, scale)
    if soft and noise is not None:
        draws = noise.all() if isinstance(noise, ScaleNoise) else noise
        return None, gumbel_softmax(guided, draws, gumbel_temperature(ratio)), guided, draws
    tokens = draw_tokens(guided, config.top_k, config.top_p, noise, logits.dtype.itemsize < 4)
    return tokens, None, guided, noise if isinstance(noise, Tensor) else None


def _check_finite(guided: Tensor, logits: Tensor, config: SamplingConfig, scale: int) -> None:
    """UserError if no token can be drawn from `guided`, naming what has made it of the model's `logits`."""
    if bool(_is_finite(guided)):
        return
    if bool(logits.isfinite().all()):
        cause = f"sampling.guidance={config.guidance} and late_temperature={config.late_temperature} make them overflow"
    else:
        cause = f"the model's weights or its caption are not finite, or overflow in {str(logits.dtype)[6:]}"
    raise UserError(f"logits of scale {scale} are not finite: {cause}")


def _is_finite(guided: Tensor) -> Tensor:
    """Whether tokens can be drawn, without asking the device for the answer."""
    # The largest of a row is not a number if any of them is not one.
    return (guided.amax(dim=-1).abs() < LARGEST_LOGIT).all()


def check_latent(latent: Tensor) -> None:
    """UserError if a device has met logits that are not finite while it sampled. Waits for the device."""
    if latent.device.type != "cpu" and not bool(latent.isfinite().all()):
        raise UserError(
            "logits of a scale are not finite: the model's weights or its caption are not, or the guidance overflows"
        )


@torch.no_grad()
def sample_latent(
    model: ScaleTransformer,
    tokenizer: RQVAE,
    text: TextEmbedding,
    null: TextEmbedding,
    config: SamplingConfig,
    noise: Noise,
    crop_B4: Tensor | None = None,
    on_scale_end: Callable[[ScaleTrace], None] | None = None,
    switch: PromptSwitch | None = None,
    schedule: GuidanceSchedule | None = None,
) -> Tensor:
    """Latents [B, C, H, W] in float32 for `RQVAE.decode`.

    text: B captions; null: one caption (or B) for the unconditional rows, "" or a negative prompt. Guidance, filters
    and the running latent are kept in float32 whatever the model's precision. switch: other captions from some scale
    on; a causal model's keys and values of the coarser scales stay. schedule: guidance by scale, instead of that of
    `config`. Raises UserError where settings do not fit the model, and where logits are not finite on a CPU; a device
    is not asked in between, and the latent of such images is not finite either (`check_latent`).
    """
    pyramid, quantizer = model.pyramid, tokenizer.quantize
    config.check_model(pyramid.count, model.config.depth)
    schedule = schedule or GuidanceSchedule.of(config, pyramid)
    causal = model.config.visibility == "causal"
    batch = len(text.pooled_BP)
    condition = _conditions(model, text, null, crop_B4, schedule)
    conditional = condition.first_rows(batch)
    cache = model.build_cache()
    counts = config.pruning.counts(pyramid.sizes)
    pruning = TokenPruning(counts, config.pruning.from_block, batch) if counts else None
    latent, rows = quantizer.empty_latent(batch), None
    for scale in range(pyramid.count):
        if switch is not None and scale == switch.scale:
            condition = _conditions(model, switch.text, null, crop_B4, schedule)
            conditional = condition.first_rows(batch)
            if pruning is not None:
                pruning.forget()
        unconditional = schedule.needs_unconditional(scale, causal)
        inputs = rows if rows is None or not unconditional else torch.cat([rows, rows])
        given = condition if unconditional else conditional
        logits = model.forward_scale(scale, inputs, given, cache, pruning)
        guided = schedule.combine(logits, batch, scale)
        drawn = noise(scale, (guided.shape[1], guided.shape[2]))
        ratio = pyramid.ratio(scale)
        tokens, soft, guided, drawn = _choose(config, schedule, ratio, scale, logits, guided, drawn)
        codes = (
            quantizer.embed(tokens) if tokens is not None else cast(Tensor, soft) @ quantizer.embedding.weight
        )
        if guided.device.type != "cpu":
            codes = torch.where(_is_finite(guided), codes, torch.nan)
        latent = quantizer.accumulate(scale, latent, codes)
        if scale + 1 < pyramid.count:
            rows = quantizer.next_input(scale, latent)
        if on_scale_end is not None:
            cache_bytes = sum(block.nbytes for block in cache or ())
            on_scale_end(ScaleTrace(scale, logits, guided, tokens, soft, drawn, latent, cache_bytes))
        # The vocabulary times thousands of tokens, before the next scale is computed.
        del logits, guided, drawn, soft
    return latent
