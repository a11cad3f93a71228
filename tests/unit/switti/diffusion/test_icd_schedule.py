"""Jumps of invertible consistency models in float64: identities, the ODE of a Gaussian, boundaries."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from switti.diffusion.boundaries import Boundaries
from switti.diffusion.guidance_embedding import guidance_embedding
from switti.diffusion.objective import Condition, NoisePredictor
from switti.diffusion.schedule import NoiseSchedule, solver_grid
from switti.diffusion.trajectories import decode, dynamic_guidance, encode, start_noise, teacher_trajectory
from switti.errors import UserError
from switti.sampling.guidance import strength_of_weight, weight_of_strength

SCHEDULE = NoiseSchedule.scaled_linear()
NOTHING = Condition(torch.zeros(1, 1, 1))
MEAN, SPREAD = 0.7, 0.4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(x: Tensor, time: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
    """ε of data distributed as N(MEAN, SPREAD²): σ·(x − α·MEAN) / (α²·SPREAD² + σ²)."""
    alpha, sigma = (table[time].double().reshape(-1, 1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def exactly_clean(x: Tensor, time: int) -> Tensor:
    """Where the ODE of that Gaussian leads from x_t: the standardized value is constant along it."""
    alpha, sigma = SCHEDULE.alpha[time].double(), SCHEDULE.sigma[time].double()
    return MEAN + SPREAD * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2).sqrt()


def test_a_jump_to_its_own_time_is_the_identity() -> None:
    x, epsilon = random(5, 3, 4, 4), random(5, 3, 4, 4, seed=1)
    times = torch.tensor([19, 259, 519, 779, 999])
    torch.testing.assert_close(SCHEDULE.jump(x, epsilon, times, times), x, rtol=0, atol=1e-13)


def test_two_jumps_with_one_epsilon_are_one_jump() -> None:
    x, epsilon = random(3, 3, 4, 4), random(3, 3, 4, 4, seed=1)
    start, middle, end = torch.tensor([999, 779, 999]), torch.tensor([519, 259, 19]), torch.tensor([19, 0, 0])
    there = SCHEDULE.jump(SCHEDULE.jump(x, epsilon, start, middle), epsilon, middle, end)
    torch.testing.assert_close(there, SCHEDULE.jump(x, epsilon, start, end), rtol=0, atol=1e-12)
    assert not torch.allclose(there, SCHEDULE.jump(x, 1.01 * epsilon, start, end), atol=1e-3)


def test_times_may_be_numbers_or_one_per_sample() -> None:
    x, epsilon = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    for start, end in ((999, 779), (259, 0), (19, 259)):
        each = SCHEDULE.jump(x, epsilon, torch.tensor([start] * 2), torch.tensor([end] * 2))
        assert torch.equal(SCHEDULE.jump(x, epsilon, start, end), each)


def test_a_jump_with_the_noise_itself_lands_on_the_noised_image() -> None:
    x0, noise = random(1, 3, 4, 4), random(1, 3, 4, 4, seed=1)
    there = SCHEDULE.jump(SCHEDULE.noised(x0, noise, 999), noise, 999, 259)
    torch.testing.assert_close(there, SCHEDULE.noised(x0, noise, 259), rtol=0, atol=1e-12)
    clean = SCHEDULE.jump(SCHEDULE.noised(x0, noise, 999), noise, 999, 0)
    torch.testing.assert_close(clean, x0, rtol=0, atol=1e-12)


def test_velocity_becomes_the_epsilon_of_the_same_point() -> None:
    x0, noise = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    alpha, sigma = SCHEDULE.alpha[519].double(), SCHEDULE.sigma[519].double()
    x, velocity = SCHEDULE.noised(x0, noise, 519), alpha * noise - sigma * x0
    # α² + σ² is 1 up to the rounding of the float32 tables.
    torch.testing.assert_close(SCHEDULE.epsilon_of_velocity(x, velocity, 519), noise, rtol=0, atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    x, epsilon = random(1, 3, 4, 4).bfloat16(), random(1, 3, 4, 4, seed=1).bfloat16()
    assert SCHEDULE.jump(x, epsilon, 999, 779).dtype == torch.float32
    assert SCHEDULE.noised(x, epsilon, 19).dtype == torch.float32


def round_trip(segments: int) -> tuple[float, float]:
    """(error of encoding and decoding, error of decoding) with the analytic ε of a Gaussian."""
    boundaries = Boundaries.automatic(segments, points=1000 // 5)
    latents = MEAN + SPREAD * random(64, 1, 1, 1)
    start = SCHEDULE.noised(latents, torch.zeros_like(latents), boundaries.start)
    encoded = encode(gaussian, SCHEDULE, boundaries, latents, NOTHING, embed_guidance=False).last
    decoded = decode(gaussian, SCHEDULE, boundaries, encoded, NOTHING, embed_guidance=False).last
    closing = (decoded - exactly_clean(start, boundaries.start)).abs().mean().item()
    decoding = decode(gaussian, SCHEDULE, boundaries, random(64, 1, 1, 1), NOTHING, embed_guidance=False).last
    exact = exactly_clean(random(64, 1, 1, 1), 999)
    return closing, (decoding - exact).abs().mean().item()


def test_encoding_and_decoding_along_a_gaussians_ode_close_at_first_order() -> None:
    """Jumps are Euler steps: twice as many halve the error."""
    errors = [round_trip(segments) for segments in (25, 50, 100)]
    for coarse, fine in pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert 0.8 < math.log2(a / b) < 1.3
    assert errors[-1][0] < 0.03


def test_the_teachers_inversion_closes_at_first_order_too() -> None:
    def closing(steps: int) -> float:
        latents = MEAN + SPREAD * random(64, 1, 1, 1)
        there = teacher_trajectory(gaussian, SCHEDULE, latents, NOTHING, steps, invert=True)[-1]
        back = teacher_trajectory(gaussian, SCHEDULE, there, NOTHING, steps)[-1]
        return (back - latents).abs().mean().item()

    assert 0.7 < math.log2(closing(50) / closing(100)) < 1.3


# ---- boundaries ------------------------------------------------------------------------------------------------


def test_jumps_follow_from_the_boundaries() -> None:
    boundaries = Boundaries.automatic(4)
    assert boundaries == Boundaries.given([0, 259, 519, 779], [259, 519, 779, 999])
    assert boundaries.encode_jumps == [(19, 259), (259, 519), (519, 779), (779, 999)]
    assert boundaries.decode_jumps == [(999, 779), (779, 519), (519, 259), (259, 0)]
    assert [boundaries.segment(k) for k in range(4)] == [(19, 259), (259, 519), (519, 779), (779, 999)]
    two = Boundaries.given([0, 259, 519, 779], [519, 999])
    assert [two.decode_times(k) for k in range(2)] == [(519, 259, 19), (999, 779, 519)]


def test_a_time_on_a_boundary_belongs_to_the_segment_below() -> None:
    boundaries, grid = Boundaries.automatic(4), torch.tensor(solver_grid(50))
    ends = dict(zip(grid.tolist(), boundaries.reverse_end(boundaries.previous(grid)).tolist(), strict=True))
    assert (ends[19], ends[259], ends[279], ends[779], ends[799]) == (0, 0, 259, 519, 779)
    following = boundaries.forward_end(boundaries.following(grid[:-1]))
    ends = dict(zip(grid[:-1].tolist(), following.tolist(), strict=True))
    assert (ends[19], ends[239], ends[259], ends[979]) == (259, 259, 519, 999)


@pytest.mark.parametrize(
    ("reverse", "forward", "points", "message"),
    [
        (
            [0, 249, 499, 699],
            [249, 499, 699, 999],
            50,
            r"[249] lie off the grid of 50 points; the nearest are [2",
        ),
        ([19, 259], [259, 999], 50, "reverse boundaries [19, 259] must increase and begin with 0"),
        ([0, 259], [259, 979], 50, "forward boundaries [259, 979] must increase and end with 999"),
        ([0, 519, 259], [259, 519, 999], 50, "reverse boundaries [0, 519, 259] must increase"),
        ([0, 259], [519, 999], 50, "must meet"),
        ([0, 259, 519], [519, 999], 50, "must meet"),
        ([0], [0, 999], 50, "[0] lie off the grid"),
        ([0], [999], 30, "points=30 must divide"),
        ([], [999], 50, "reverse boundaries [] must increase"),
    ],
)
def test_boundaries_that_cannot_be_trained_are_refused(
    reverse: list[int], forward: list[int], points: int, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Boundaries.given(reverse, forward, points)


def test_automatic_boundaries_refuse_another_number_of_segments() -> None:
    with pytest.raises(UserError, match="segments=6: 25 grid points in segments of 5 make 5 segments"):
        Boundaries.automatic(6, 25)
    for segments in (0, 51):
        with pytest.raises(UserError, match=r"must lie in \[1, 50\]"):
            Boundaries.automatic(segments)


def test_times_off_the_schedule_are_refused() -> None:
    x = random(1, 3, 4, 4)
    for time in (-1, 1000):
        with pytest.raises(UserError, match=r"must lie in \[0, 999\]"):
            SCHEDULE.noised(x, x, time)


# ---- guidance --------------------------------------------------------------------------------------------------


def test_dynamic_guidance_is_off_at_high_noise() -> None:
    jumps = Boundaries.automatic(4).decode_jumps
    assert dynamic_guidance(19.0, jumps, 0.8).strengths == (0.0, 19.0, 19.0, 19.0)
    assert dynamic_guidance(19.0, jumps, 0.7).strengths == (0.0, 0.0, 19.0, 19.0)
    assert dynamic_guidance(19.0, jumps).strengths == (19.0,) * 4
    assert dynamic_guidance(19.0, jumps, 0.0).strengths == (0.0,) * 4
    # A step at τ itself is guided.
    assert dynamic_guidance(19.0, jumps, 0.779).strengths == (0.0, 19.0, 19.0, 19.0)
    ramp = dynamic_guidance(10.0, jumps, 0.519, 0.999).strengths
    assert ramp == pytest.approx((0.0, 10 * (0.999 - 0.779) / 0.48, 10.0, 10.0))


def test_the_two_conventions_of_guidance_meet() -> None:
    assert strength_of_weight(8.0) == 7.0
    assert weight_of_strength(strength_of_weight(8.0)) == 8.0


def test_the_guidance_embedding_of_none_is_zeros_and_ones() -> None:
    embedding = guidance_embedding(torch.zeros(2), 7)
    assert embedding.tolist() == [[0, 0, 0, 1, 1, 1, 0]] * 2
    assert guidance_embedding(torch.tensor([19.0])).shape == (1, 512)


def test_start_noise_is_that_of_its_seed_whatever_the_batch() -> None:
    one, three = start_noise(torch.zeros(1, 4, 8, 8), 30), start_noise(torch.zeros(3, 4, 8, 8), 30)
    assert all(torch.equal(row, one[0]) for row in three)
    assert not torch.equal(one, start_noise(torch.zeros(1, 4, 8, 8), 31))


def test_predictors_are_called_with_one_time_per_row() -> None:
    seen: list[list[int]] = []

    def zero(x: Tensor, time: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        seen.append(time.tolist())
        return torch.zeros_like(x)

    network: NoisePredictor = zero
    decode(network, SCHEDULE, Boundaries.automatic(2), torch.zeros(2, 1, 2, 2), NOTHING)
    assert seen == [[999, 999], [499, 499]]
