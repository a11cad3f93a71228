"""Encoding, decoding and editing along the jumps of invertible consistency models, and the teacher's DDIM (Section 4).

Shape suffixes: R rows (images or prompts), C channels, H W latent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switti.diffusion.boundaries import Boundaries, Jump
from switti.diffusion.objective import Condition, NoisePredictor
from switti.diffusion.schedule import TIMES, NoiseSchedule
from switti.sampling.guidance import GuidanceSchedule

# Called after each step with the latents and the step's number; returns the latents to go on with.
AfterStep = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Path:
    """States after each jump, and the ε of each one."""

    states: list[Tensor]
    epsilons: list[Tensor]

    @property
    def last(self) -> Tensor:
        return self.states[-1]


def dynamic_guidance(
    strength: float, jumps: Sequence[Jump], full_until: float = 1.0, none_from: float | None = None
) -> GuidanceSchedule:
    """Guidance of each jump by its start time t/T, off at high noise: t > τ·T (Section 3.3)."""
    return GuidanceSchedule.by_noise_level(strength, [t / TIMES for t, _ in jumps], full_until, none_from)


def start_noise(latents_RCHW: Tensor, seed: int) -> Tensor:
    """The noise that encoding adds, of a CPU generator and the same for each row."""
    generator = torch.Generator().manual_seed(seed)
    noise_1CHW = torch.randn((1, *latents_RCHW.shape[1:]), generator=generator)
    return noise_1CHW.to(latents_RCHW).expand_as(latents_RCHW)


def travel(
    network: NoisePredictor,
    schedule: NoiseSchedule,
    x_RCHW: Tensor,
    jumps: Sequence[Jump],
    conditions: Condition | Sequence[Condition],
    strengths: Sequence[Sequence[float]] | None = None,
    after_step: AfterStep | None = None,
) -> Path:
    """Jumps from noise level to noise level, in float32.

    Args:
        conditions: one for all jumps, or one for each.
        strengths: extra guidance by jump and row; None for a network without guidance embedding.
        after_step: changes the latents after each jump, as local blending does.
    """
    path = Path([], [])
    for step, (start, end) in enumerate(jumps):
        condition = conditions if isinstance(conditions, Condition) else conditions[step]
        time_R = torch.full((len(x_RCHW),), start, device=x_RCHW.device)
        guidance_R = None
        if strengths is not None:
            guidance_R = torch.tensor(strengths[step], dtype=torch.float32, device=x_RCHW.device)
        epsilon_RCHW = network(x_RCHW, time_R, condition, guidance_R)
        x_RCHW = schedule.jump(x_RCHW, epsilon_RCHW, start, end)
        if after_step is not None:
            x_RCHW = after_step(x_RCHW, step)
        path.states.append(x_RCHW)
        path.epsilons.append(epsilon_RCHW)
    return path


def encode(
    network: NoisePredictor,
    schedule: NoiseSchedule,
    boundaries: Boundaries,
    latents_RCHW: Tensor,
    source: Condition,
    noise_RCHW: Tensor | None = None,
    embed_guidance: bool = True,
) -> Path:
    """Clean latents → noise with the forward student, always without guidance (Table 1: guidance spoils the noise).

    noise_RCHW: added at the first time of the grid, see `start_noise`; None: the latents are only scaled by α.
    """
    noise_RCHW = torch.zeros_like(latents_RCHW) if noise_RCHW is None else noise_RCHW
    x_RCHW = schedule.noised(latents_RCHW, noise_RCHW, boundaries.start)
    jumps = boundaries.encode_jumps
    strengths = [[0.0] * len(x_RCHW)] * len(jumps) if embed_guidance else None
    return travel(network, schedule, x_RCHW, jumps, source, strengths)


def decode(
    network: NoisePredictor,
    schedule: NoiseSchedule,
    boundaries: Boundaries,
    noise_RCHW: Tensor,
    condition: Condition,
    guidance: GuidanceSchedule | None = None,
    embed_guidance: bool = True,
) -> Path:
    """Noise → clean latents with the reverse student. guidance: see `dynamic_guidance`; None: none."""
    jumps = boundaries.decode_jumps
    by_step = guidance.strengths if guidance is not None else (0.0,) * len(jumps)
    strengths = [[strength] * len(noise_RCHW) for strength in by_step] if embed_guidance else None
    return travel(network, schedule, noise_RCHW, jumps, condition, strengths)


def edit(
    network: NoisePredictor,
    schedule: NoiseSchedule,
    boundaries: Boundaries,
    noise_1CHW: Tensor,
    prompts: Condition,
    guidance: GuidanceSchedule,
    after_step: AfterStep | None = None,
) -> Path:
    """The source prompt (first row) and its edits from the same noise.

    The source is never guided: its row is a faithful reconstruction that supplies attention maps. `network` carries
    the attention control, if any.
    """
    rows = len(prompts.text_BLD)
    strengths = [[0.0] + [strength] * (rows - 1) for strength in guidance.strengths]
    x_RCHW = noise_1CHW.expand(rows, *noise_1CHW.shape[1:])
    return travel(network, schedule, x_RCHW, boundaries.decode_jumps, prompts, strengths, after_step)


def edit_source_first(
    network: NoisePredictor,
    schedule: NoiseSchedule,
    boundaries: Boundaries,
    noise_RCHW: Tensor,
    source: Condition,
    target: Condition,
    guidance: GuidanceSchedule,
    source_above: float,
) -> Path:
    """XL's editing without attention control: the source's text while t > τ·T (the unguided steps), then the target's.

    What else conditions the network stays the target's throughout. source_above: τ.
    """
    jumps = boundaries.decode_jumps
    first = Condition(source.text_BLD, target.added)
    conditions = [first if start > TIMES * source_above else target for start, _ in jumps]
    strengths = [[strength] * len(noise_RCHW) for strength in guidance.strengths]
    return travel(network, schedule, noise_RCHW, jumps, conditions, strengths)


def teacher_trajectory(
    network: NoisePredictor,
    schedule: NoiseSchedule,
    x_RCHW: Tensor,
    condition: Condition,
    steps: int = 50,
    *,
    invert: bool = False,
    unconditional: Condition | None = None,
    guidance: GuidanceSchedule | None = None,
) -> list[Tensor]:
    """The teacher's DDIM over its grid 980, …, 20, 0 (of 50 steps): states after each step.

    invert: towards noise instead. guidance: by step, applied by two evaluations with `unconditional`.
    """
    width = TIMES // steps
    grid = [width * k for k in range(steps)]
    states: list[Tensor] = []
    for step, time in enumerate(grid if invert else grid[::-1]):
        start, end = (time - width, time) if invert else (time, time - width)
        time_R = torch.full((len(x_RCHW),), time, device=x_RCHW.device)
        epsilon = network(x_RCHW, time_R, condition, None)
        if guidance is not None and unconditional is not None and guidance.strengths[step] != 0.0:
            rows = torch.cat([epsilon, network(x_RCHW, time_R, unconditional, None)])
            epsilon = guidance.combine(rows, len(x_RCHW), step)
        x_RCHW = schedule.ddim_step(x_RCHW, epsilon, start, end)
        states.append(x_RCHW)
    return states
