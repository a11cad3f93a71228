"""Prompt-to-prompt control of attention maps: replace, refine, reweight, self-attention and local blending.

Row 0 of a batch is the source prompt, the others are its edits (arXiv 2406.14539, Section 4; arXiv 2208.01626).

Shape suffixes: R rows (prompts), E edited prompts, K heads, P pixels, T tokens, C channels, H W latent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from switti.diffusion.prompt_words import PromptTokens, refinement_map, replacement_map
from switti.errors import UserError

Place = Literal["down", "mid", "up"]
# Larger self-attention maps are left alone.
SELF_PIXELS = 1024
BLEND_PIXELS = 256


class CrossEdit(Protocol):
    """New cross-attention maps [E, K, P, T] of the edited rows, from the source's [K, P, T] and their own."""

    def __call__(self, source_KPT: Tensor, edited_EKPT: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Replace:
    """Equal word counts: each target token attends where the source's word at its place did."""

    map_EST: Tensor

    @classmethod
    def of(cls, prompts: Sequence[PromptTokens], *, compatible: bool = False) -> "Replace":
        return cls(torch.stack([replacement_map(prompts[0], t, compatible=compatible) for t in prompts[1:]]))

    def __call__(self, source_KPT: Tensor, edited_EKPT: Tensor) -> Tensor:
        return torch.einsum("kps,est->ekpt", source_KPT, self.map_EST.to(source_KPT))


@dataclass(frozen=True)
class Refine:
    """Words added: aligned tokens attend where the source's did, new ones as they would."""

    index_ET: Tensor
    aligned_ET: Tensor

    @classmethod
    def of(cls, prompts: Sequence[PromptTokens]) -> "Refine":
        index, aligned = zip(*(refinement_map(prompts[0], target) for target in prompts[1:]), strict=True)
        return cls(torch.stack(index), torch.stack(aligned))

    def __call__(self, source_KPT: Tensor, edited_EKPT: Tensor) -> Tensor:
        index_ET = self.index_ET.to(source_KPT.device)
        gathered_EKPT = source_KPT[:, :, index_ET.clamp_min(0)].permute(2, 0, 1, 3)
        aligned = self.aligned_ET.to(source_KPT)[:, None, None]
        return gathered_EKPT * aligned + edited_EKPT * (1.0 - aligned)


@dataclass(frozen=True)
class Reweight:
    """Another edit's maps with some words' attention scaled; rows then no longer sum to 1."""

    inner: CrossEdit
    factor_ET: Tensor

    def __call__(self, source_KPT: Tensor, edited_EKPT: Tensor) -> Tensor:
        return self.inner(source_KPT, edited_EKPT) * self.factor_ET.to(source_KPT)[:, None, None]


@dataclass(frozen=True)
class LocalBlend:
    """Edits keep to the words' region: elsewhere the source's latents are kept (Section 4).

    words_RT: 1 at the blended words' tokens. subtract_RT: of words whose region is kept out. start: blending begins
    after this share of the steps.
    """

    words_RT: Tensor
    subtract_RT: Tensor | None = None
    threshold: float = 0.3
    subtract_threshold: float = 0.3
    start: float = 0.0

    @classmethod
    def of(
        cls,
        prompts: Sequence[PromptTokens],
        words: Sequence[Sequence[str]],
        subtract: Sequence[Sequence[str]] | None = None,
        **settings: float,
    ) -> "LocalBlend":
        """words, subtract: by prompt, the source's first."""
        if len(words) != len(prompts) or (subtract is not None and len(subtract) != len(prompts)):
            raise UserError(f"blend words are given for {len(words)} prompts, there are {len(prompts)}")
        return cls(_marked(prompts, words), _marked(prompts, subtract) if subtract else None, **settings)

    def __call__(self, x_RCHW: Tensor, maps: Sequence[Tensor], step: int, steps: int) -> Tensor:
        """maps: cross-attention maps [R, K, P, T] of one size, by layer, summed over the steps so far."""
        if step + 1 <= int(self.start * steps):
            return x_RCHW
        maps_RKPT = torch.cat(list(maps), dim=1).float()
        mask = self._mask(maps_RKPT, self.words_RT, x_RCHW, pooled=True)
        if self.subtract_RT is not None:
            mask = mask & ~self._mask(maps_RKPT, self.subtract_RT, x_RCHW, pooled=False)
        return x_RCHW[:1] + mask.to(x_RCHW) * (x_RCHW - x_RCHW[:1])

    def _mask(self, maps_RKPT: Tensor, words_RT: Tensor, x_RCHW: Tensor, pooled: bool) -> Tensor:
        """[R, 1, H, W]: where the words' attention exceeds a share of its maximum, in a row or in the source's."""
        side = int(maps_RKPT.shape[2] ** 0.5)
        map_RP = (maps_RKPT * words_RT.to(maps_RKPT)[:, None, None]).sum(-1).mean(1)
        map_R1HW = map_RP.reshape(-1, 1, side, side)
        if pooled:
            map_R1HW = F.max_pool2d(map_R1HW, 3, stride=1, padding=1)
        map_R1HW = F.interpolate(map_R1HW, size=x_RCHW.shape[2:])
        share_R1HW = map_R1HW / map_R1HW.amax(dim=(2, 3), keepdim=True)
        mask_R1HW = share_R1HW > (self.threshold if pooled else self.subtract_threshold)
        return mask_R1HW[:1] | mask_R1HW


def _marked(prompts: Sequence[PromptTokens], words: Sequence[Sequence[str]]) -> Tensor:
    marked_RT = torch.zeros(len(prompts), prompts[0].context)
    for number, (prompt, own) in enumerate(zip(prompts, words, strict=True)):
        marked_RT[number, prompt.tokens_of(own)] = 1.0
    return marked_RT


@dataclass
class AttentionControl:
    """Control of one trajectory of n steps; made for it and advanced by `after_step`.

    cross: how cross-attention maps are edited; None: not. cross_mask_NET: see `time_mask`. self_steps: steps [from, to)
    in which the edits take the source's self-attention maps. store_pixels: size of the cross-attention maps that are
    summed over the steps, after editing; 0: none.
    """

    steps: int
    cross: CrossEdit | None
    cross_mask_NET: Tensor
    self_steps: tuple[int, int]
    blend: LocalBlend | None = None
    store_pixels: int = 0
    step: int = 0
    stored: dict[tuple[Place, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        steps: int,
        cross: CrossEdit | None,
        cross_mask_NET: Tensor,
        self_bounds: float | tuple[float, float],
        blend: LocalBlend | None = None,
        store_pixels: int | None = None,
    ) -> "AttentionControl":
        """self_bounds: share of the steps with the source's self-attention, (from, to), or the latter alone."""
        low, high = (0.0, self_bounds) if isinstance(self_bounds, float | int) else self_bounds
        pixels = (BLEND_PIXELS if blend is not None else 0) if store_pixels is None else store_pixels
        return cls(steps, cross, cross_mask_NET, (int(steps * low), int(steps * high)), blend, pixels)

    def wants(self, is_cross: bool, place: Place, pixels: int) -> bool:
        """Whether a layer's maps are edited or stored in this step, so that they must be computed."""
        if is_cross:
            edits = self.cross is not None and bool(self.cross_mask_NET[self.step].any())
            return edits or self._stores(place, pixels)
        return pixels <= SELF_PIXELS and self.self_steps[0] <= self.step < self.self_steps[1]

    def __call__(self, maps_RKPT: Tensor, is_cross: bool, place: Place, layer: str) -> Tensor:
        """A layer's maps of this step, edited; the source's stay."""
        source_KPT, edited_EKPT = maps_RKPT[0], maps_RKPT[1:]
        if is_cross:
            if self.cross is not None:
                mask = self.cross_mask_NET[self.step].to(maps_RKPT)[:, None, None]
                edited_EKPT = self.cross(source_KPT, edited_EKPT) * mask + (1.0 - mask) * edited_EKPT
        elif self.self_steps[0] <= self.step < self.self_steps[1]:
            edited_EKPT = source_KPT.expand_as(edited_EKPT)
        maps_RKPT = torch.cat([source_KPT[None], edited_EKPT])
        if is_cross and self._stores(place, maps_RKPT.shape[2]):
            before = self.stored.get((place, layer))
            self.stored[place, layer] = maps_RKPT if before is None else before + maps_RKPT
        return maps_RKPT

    def after_step(self, x_RCHW: Tensor, step: int) -> Tensor:
        """Blend, and go on to the next step: the `after_step` of a trajectory."""
        if self.blend is not None:
            if not self.stored:
                raise UserError(
                    f"local blending needs cross-attention maps of {self.store_pixels} pixels; the network has none "
                    "for latents of this size"
                )
            x_RCHW = self.blend(x_RCHW, list(self.stored.values()), step, self.steps)
        self.step = step + 1
        return x_RCHW

    def _stores(self, place: Place, pixels: int) -> bool:
        return pixels == self.store_pixels and place != "mid"
