"""The scale transformer: token pyramid and caption to logits, all scales at once or one scale at a time.

Module names are those of the published weights.

Shape suffixes: B batch, L tokens of all scales, M = L − p₀² tokens after the first scale, P tokens of one scale,
T caption tokens, C code width, D width, V vocabulary, K head width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switti.models.attention import KeyValueCache, Rotation
from switti.models.block import Block, BlockCondition
from switti.models.compiled_scales import CompiledScales
from switti.models.config import GeneratorConfig
from switti.models.crop_embedding import FourierFeatures
from switti.models.kernels import Backend, attends_packed
from switti.models.norm import unit_layer_norm
from switti.models.packed_attention import Packing
from switti.models.pruning import TokenPruning
from switti.models.rope import pyramid_angles, rotary_tables
from switti.scales import Pyramid

# What is computed of the head and its input [B, L, D]: logits, or a loss that never holds all of them.
ReadOut = Callable[[nn.Linear, Tensor], Any]


def logits_of(head: nn.Linear, x_BLD: Tensor) -> Tensor:
    return head(x_BLD)


class AdaLNBeforeHead(nn.Module):
    """LayerNorm without gain, modulated by the pooled caption (without the crop condition)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.ada_lin(condition_BD)[:, None].chunk(2, dim=-1)
        return scale, shift

    def forward(self, x_BLD: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = modulation
        return torch.addcmul(shift, unit_layer_norm(x_BLD), scale + 1)


@dataclass
class Condition:
    """Everything that sampling reuses at every scale, computed once per caption.

    first_BPD: tokens of scale 0 without the level embedding; mask_B11T: True where the caption has a token.
    """

    first_BPD: Tensor
    blocks: list[BlockCondition]
    head: tuple[Tensor, Tensor]
    mask_B11T: Tensor | None

    def first_rows(self, count: int) -> "Condition":
        mask = None if self.mask_B11T is None else self.mask_B11T[:count]
        return Condition(
            self.first_BPD[:count],
            [block.first_rows(count) for block in self.blocks],
            (self.head[0][:count], self.head[1][:count]),
            mask,
        )


class ScaleTransformer(nn.Module):
    """Predicts every token of a scale at once from the caption and the coarser scales (Section 3).

    config.visibility is the variant: "causal" lets a token see its own and all coarser scales, "non_causal" its own
    scale only. Both variants have the same parameters. backend: of attention and norms, see `switti.models.kernels`.
    """

    cosine_LK: Tensor
    sine_LK: Tensor
    level_L: Tensor

    def __init__(self, config: GeneratorConfig, backend: Backend = "auto") -> None:
        super().__init__()
        config.validate("model")
        self.config = config
        self.backend: Backend = backend
        self.pyramid = Pyramid(tuple(config.scales))
        self.checkpointing = False
        first, width = self.pyramid.sizes[0], config.width
        self.pos_start = nn.Parameter(torch.zeros(1, first, width))
        if not config.rope:
            self.pos_1LC = nn.Parameter(torch.zeros(1, self.pyramid.length, width))
        self.word_embed = nn.Linear(config.code_width, width)
        self.text_pooler = nn.Linear(config.pooled_width, width)
        self.lvl_embed = nn.Embedding(self.pyramid.count, width)
        if config.crop_condition:
            self.crop_embed = FourierFeatures(width // 8)
            self.crop_proj = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(width)
        self.head = nn.Linear(width, config.codebook_size)
        self.build_tables(self.pos_start.device)
        self.reset_parameters()

    def build_tables(self, device: torch.device) -> None:
        """Level numbers and rotary tables: recomputed, never stored."""
        config = self.config
        self.register_buffer("level_L", self.pyramid.levels(device), persistent=False)
        if config.rope:
            head_width = config.width // config.heads
            angles = pyramid_angles(self.pyramid, head_width, config.rope_theta, config.rope_size)
            cosine, sine = rotary_tables(angles)
            self.register_buffer("cosine_LK", cosine.to(device), persistent=False)
            self.register_buffer("sine_LK", sine.to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScaleTransformer":
        """Moves or casts the model, and rebuilds the tables that a cast or the meta device would corrupt."""
        was_meta = self.level_L.is_meta
        super()._apply(fn, recurse)
        rounded = self.config.rope and self.cosine_LK.dtype in (torch.bfloat16, torch.float16)
        if rounded or (was_meta and not self.level_L.is_meta):
            self.build_tables(self.level_L.device)
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialization of the VAR family: N(0, 1/3D) matrices, small gates and head, output maps by 1/√(2·depth)."""
        std = math.sqrt(1.0 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.lvl_embed.weight, std=std)
        nn.init.trunc_normal_(self.pos_start, std=std)
        if not self.config.rope:
            nn.init.trunc_normal_(self.pos_1LC, std=std)
        for block in self.typed_blocks:
            block.scale_initial_weights(self.config.depth)
        cast(nn.Linear, self.head_nm.ada_lin[1]).weight.mul_(0.5)
        self.head.weight *= 0.02

    @property
    def typed_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    # ---- conditioning -------------------------------------------------------------------------------------------

    def embed_caption(self, pooled_BP: Tensor, crop_B4: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Pooled caption and crop condition as vectors of the model's width, each [B, D].

        crop_B4: (height, width, top, left), see `crop_condition`; None: a square of config.crop_base px, not cropped.
        """
        condition = self.text_pooler(pooled_BP.to(self.text_pooler.weight.dtype))
        if not self.config.crop_condition:
            return condition, None
        if crop_B4 is None:
            base = self.config.crop_base
            crop_B4 = torch.tensor([[base, base, 0, 0]], device=condition.device).expand(len(condition), -1)
        return condition, self.crop_proj(self.crop_embed(crop_B4).to(self.crop_proj.weight.dtype))

    def prepare(
        self, text_BTC: Tensor, mask_BT: Tensor | None, pooled_BP: Tensor, crop_B4: Tensor | None = None
    ) -> Condition:
        """What sampling needs of the caption at every scale. crop_B4 defaults to an uncropped square."""
        condition, crop = self.embed_caption(pooled_BP, crop_B4)
        text = text_BTC.to(condition.dtype)
        return Condition(
            condition[:, None] + self.pos_start,
            [block.prepare(condition, crop, text) for block in self.typed_blocks],
            self.head_nm.modulation(condition),
            None if mask_BT is None else mask_BT[:, None, None, :],
        )

    def classify(
        self, x_BLD: Tensor, modulation: tuple[Tensor, Tensor], read_out: ReadOut = logits_of
    ) -> Any:
        """Logits, float32 if the head is (Section 3.2: the bfloat16 head is what makes training diverge).

        read_out: computes something else of the head, in the same precision.
        """
        x = self.head_nm(x_BLD, modulation)
        if self.config.head_precision == "bfloat16":
            return read_out(self.head, x)
        with torch.autocast(x.device.type, enabled=False):
            return read_out(self.head, x.to(self.head.weight.dtype))

    # ---- all scales at once: training ---------------------------------------------------------------------------

    def embed_tokens(self, x_BMC: Tensor, condition_BD: Tensor) -> Tensor:
        """Input rows of all scales [B, L, D]: scale 0 from the caption, the others from the coarser scales."""
        first = condition_BD[:, None] + self.pos_start
        rest = self.word_embed(x_BMC.to(self.word_embed.weight.dtype))
        x = torch.cat([first, rest], dim=1) + self.lvl_embed(self.level_L)
        return x if self.config.rope else x + self.pos_1LC

    def forward(
        self,
        x_BMC: Tensor,
        text_BTC: Tensor,
        mask_BT: Tensor | None,
        pooled_BP: Tensor,
        crop_B4: Tensor | None = None,
        read_out: ReadOut = logits_of,
    ) -> Any:
        """Teacher forcing: logits [B, L, V] of every token of every scale, or what `read_out` returns instead.

        x_BMC: next-scale inputs, see `RQVAE.teacher_forcing`. mask_BT: True where the caption has a token.
        """
        condition, crop = self.embed_caption(pooled_BP, crop_B4)
        x = self.embed_tokens(x_BMC, condition)
        text = text_BTC.to(condition.dtype)
        mask = None if mask_BT is None else mask_BT[:, None, None, :]
        rotation = Rotation(self.cosine_LK, self.sine_LK) if self.config.rope else None
        packing = self._packing(len(x), x.device)
        for block in self.blocks:
            arguments = (x, condition, crop, text, mask, rotation, self.pyramid.spans, packing)
            if self.checkpointing and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.classify(x, self.head_nm.modulation(condition), read_out)

    def _packing(self, batch: int, device: torch.device) -> Packing | None:
        """Of the scales of all images, if they attend in one call."""
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.head.weight.dtype
        config = self.config
        head_width = config.width // config.heads
        if not attends_packed(self.backend, config.visibility, device, dtype, head_width):
            return None
        return Packing.of(self.pyramid.spans, config.visibility, batch, device)

    # ---- one scale at a time: sampling --------------------------------------------------------------------------

    def build_cache(self) -> list[KeyValueCache] | None:
        """Key/value caches, one per block, for a causal model; None for a non-causal one, which needs none."""
        if self.config.visibility == "non_causal":
            return None
        return [KeyValueCache(self.pyramid.length) for _ in self.blocks]

    def compile_scales(self) -> None:
        """Compile `forward_scale` for each scale; another call changes nothing."""
        if not isinstance(self.forward_scale, CompiledScales):
            self.forward_scale = CompiledScales(self.forward_scale)  # type: ignore[method-assign]

    def forward_scale(
        self,
        scale: int,
        x_BPC: Tensor | None,
        condition: Condition,
        cache: list[KeyValueCache] | None,
        pruning: TokenPruning | None = None,
    ) -> Tensor:
        """Logits [B, P, V] of one scale. x_BPC: its input rows, None at scale 0, which starts from the caption."""
        start, stop = self.pyramid.spans[scale]
        x = condition.first_BPD if x_BPC is None else self.word_embed(x_BPC.to(self.word_embed.weight.dtype))
        x = x + self.lvl_embed.weight[scale]
        if not self.config.rope:
            x = x + self.pos_1LC[:, start:stop]
        rotation = Rotation(self.cosine_LK, self.sine_LK).rows(start, stop) if self.config.rope else None
        spans = ((0, stop - start),)
        pruned = pruning is not None and pruning.begin_scale(scale, len(x))
        for i, block in enumerate(self.typed_blocks):
            given, own = (condition.blocks[i], condition.mask_B11T, rotation), cache[i] if cache else None
            if pruning is not None and pruned and i >= pruning.first_block:
                x = pruning.advance(i, block, x, *given, own)
            else:
                x = block.advance(x, *given, spans, own)
        return self.classify(x, condition.head)
