"""One transformer block: self-attention, cross-attention, feed-forward (Section 3.2, Figure 4).

Shape suffixes: B batch, L tokens, T caption tokens, C caption width, D width, H heads, K head width.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switti.models import cpu_tiles
from switti.models.attention import CrossAttention, KeyValueCache, Rotation, SelfAttention
from switti.models.config import GeneratorConfig
from switti.models.kernels import Backend, infers_in_tiles
from switti.models.norm import LayerNorm, NoNorm, RMSNorm
from switti.models.packed_attention import Packing


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)) without biases, hidden width ⌊8D/3⌋."""

    def __init__(self, width: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.backend: Backend = backend
        hidden = width * 8 // 3
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.gate_proj = nn.Linear(width, hidden, bias=False)

    @property
    def output(self) -> nn.Linear:
        return self.down_proj

    def forward(self, x: Tensor) -> Tensor:
        if infers_in_tiles(self.backend, x):
            return cpu_tiles.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUFeedForward(nn.Module):
    """Two linear maps around the tanh form of GELU, hidden width 4D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    @property
    def output(self) -> nn.Linear:
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@dataclass
class BlockCondition:
    """The caption's inputs to a block; the same for all scales, so sampling computes them once.

    modulation: gate 1, gate 2, scale 1, scale 2, shift 1, shift 2, each [B, 1, D]; keys, values [B, H, T, K].
    """

    modulation: tuple[Tensor, ...]
    keys: Tensor
    values: Tensor

    def first_rows(self, count: int) -> "BlockCondition":
        return BlockCondition(
            tuple(m[:count] for m in self.modulation), self.keys[:count], self.values[:count]
        )


class Block(nn.Module):
    """Residual block. `norms="sandwich"` adds an RMSNorm after each sub-layer, before the residual sum."""

    def __init__(self, config: GeneratorConfig, backend: Backend = "auto") -> None:
        super().__init__()
        width, sandwich = config.width, config.norms == "sandwich"

        def before(size: int) -> nn.Module:
            return RMSNorm(size, backend=backend) if sandwich else LayerNorm(size, eps=1e-6)

        def after() -> nn.Module:
            return RMSNorm(width, backend=backend) if sandwich else NoNorm()

        if config.crop_condition:
            self.crop_cond_scales = nn.Parameter(torch.zeros(1, width))
        else:
            self.register_parameter("crop_cond_scales", None)
        self.attn = SelfAttention(width, config.heads, config.visibility, config.query_key_norm, backend)
        self.cross_attn = CrossAttention(
            width, config.heads, config.text_width, config.query_key_norm, backend
        )
        self.ffn = SwiGLU(width, backend) if config.ffn == "swiglu" else GELUFeedForward(width)
        self.self_attention_norm1, self.self_attention_norm2 = before(width), after()
        self.cross_attention_norm1, self.cross_attention_norm2 = before(width), after()
        self.ffn_norm1, self.ffn_norm2 = before(width), after()
        self.attention_y_norm = before(config.text_width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    @torch.no_grad()
    def scale_initial_weights(self, depth: int) -> None:
        """Near-zero gates, halved modulation, output maps divided by √(2·depth)."""
        modulation = cast(nn.Linear, self.ada_lin[1]).weight
        gates = modulation.shape[0] // 3
        modulation[:gates] *= 1e-5
        modulation[gates:] *= 0.5
        for output in (self.attn.proj, self.cross_attn.proj, self.ffn.output):
            output.weight /= math.sqrt(2 * depth)

    def prepare(self, condition_BD: Tensor, crop_BD: Tensor | None, text_BTC: Tensor) -> BlockCondition:
        """Modulation and the caption's keys and values."""
        modulation = self.modulate(condition_BD, crop_BD)
        keys, values = self.cross_attn.project_text(self.attention_y_norm(text_BTC))
        return BlockCondition(modulation, keys, values)

    def modulate(self, condition_BD: Tensor, crop_BD: Tensor | None) -> tuple[Tensor, ...]:
        """The modulation of AdaLN, see `BlockCondition`."""
        if crop_BD is not None:
            condition_BD = condition_BD + self.crop_cond_scales * crop_BD
        return self.ada_lin(condition_BD)[:, None].chunk(6, dim=-1)

    def advance(
        self,
        x_BLD: Tensor,
        condition: BlockCondition,
        mask_B11T: Tensor | None,
        rotation: Rotation | None,
        spans: tuple[tuple[int, int], ...],
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """The block itself, given the result of `prepare`."""
        x = self.add_self_attention(x_BLD, condition, rotation, spans, cache, packing)
        x = self.add_cross_attention(x, condition, mask_B11T)
        return self.add_feed_forward(x, condition)

    def add_self_attention(
        self,
        x_BLD: Tensor,
        condition: BlockCondition,
        rotation: Rotation | None,
        spans: tuple[tuple[int, int], ...],
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        gate, _, scale, _, shift, _ = condition.modulation
        h = self.attn(self.self_attention_norm1(x_BLD, scale + 1, shift), rotation, spans, cache, packing)
        return self.self_attention_norm2(h, gate, x_BLD)

    def add_cross_attention(
        self, x_BLD: Tensor, condition: BlockCondition, mask_B11T: Tensor | None
    ) -> Tensor:
        h = self.cross_attn(self.cross_attention_norm1(x_BLD), condition.keys, condition.values, mask_B11T)
        return self.cross_attention_norm2(h, None, x_BLD)

    def add_feed_forward(self, x_BLD: Tensor, condition: BlockCondition) -> Tensor:
        _, gate, _, scale, _, shift = condition.modulation
        h = self.ffn(self.ffn_norm1(x_BLD, scale + 1, shift))
        return self.ffn_norm2(h, gate, x_BLD)

    def forward(
        self,
        x_BLD: Tensor,
        condition_BD: Tensor,
        crop_BD: Tensor | None,
        text_BTC: Tensor,
        mask_B11T: Tensor | None,
        rotation: Rotation | None,
        spans: tuple[tuple[int, int], ...],
        packing: Packing | None = None,
    ) -> Tensor:
        """Training: everything in one call, so that sharding and checkpointing see one unit."""
        condition = self.prepare(condition_BD, crop_BD, text_BTC)
        return self.advance(x_BLD, condition, mask_B11T, rotation, spans, None, packing)
