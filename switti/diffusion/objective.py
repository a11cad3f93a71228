"""The four losses of invertible consistency distillation: consistency and preservation, both ways (Section 3.2).

Shape suffixes: B batch, C channels, H W latent, L D text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from switti.diffusion.boundaries import Boundaries
from switti.diffusion.schedule import NoiseSchedule
from switti.sampling.guidance import guided

Direction = Literal["reverse", "forward"]
HUBER_C = 1e-3
PRESERVATION_WEIGHT = 1.5


@dataclass(frozen=True)
class Condition:
    """What a network is conditioned on besides time and guidance.

    added: further inputs by name, e.g. XL's pooled text and sizes, one row an image each.
    """

    text_BLD: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)


# ε of (latents [B, C, H, W], times [B], condition, extra guidance [B] or None where the network does not embed it).
NoisePredictor = Callable[[Tensor, Tensor, Condition, Tensor | None], Tensor]


@dataclass(frozen=True)
class Batch:
    """Clean latents and the noise that all four losses share.

    guidance_B: extra strengths g of the reverse loss. unconditional: of a teacher without guidance embedding.
    """

    latents_BCHW: Tensor
    noise_BCHW: Tensor
    condition: Condition
    guidance_B: Tensor
    unconditional: Condition | None = None


@dataclass(frozen=True)
class Draws:
    """Random indices of one iteration: grid points of the consistency losses, segments of the preservation losses."""

    reverse_B: Tensor
    forward_B: Tensor
    forward_preservation_B: Tensor
    reverse_preservation_B: Tensor

    @classmethod
    def random(cls, boundaries: Boundaries, batch: int, generator: torch.Generator | None = None) -> "Draws":
        """Uniform; the forward loss has no last grid point, as nothing is noisier."""
        counts = (boundaries.points, boundaries.points - 1, *[len(boundaries.forward)] * 2)
        return cls(*(torch.randint(count, (batch,), generator=generator) for count in counts))


@dataclass(frozen=True)
class Consistency:
    """A consistency loss and what it was computed from, times by sample.

    target_BCHW: the student's jump from the teacher's point, before it is replaced by that point where t′ = s.
    """

    loss: Tensor
    start_B: Tensor
    next_B: Tensor
    end_B: Tensor
    noisy_BCHW: Tensor
    epsilon_BCHW: Tensor
    prediction_BCHW: Tensor
    teacher_epsilon_BCHW: Tensor
    teacher_clean_BCHW: Tensor
    point_BCHW: Tensor
    target_BCHW: Tensor


@dataclass(frozen=True)
class Preservation:
    """A preservation loss, without its weight, and what it was computed from.

    jumps: (start, end) by sample of each jump in order. intermediate_BCHW: where the last jump starts. by_segment: each
    segment's share of the loss, by (from, to).
    """

    loss: Tensor
    jumps: list[tuple[Tensor, Tensor]]
    target_BCHW: Tensor
    intermediate_BCHW: Tensor
    final_BCHW: Tensor
    by_segment: dict[tuple[int, int], Tensor]


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = HUBER_C) -> Tensor:
    """√(δ² + c²) − c by element, δ in float32, or in float64 if the prediction is."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    return ((prediction.to(exact) - target.to(exact)) ** 2 + c**2).sqrt() - c


@dataclass(frozen=True)
class Objective:
    """Equation 5: L_CD(θ⁺) + L_CD(θ⁻) + λ·L_f(θ⁻) + λ·L_r(θ⁺), term by term.

    embed_guidance: networks have the guidance embedding. Otherwise a teacher is guided by two evaluations and the
    student learns the mixture of the strengths that it is given, so that these should be one number.
    """

    schedule: NoiseSchedule
    boundaries: Boundaries
    embed_guidance: bool = True
    huber_c: float = HUBER_C
    preservation_weight: float = PRESERVATION_WEIGHT

    def consistency(
        self,
        direction: Direction,
        student: NoisePredictor,
        teacher: NoisePredictor,
        batch: Batch,
        index_B: Tensor,
    ) -> Consistency:
        """L_CD: the jump from x_t and the jump from the teacher's next point end at the same place.

        The student is evaluated last, as its weights must be the active ones in the backward pass.
        """
        boundaries, schedule = self.boundaries, self.schedule
        device = batch.latents_BCHW.device
        start_B = torch.tensor(boundaries.grid, device=device)[index_B.to(device)]
        if direction == "reverse":
            next_B, guidance_B = boundaries.previous(start_B), batch.guidance_B
            end_B = boundaries.reverse_end(next_B)
        else:
            next_B, guidance_B = boundaries.following(start_B), torch.zeros_like(batch.guidance_B)
            end_B = boundaries.forward_end(next_B)
        noisy_BCHW = schedule.noised(batch.latents_BCHW, batch.noise_BCHW, start_B)
        with torch.no_grad():
            teacher_BCHW = self._teacher(teacher, noisy_BCHW, start_B, batch, guidance_B)
            clean_BCHW = schedule.clean(noisy_BCHW, teacher_BCHW, start_B)
            point_BCHW = schedule.ddim(clean_BCHW, teacher_BCHW, next_B)
            target_BCHW = schedule.jump(
                point_BCHW,
                student(point_BCHW.to(noisy_BCHW.dtype), next_B, batch.condition, self._embedded(guidance_B)),
                next_B,
                end_B,
            )
        epsilon_BCHW = student(noisy_BCHW, start_B, batch.condition, self._embedded(guidance_B))
        prediction_BCHW = schedule.jump(noisy_BCHW, epsilon_BCHW, start_B, end_B)
        is_end = (next_B == end_B).reshape(-1, 1, 1, 1)
        target = torch.where(is_end, point_BCHW, target_BCHW)
        loss = pseudo_huber(prediction_BCHW, target, self.huber_c).mean()
        return Consistency(
            loss, start_B, next_B, end_B, noisy_BCHW, epsilon_BCHW, prediction_BCHW,
            teacher_BCHW, clean_BCHW, point_BCHW, target_BCHW,
        )  # fmt: skip

    def preservation(
        self,
        direction: Direction,
        reverse: NoisePredictor,
        forward: NoisePredictor,
        batch: Batch,
        segment_B: Tensor,
    ) -> Preservation:
        """L_f (direction forward) and L_r: the other student's jump through a segment and back is the identity.

        Gradients reach the student of the direction alone; in L_r they pass through all of its jumps.
        """
        there, back = (reverse, forward) if direction == "forward" else (forward, reverse)
        down = torch.tensor([self.boundaries.decode_times(k) for k in range(len(self.boundaries.forward))])
        times_QB = down[segment_B.cpu()].T.to(batch.latents_BCHW.device)
        ends_QB = times_QB[[0, -1]]
        first_QB, second_QB = (
            (times_QB, ends_QB.flip(0)) if direction == "forward" else (ends_QB.flip(0), times_QB)
        )
        target_BCHW = self.schedule.noised(batch.latents_BCHW, batch.noise_BCHW, first_QB[0])
        with torch.no_grad():
            away_BCHW = self._travel(there, target_BCHW, first_QB, batch)
        intermediate_BCHW = self._travel(back, away_BCHW, second_QB[:-1], batch)
        final_BCHW = self._travel(back, intermediate_BCHW, second_QB[-2:], batch)
        distance_B = pseudo_huber(final_BCHW, target_BCHW, self.huber_c).flatten(1).mean(1)
        by_segment = {}
        for number in range(len(self.boundaries.forward)):
            low, high = self.boundaries.segment(number)
            name = (high, low) if direction == "forward" else (low, high)
            mine_B = (segment_B == number).to(distance_B.device)
            by_segment[name] = (distance_B.detach() * mine_B).sum() / len(distance_B)
        jumps = [pair for path in (first_QB, second_QB) for pair in pairwise(path)]
        return Preservation(distance_B.mean(), jumps, target_BCHW, intermediate_BCHW, final_BCHW, by_segment)

    def _teacher(
        self, teacher: NoisePredictor, noisy_BCHW: Tensor, time_B: Tensor, batch: Batch, guidance_B: Tensor
    ) -> Tensor:
        if self.embed_guidance:
            return teacher(noisy_BCHW, time_B, batch.condition, guidance_B)
        conditional = teacher(noisy_BCHW, time_B, batch.condition, None)
        if batch.unconditional is None or not guidance_B.any():
            return conditional
        return guided(conditional, teacher(noisy_BCHW, time_B, batch.unconditional, None), guidance_B)

    def _embedded(self, guidance_B: Tensor) -> Tensor | None:
        return guidance_B if self.embed_guidance else None

    def _travel(self, network: NoisePredictor, x_BCHW: Tensor, times_QB: Tensor, batch: Batch) -> Tensor:
        """The jumps from the first of these times to the last, without guidance."""
        guidance_B = self._embedded(torch.zeros_like(batch.guidance_B))
        for start_B, end_B in pairwise(times_QB):
            epsilon_BCHW = network(x_BCHW, start_B, batch.condition, guidance_B)
            x_BCHW = self.schedule.jump(x_BCHW, epsilon_BCHW, start_B, end_B)
        return x_BCHW
