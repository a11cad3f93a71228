"""Reference scale transformer with a dense attention mask: the straightforward formulation, for tests and benchmarks.

Training builds the L×L mask; sampling concatenates its cache, and computes modulation and the caption's keys and
values again at every scale; tokens are drawn after sorting the whole vocabulary. Rotary embedding is complex-valued.

Shape suffixes: B batch, L tokens, P tokens of one scale, H heads, K head width, D width, V vocabulary.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from switti.models.attention import KeyValueCache, Rotation, SelfAttention
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.sampling.noise import ScaleNoise
from switti.sampling.sampler import Noise
from switti.scales import Pyramid
from switti.text.base import TextEmbedding
from switti.tokenizer.rqvae import RQVAE


def dense_mask(pyramid: Pyramid, visibility: str) -> Tensor:
    """Boolean [L, L], True where query (row) sees key (column)."""
    levels_L = pyramid.levels()
    if visibility == "causal":
        return levels_L[:, None] >= levels_L[None, :]
    return levels_L[:, None] == levels_L[None, :]


class GrowingCache(KeyValueCache):
    """Keys and values by concatenation."""

    def append(self, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        if self.buffers is not None:
            batch, (keys, values) = len(k_BHLK), self.buffers
            k_BHLK = torch.cat([keys[:batch], k_BHLK], dim=2)
            v_BHLK = torch.cat([values[:batch], v_BHLK], dim=2)
        self.buffers = k_BHLK, v_BHLK
        return self.buffers


class DenseSelfAttention(SelfAttention):
    """Self-attention with a mask over all tokens."""

    mask_LL: Tensor | None = None

    def rotate(self, x_BLHK: Tensor, rotation: Rotation) -> Tensor:
        """Rotary embedding as a product of complex numbers."""
        table = torch.complex(rotation.cosine[:, ::2].contiguous(), rotation.sine[:, 1::2].contiguous())
        pairs = torch.view_as_complex(x_BLHK.to(rotation.cosine.dtype).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x_BLHK.dtype)

    def attend(
        self, q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, spans: tuple[tuple[int, int], ...], cached: bool
    ) -> Tensor:
        mask = self.mask_LL if len(spans) > 1 else None
        return F.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, attn_mask=mask)


class DenseTransformer(ScaleTransformer):
    """Same parameters and outputs as ScaleTransformer, computed with a dense mask."""

    mask_LL: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        allowed = dense_mask(self.pyramid, config.visibility)
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        self.register_buffer("mask_LL", mask, persistent=False)
        for block in self.typed_blocks:
            block.attn = DenseSelfAttention(
                config.width, config.heads, config.visibility, config.query_key_norm
            )

    def forward(
        self,
        x_BMC: Tensor,
        text_BTC: Tensor,
        mask_BT: Tensor | None,
        pooled_BP: Tensor,
        crop_B4: Tensor | None = None,
    ) -> Tensor:
        autocast = torch.is_autocast_enabled(x_BMC.device.type)
        for block in self.typed_blocks:
            block.attn.mask_LL = self.mask_LL.to(torch.bfloat16 if autocast else self.head.weight.dtype)
        return super().forward(x_BMC, text_BTC, mask_BT, pooled_BP, crop_B4)


@torch.no_grad()
def sample_latent_plainly(
    model: DenseTransformer,
    tokenizer: RQVAE,
    text: TextEmbedding,
    null: TextEmbedding,
    config: SamplingConfig,
    noise: Noise,
) -> Tensor:
    """Latents as `sampler.sample_latent` gives them, without its savings. Gumbel smoothing is left out."""
    batch, schedule, quantizer = len(text), GuidanceSchedule.of(config, model.pyramid), tokenizer.quantize
    both = TextEmbedding.concatenate([text, null.expand(batch)])
    causal = model.config.visibility == "causal"
    caches = [GrowingCache(model.pyramid.length) for _ in model.typed_blocks] if causal else None
    latent, rows = quantizer.empty_latent(batch), None
    for scale in range(model.pyramid.count):
        given = text if scale >= schedule.stop else both
        inputs = rows if rows is None or given is text else torch.cat([rows, rows])
        condition = model.prepare(given.tokens_BTC, given.mask_BT, given.pooled_BP)
        logits = model.forward_scale(scale, inputs, condition, caches)  # type: ignore[arg-type]
        guided = schedule.combine(logits, batch, scale)
        drawn = noise(scale, (guided.shape[1], guided.shape[2]))
        drawn = drawn.all() if isinstance(drawn, ScaleNoise) else drawn
        tokens = draw_from_sorted(guided, config.top_k, config.top_p, drawn)
        latent = quantizer.accumulate(scale, latent, quantizer.embed(tokens))
        if scale + 1 < model.pyramid.count:
            rows = quantizer.next_input(scale, latent)
    return latent


def draw_from_sorted(logits_BPV: Tensor, top_k: int, top_p: float, noise_BPV: Tensor | None) -> Tensor:
    """Top-k, then top-p over the sorted vocabulary, then argmax of probability / noise."""
    logits = logits_BPV.clone()
    if top_k:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p:
        values, order = logits.sort(dim=-1)
        dropped = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    return (probabilities if noise_BPV is None else probabilities / noise_BPV).argmax(dim=-1)


Model = TypeVar("Model", bound=ScaleTransformer)


def same_weights(model: ScaleTransformer, kind: type[Model]) -> Model:
    """A model of another class with copies of these weights, on their device, in their type and mode."""
    weight = model.head.weight
    other = kind(model.config).to(weight.device, weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)
