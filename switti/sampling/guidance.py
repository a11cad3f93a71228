"""Classifier-free guidance by scale: growing or by given factors, and stopped early (Sections 3.4 and 3.5)."""

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
