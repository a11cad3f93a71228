"""Classifier-free guidance by scale: growing or by given factors, and stopped early (Sections 3.4 and 3.5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switti.sampling.config import SamplingConfig
from switti.scales import Pyramid


@dataclass(frozen=True)
class GuidanceSchedule:
    """Guidance at each scale: which rows are computed and how their logits are combined.

    strengths: t of (1 + t)·conditional − t·unconditional, per scale; 0 where guidance is off.
    start, stop: guidance is on from `start` to before `stop`; at scales past both, logits are divided by
    `late_temperature`.
    """

    strengths: tuple[float, ...]
    start: int
    stop: int
    late_temperature: float | None

    @classmethod
    def of(cls, config: SamplingConfig, pyramid: Pyramid) -> "GuidanceSchedule":
        count = pyramid.count
        stop = count if config.guidance_stop is None else min(config.guidance_stop, count)
        factors = config.guidance_by_scale or [pyramid.ratio(k) for k in range(count)]
        strengths = tuple(
            config.guidance * factor if config.guidance_start <= k < stop else 0.0
            for k, factor in enumerate(factors)
        )
        return cls(strengths, config.guidance_start, stop, config.late_temperature)

    @classmethod
    def by_noise_level(
        cls, strength: float, levels: Sequence[float], full_until: float = 1.0, none_from: float | None = None
    ) -> "GuidanceSchedule":
        """Guidance along a diffusion trajectory, off at high noise (arXiv 2406.14539, Section 3.3).

        Scale-wise sampling turns guidance off late, at fine scales; here it is off early.

        Args:
            strength: g, the same as t above; see `strength_of_weight`.
            levels: noise level t/T in [0, 1] of each step.
            full_until: τ1, up to and including which guidance is full. 1: everywhere.
            none_from: τ2, from which there is none, with a linear ramp between. None: τ1, a step.
        """
        strengths = tuple(strength * guided_fraction(level, full_until, none_from) for level in levels)
        return cls(strengths, 0, len(strengths), None)

    @property
    def last_guided(self) -> int:
        """Last scale that needs unconditional logits, −1 if none does."""
        return max((k for k, t in enumerate(self.strengths) if t != 0.0), default=-1)

    def needs_unconditional(self, scale: int, causal: bool) -> bool:
        """Whether unconditional rows must run: for their logits or, causally, to be seen by later scales."""
        return scale <= self.last_guided if causal else self.strengths[scale] != 0.0

    def combine(self, logits: Tensor, batch: int, scale: int) -> Tensor:
        """Guided logits [batch, P, V] in float32 from rows [conditional; unconditional] or conditional only."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        conditional = logits[:batch].to(exact)
        strength = self.strengths[scale]
        if strength != 0.0:
            return (conditional * (1.0 + strength)).sub_(logits[batch:].to(exact), alpha=strength)
        if scale >= max(self.start, self.stop) and self.late_temperature is not None:
            return conditional / self.late_temperature
        return conditional


def guided_fraction(level: float, full_until: float, none_from: float | None = None) -> float:
    """Share of the strength at a noise level in [0, 1]: 1 up to τ1, 0 from τ2, linear between them."""
    none_from = full_until if none_from is None else none_from
    if level <= full_until:
        return 1.0
    return 0.0 if level >= none_from else (none_from - level) / (none_from - full_until)


def strength_of_weight(weight: float) -> float:
    """Extra strength t = w − 1 of the convention ε_u + w·(ε_c − ε_u), in which 1 means no guidance.

    Everything here counts extra strength, (1 + t)·conditional − t·unconditional, in which 0 means none; this function
    and `weight_of_strength` are the only place where the two meet.
    """
    return weight - 1.0


def weight_of_strength(strength: float) -> float:
    """The inverse of `strength_of_weight`."""
    return strength + 1.0


def guided(conditional: Tensor, unconditional: Tensor, strength_B: Tensor) -> Tensor:
    """Guided predictions with one extra strength per row, as in training."""
    strength = strength_B.to(conditional.dtype).reshape(-1, *[1] * (conditional.ndim - 1))
    return conditional + strength * (conditional - unconditional)
