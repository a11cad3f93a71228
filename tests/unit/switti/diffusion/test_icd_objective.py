"""The four losses of invertible consistency distillation, and the two ways of stepping."""

import copy

import pytest
import torch
from torch import Tensor, nn

from switti.diffusion.boundaries import Boundaries
from switti.diffusion.objective import (
    Batch,
    Condition,
    Direction,
    Draws,
    NoisePredictor,
    Objective,
    pseudo_huber,
)
from switti.diffusion.schedule import NoiseSchedule
from switti.diffusion.updates import Student, Update, iterate

BOUNDARIES = Boundaries.automatic(4)
OBJECTIVE = Objective(NoiseSchedule.scaled_linear(), BOUNDARIES)


class Network(nn.Module):
    """A linear map of latents, time and guidance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.3 * torch.randn(3, 3, generator=generator))
        self.guidance = nn.Parameter(0.1 * torch.randn(1, generator=generator))

    def forward(self, x: Tensor, time: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        out = torch.einsum("cd,bdhw->bchw", self.weight, x) + (time / 1000).reshape(-1, 1, 1, 1)
        return out if guidance is None else out + self.guidance * guidance.reshape(-1, 1, 1, 1)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    latents, noise = (torch.randn(6, 3, 4, 4, generator=generator) for _ in range(2))
    return Batch(latents, noise, Condition(torch.zeros(6, 1, 1)), torch.tensor([0.0, 7, 11, 15, 19, 0]))


@pytest.fixture
def draws() -> Draws:
    return Draws.random(BOUNDARIES, 6, torch.Generator().manual_seed(6))


def students(rate: float = 1e-2) -> dict[Direction, Student]:
    made: dict[Direction, Student] = {}
    for seed, direction in enumerate(("reverse", "forward")):
        network = Network(seed)
        parameters = list(network.parameters())
        made[direction] = Student(network, parameters, torch.optim.SGD(parameters, lr=rate))
    return made


def test_pseudo_huber_is_the_absolute_difference_but_smooth_at_zero() -> None:
    zero = torch.zeros(1)
    assert pseudo_huber(zero, zero).item() == 0.0
    assert pseudo_huber(zero + 2.0, zero).item() == pytest.approx(2.0 - 1e-3, abs=1e-6)
    assert pseudo_huber(zero + 1e-4, zero).item() == pytest.approx(1e-8 / (2 * 1e-3), rel=1e-2)
    half = pseudo_huber(torch.ones(1, dtype=torch.bfloat16), zero.bfloat16())
    assert half.dtype == torch.float32


def test_draws_cover_the_grid_but_for_the_noisiest_point_of_the_forward_loss() -> None:
    draws = Draws.random(BOUNDARIES, 20000, torch.Generator().manual_seed(0))
    assert (int(draws.reverse_B.max()), int(draws.forward_B.max())) == (49, 48)
    assert {int(k) for k in draws.reverse_preservation_B} == {0, 1, 2, 3}


def test_students_that_follow_a_linear_ode_have_no_consistency_loss_with_a_matching_teacher(
    batch: Batch,
) -> None:
    """ε that is constant along each trajectory makes every jump of it end at the same place."""

    def noise_itself(x: Tensor, time: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        return batch.noise_BCHW.to(x.dtype)

    index = torch.tensor([5, 13, 30, 38, 44, 49])
    result = OBJECTIVE.consistency("reverse", noise_itself, noise_itself, batch, index)
    assert result.loss.item() < 1e-6
    forward = OBJECTIVE.consistency("forward", noise_itself, noise_itself, batch, index.clamp_max(48))
    assert forward.loss.item() < 1e-6
    segments = torch.tensor([1, 1, 2, 2, 3, 3])
    for direction in ("forward", "reverse"):
        kept = OBJECTIVE.preservation(direction, noise_itself, noise_itself, batch, segments)
        assert kept.loss.item() < 1e-6
        assert sum(kept.by_segment.values()).item() == pytest.approx(kept.loss.item(), abs=1e-9)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradients_reach_one_student_alone(direction: Direction, batch: Batch, draws: Draws) -> None:
    networks = {name: Network(seed) for seed, name in enumerate(("reverse", "forward", "teacher"))}
    for loss in (
        OBJECTIVE.consistency(
            direction, networks[direction], networks["teacher"], batch, draws.forward_B
        ).loss,
        OBJECTIVE.preservation(
            direction, networks["reverse"], networks["forward"], batch, draws.forward_preservation_B
        ).loss,
    ):
        loss.backward()
        for name, network in networks.items():
            reached = network.weight.grad is not None
            assert reached == (name == direction)
            network.zero_grad()


def test_the_target_of_a_consistency_loss_has_no_gradient(batch: Batch) -> None:
    """Differences of the loss with the target held fixed give the same gradient."""
    network, teacher, index = Network(0).double(), Network(2).double(), torch.tensor([3, 9, 17, 22, 31, 47])
    exact = Batch(
        batch.latents_BCHW.double(), batch.noise_BCHW.double(), batch.condition, batch.guidance_B.double()
    )
    frozen = copy.deepcopy(network)

    def loss(moved: NoisePredictor) -> Tensor:
        """With the predictions of `moved`, and targets of the frozen copy."""
        term = OBJECTIVE.consistency("reverse", moved, teacher, exact, index)
        fixed = OBJECTIVE.consistency("reverse", frozen, teacher, exact, index)
        at_end = (term.next_B == term.end_B).reshape(-1, 1, 1, 1)
        target = torch.where(at_end, fixed.point_BCHW, fixed.target_BCHW)
        return pseudo_huber(term.prediction_BCHW, target).mean()

    gradient = torch.autograd.grad(
        OBJECTIVE.consistency("reverse", network, teacher, exact, index).loss, network.weight
    )[0]
    step = 1e-6
    with torch.no_grad():
        network.weight[0, 0] += step
        above = loss(network)
        network.weight[0, 0] -= 2 * step
        below = loss(network)
    assert ((above - below) / (2 * step)).item() == pytest.approx(gradient[0, 0].item(), rel=1e-6)


def test_a_teacher_without_embedding_is_guided_by_two_evaluations(batch: Batch) -> None:
    def text_alone(x: Tensor, time: Tensor, condition: Condition, guidance: Tensor | None) -> Tensor:
        assert guidance is None
        return x + condition.text_BLD[:, :, :, None]

    ones, twos = Condition(torch.ones(6, 1, 1)), Condition(2 * torch.ones(6, 1, 1))
    guided = Batch(batch.latents_BCHW, batch.noise_BCHW, twos, batch.guidance_B, ones)
    objective = Objective(OBJECTIVE.schedule, BOUNDARIES, embed_guidance=False)
    term = objective.consistency("reverse", text_alone, text_alone, guided, torch.full((6,), 20))
    extra = (term.teacher_epsilon_BCHW - term.noisy_BCHW)[:, 0, 0, 0]
    torch.testing.assert_close(extra, 2.0 + batch.guidance_B)
    forward = objective.consistency("forward", text_alone, text_alone, guided, torch.full((6,), 20))
    torch.testing.assert_close(
        forward.teacher_epsilon_BCHW - forward.noisy_BCHW, torch.full_like(term.noisy_BCHW, 2.0)
    )


def gradients_of_the_sum(batch: Batch, draws: Draws) -> dict[Direction, list[Tensor]]:
    """Of equation 5, differentiated at once."""
    nets = {name: Network(seed) for seed, name in enumerate(("reverse", "forward", "teacher"))}
    reverse, forward, teacher = nets["reverse"], nets["forward"], nets["teacher"]
    total = OBJECTIVE.consistency("reverse", reverse, teacher, batch, draws.reverse_B).loss
    total = total + OBJECTIVE.consistency("forward", forward, teacher, batch, draws.forward_B).loss
    total = (
        total
        + 1.5 * OBJECTIVE.preservation("forward", reverse, forward, batch, draws.forward_preservation_B).loss
    )
    total = (
        total
        + 1.5 * OBJECTIVE.preservation("reverse", reverse, forward, batch, draws.reverse_preservation_B).loss
    )
    total.backward()
    return {
        "reverse": [p.grad for p in reverse.parameters()],
        "forward": [p.grad for p in forward.parameters()],
    }


def test_summed_updates_are_one_step_on_the_sum(batch: Batch, draws: Draws) -> None:
    trained, rate = students(1e-2), 1e-2
    before = {d: [p.detach().clone() for p in s.parameters] for d, s in trained.items()}
    done = iterate(OBJECTIVE, trained, Network(2), batch, draws, "summed", clip=1e9)
    expected = gradients_of_the_sum(batch, draws)
    for direction, student in trained.items():
        for old, new, gradient in zip(
            before[direction], student.parameters, expected[direction], strict=True
        ):
            if gradient is not None:
                torch.testing.assert_close(old - new, rate * gradient, rtol=1e-4, atol=1e-7)
        norm = torch.stack([g.norm() for g in expected[direction] if g is not None]).norm()
        torch.testing.assert_close(done.norms[direction], norm)
    assert set(done.losses) == {"reverse", "forward", "forward_preservation", "reverse_preservation"}


@pytest.mark.parametrize(("update", "steps"), [("summed", 1), ("alternating", 2)])
def test_a_student_steps_once_summed_and_twice_alternating(
    update: Update, steps: int, batch: Batch, draws: Draws
) -> None:
    trained = students()
    counts = dict.fromkeys(trained, 0)
    for direction, student in trained.items():

        def count(*_: object, direction: Direction = direction) -> None:
            counts[direction] += 1

        student.optimizer.register_step_post_hook(count)
    done = iterate(OBJECTIVE, trained, Network(2), batch, draws, update)
    assert counts == {"reverse": steps, "forward": steps}
    assert len(done.norms) == 2 * steps
    assert all(parameter.grad is None for s in trained.values() for parameter in s.parameters)


def test_alternating_losses_see_the_step_before(batch: Batch, draws: Draws) -> None:
    """The last loss is computed with networks that have moved, unlike in the summed update."""
    summed = iterate(OBJECTIVE, students(), Network(2), batch, draws, "summed")
    alternating = iterate(OBJECTIVE, students(), Network(2), batch, draws, "alternating")
    assert torch.equal(summed.losses["reverse"], alternating.losses["reverse"])
    assert not torch.equal(summed.losses["reverse_preservation"], alternating.losses["reverse_preservation"])


def test_clipping_bounds_a_step(batch: Batch, draws: Draws) -> None:
    trained = students(rate=1.0)
    before = {d: [p.detach().clone() for p in s.parameters] for d, s in trained.items()}
    iterate(OBJECTIVE, trained, Network(2), batch, draws, clip=1e-3)
    for direction, student in trained.items():
        moved = torch.cat(
            [(a - b).flatten() for a, b in zip(before[direction], student.parameters, strict=True)]
        )
        assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)
