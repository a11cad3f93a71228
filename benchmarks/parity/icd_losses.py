"""Golden check of the four losses of invertible consistency distillation for any pair of students."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.parity.common import Golden, Settings, TensorFile, close, relative
from switti.diffusion.objective import Batch, Direction, NoisePredictor, Objective


@dataclass(frozen=True)
class Tolerances:
    values: float
    loss: float
    gradient: float


@dataclass(frozen=True)
class Networks:
    """The three networks, and each student's trained parameters by their golden names."""

    teacher: NoisePredictor
    reverse: NoisePredictor
    forward: NoisePredictor
    parameters: Callable[[Direction], Mapping[str, nn.Parameter]]

    def student(self, direction: Direction) -> NoisePredictor:
        return self.reverse if direction == "reverse" else self.forward


def check_losses(
    golden: Golden,
    file: TensorFile,
    case: str,
    objective: Objective,
    networks: Networks,
    batch: Batch,
    logs: Settings | None,
    tolerances: Tolerances,
) -> None:
    """All quantities of a case. case: prefix of its keys."""
    directions: tuple[Direction, ...] = ("reverse", "forward")
    for direction in directions:
        with golden.part(f"{file.prefix}{case}{direction}"):
            _check_consistency(file, f"{case}{direction}/", direction, objective, networks, batch, tolerances)
    for direction in directions:
        with golden.part(f"{file.prefix}{case}{direction}_preserve"):
            name = f"{direction}_preserve"
            log = logs.get(name) if logs else None
            _check_preservation(
                golden, file, f"{case}{name}/", direction, objective, networks, batch, log, tolerances
            )


def _check_consistency(
    file: TensorFile,
    prefix: str,
    direction: Direction,
    objective: Objective,
    networks: Networks,
    batch: Batch,
    tolerances: Tolerances,
) -> None:
    term = objective.consistency(
        direction, networks.student(direction), networks.teacher, batch, file[f"{prefix}index"]
    )
    file.equal(f"{prefix}start", term.start_B)
    file.equal(f"{prefix}next", term.next_B)
    file.equal(f"{prefix}boundary", term.end_B)
    for name, value in (
        ("noisy", term.noisy_BCHW),
        ("eps_student", term.epsilon_BCHW),
        ("pred", term.prediction_BCHW),
        ("teacher_eps", term.teacher_epsilon_BCHW),
        ("teacher_x0", term.teacher_clean_BCHW),
        ("x_next", term.point_BCHW),
        ("target_before_mask", term.target_BCHW),
    ):
        file.relative(f"{prefix}{name}", value.detach(), tolerances.values)
    _check_gradients(file, prefix, term.loss, 1.0, networks.parameters(direction), tolerances)


def _check_preservation(
    golden: Golden,
    file: TensorFile,
    prefix: str,
    direction: Direction,
    objective: Objective,
    networks: Networks,
    batch: Batch,
    log: Settings | None,
    tolerances: Tolerances,
) -> None:
    term = objective.preservation(
        direction, networks.reverse, networks.forward, batch, file[f"{prefix}interval"]
    )
    jumps = torch.stack([torch.stack(pair) for pair in term.jumps])
    file.equal(f"{prefix}times", jumps)
    file.relative(f"{prefix}target", term.target_BCHW, tolerances.values)
    file.relative(f"{prefix}intermediate", term.intermediate_BCHW.detach(), tolerances.values)
    file.relative(f"{prefix}final", term.final_BCHW.detach(), tolerances.values)
    _check_gradients(
        file, prefix, term.loss, objective.preservation_weight, networks.parameters(direction), tolerances
    )
    if log is None:
        return
    name = f"{direction}_preserve_loss"
    parts = {f"{name}_{start}_{end}": value for (start, end), value in term.by_segment.items()}
    for key, value in {**parts, name: term.loss.detach()}.items():
        if (expected := golden.wanted(log, key)) is not None:
            expected = torch.tensor(expected, dtype=torch.float64)
            golden.add(close(f"{file.prefix}{prefix}log.{key}", value, expected, tolerances.loss))


def _check_gradients(
    file: TensorFile,
    prefix: str,
    loss: Tensor,
    weight: float,
    parameters: Mapping[str, nn.Parameter],
    tolerances: Tolerances,
) -> None:
    """Of weight × loss, and the norm of all of them."""
    file.close(f"{prefix}loss", loss.detach().reshape(1), tolerances.loss)
    used = list(parameters.values())
    gradients = torch.autograd.grad(weight * loss, used, allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        # A parameter that nothing reaches, as the embedding's map without embedding, has none in the folder either.
        if gradient is not None or f"{prefix}grad/{name}" in file:
            file.relative(f"{prefix}grad/{name}", gradient, tolerances.gradient)
    reached = [gradient for gradient in gradients if gradient is not None]
    norm = torch.stack([gradient.norm() for gradient in reached]).norm().reshape(1)
    expected = file.wanted(f"{prefix}grad_norm")
    if expected is not None:
        file.golden.add(relative(f"{file.prefix}{prefix}grad_norm", norm, expected, tolerances.gradient))
