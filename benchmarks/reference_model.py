"""Reference scale transformer with a dense attention mask: the straightforward formulation, for tests and benchmarks.

It does what the published implementation does, with PyTorch's own kernels. Training adds an L×L mask to the scores.
Sampling computes the caption's keys and values once, modulation at every scale, and both halves of guidance wherever it
is on; a causal model's cache grows by concatenation; tokens are drawn by top-k, then top-p after sorting the whole
vocabulary, then from the filtered probabilities, all in the model's precision. Rotary embedding is complex-valued.

Shape suffixes: B batch, L tokens, P tokens of one scale, H heads, K head width, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from switti.models.attention import KeyValueCache, Rotation, SelfAttention
from switti.models.config import GeneratorConfig
from switti.models.packed_attention import Packing
from switti.models.transformer import Condition, ReadOut, ScaleTransformer, logits_of
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
        self,
        q_BHLK: Tensor,
        k_BHMK: Tensor,
        v_BHMK: Tensor,
        spans: tuple[tuple[int, int], ...],
        cached: bool,
        packing: Packing | None = None,
    ) -> Tensor:
        mask = self.mask_LL if len(spans) > 1 else None
        return F.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, attn_mask=mask)


class DenseTransformer(ScaleTransformer):
    """Same parameters and outputs as ScaleTransformer, computed with a dense mask and PyTorch's kernels."""

    mask_LL: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config, backend="fused")
        for block in self.typed_blocks:
            block.attn = DenseSelfAttention(
                config.width, config.heads, config.visibility, config.query_key_norm, "fused"
            )

    def build_tables(self, device: torch.device) -> None:
        """The mask, too."""
        super().build_tables(device)
        allowed = dense_mask(self.pyramid, self.config.visibility).to(device)
        mask = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)
        self.register_buffer("mask_LL", mask, persistent=False)

    def forward(
        self,
        x_BMC: Tensor,
        text_BTC: Tensor,
        mask_BT: Tensor | None,
        pooled_BP: Tensor,
        crop_B4: Tensor | None = None,
        read_out: ReadOut = logits_of,
    ) -> Any:
        autocast = torch.is_autocast_enabled(x_BMC.device.type)
        for block in self.typed_blocks:
            block.attn.mask_LL = self.mask_LL.to(torch.bfloat16 if autocast else self.head.weight.dtype)
        return super().forward(x_BMC, text_BTC, mask_BT, pooled_BP, crop_B4, read_out)


@torch.no_grad()
def sample_latent_plainly(
    model: DenseTransformer,
    tokenizer: RQVAE,
    text: TextEmbedding,
    null: TextEmbedding,
    config: SamplingConfig,
    noise: Noise | torch.Generator,
    on_scale_end: Callable[[], None] | None = None,
) -> Tensor:
    """Latents as `sampler.sample_latent` gives them, without its savings. Gumbel smoothing is left out.

    noise: of one generator for the batch, as published, or given so that both formulations draw alike.
    """
    batch, schedule, quantizer = len(text), GuidanceSchedule.of(config, model.pyramid), tokenizer.quantize
    both = TextEmbedding.concatenate([text, null.expand(batch)])
    condition_BD, crop_BD = model.embed_caption(both.pooled_BP, None)
    condition = model.prepare(both.tokens_BTC, both.mask_BT, both.pooled_BP)
    causal = model.config.visibility == "causal"
    caches = [GrowingCache(model.pyramid.length) for _ in model.typed_blocks] if causal else None
    latent, rows = quantizer.empty_latent(batch), None
    for scale in range(model.pyramid.count):
        guided = schedule.start <= scale < schedule.stop
        count = 2 * batch if guided else batch
        inputs = rows if rows is None or not guided else torch.cat([rows, rows])
        crop = None if crop_BD is None else crop_BD[:count]
        given = modulated_again(model, condition.first_rows(count), condition_BD[:count], crop)
        logits = model.forward_scale(scale, inputs, given, caches)  # type: ignore[arg-type]
        if guided:
            strength = schedule.strengths[scale]
            logits = (1 + strength) * logits[:batch] - strength * logits[batch:]
        elif scale >= schedule.stop and schedule.late_temperature is not None:
            logits = logits / schedule.late_temperature
        drawn = (
            noise if isinstance(noise, torch.Generator) else noise(scale, (logits.shape[1], logits.shape[2]))
        )
        drawn = drawn.all() if isinstance(drawn, ScaleNoise) else drawn
        tokens = draw_from_sorted(logits, config.top_k, config.top_p, drawn)
        latent = quantizer.accumulate(scale, latent, quantizer.embed(tokens))
        if scale + 1 < model.pyramid.count:
            rows = quantizer.next_input(scale, latent)
        if on_scale_end is not None:
            on_scale_end()
    return latent


def modulated_again(
    model: ScaleTransformer, known: Condition, condition_BD: Tensor, crop_BD: Tensor | None
) -> Condition:
    """`known` with the modulation (AdaLN) of all blocks and of the head computed once more."""
    blocks = [
        replace(given, modulation=block.modulate(condition_BD, crop_BD))
        for block, given in zip(model.typed_blocks, known.blocks, strict=True)
    ]
    return replace(known, blocks=blocks, head=model.head_nm.modulation(condition_BD))


def draw_from_sorted(
    logits_BPV: Tensor, top_k: int, top_p: float, noise: Tensor | torch.Generator | None
) -> Tensor:
    """Top-k, then top-p over the sorted vocabulary, then a draw: by a generator, or argmax of probability / noise."""
    logits = logits_BPV.clone()
    if top_k:
        threshold = logits.topk(min(top_k, logits.shape[-1]), sorted=False).values.amin(dim=-1, keepdim=True)
        logits.masked_fill_(logits < threshold, -torch.inf)
    if top_p:
        values, order = logits.sort(dim=-1)
        dropped = values.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits.masked_fill_(dropped.scatter(-1, order, dropped), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if isinstance(noise, torch.Generator):
        flat = probabilities.flatten(0, -2)
        return torch.multinomial(flat, 1, replacement=True, generator=noise).view(logits.shape[:-1])
    return (probabilities if noise is None else probabilities / noise).argmax(dim=-1)


Model = TypeVar("Model", bound=ScaleTransformer)


def same_weights(model: ScaleTransformer, kind: type[Model]) -> Model:
    """A model of another class with these very tensors as its weights, in the same mode."""
    with torch.device("meta"):
        other = kind(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.build_tables(model.level_L.device)
    if model.config.rope:
        # In the precision to which they were cast.
        other.cosine_LK, other.sine_LK = model.cosine_LK, model.sine_LK
    return other.train(model.training)
