"""Optimizer steps of invertible consistency distillation: one on the sum of the losses, or one for each loss.

The released code takes four steps an iteration; under Adam the weight of a preservation loss then hardly matters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switti.diffusion.objective import Batch, Direction, Draws, NoisePredictor, Objective

Update = Literal["summed", "alternating"]
UPDATES: tuple[Update, ...] = ("summed", "alternating")
Term = Literal["reverse", "forward", "forward_preservation", "reverse_preservation"]
# In the order of the released code, with the student that each one trains.
TERMS: dict[Term, Direction] = {
    "reverse": "reverse",
    "forward": "forward",
    "forward_preservation": "forward",
    "reverse_preservation": "reverse",
}


@dataclass(frozen=True)
class Student:
    """A network in training: its predictions, its trained parameters and their optimizer."""

    predict: NoisePredictor
    parameters: list[nn.Parameter]
    optimizer: Optimizer


@dataclass(frozen=True)
class Iteration:
    """Losses and gradient norms before clipping: by term if alternating, otherwise norms by student.

    losses: unweighted. by_segment: of the preservation losses, by term and (from, to).
    """

    losses: dict[Term, Tensor]
    norms: dict[str, Tensor]
    by_segment: dict[Term, dict[tuple[int, int], Tensor]]


def iterate(
    objective: Objective,
    students: Mapping[Direction, Student],
    teacher: NoisePredictor,
    batch: Batch,
    draws: Draws,
    update: Update = "summed",
    clip: float = 1.0,
) -> Iteration:
    """One training iteration: the four losses, their gradients and the optimizer steps.

    Each loss is differentiated before the next one is computed, so that one graph is in memory at a time and, with two
    adapters on one network, the adapter of the backward pass is the active one.

    Args:
        update: summed: the gradients add up and each student steps once (equation 5). alternating: a step after each
            loss, as in the released code.
        clip: largest gradient norm of a student's step.
    """
    losses: dict[Term, Tensor] = {}
    norms: dict[str, Tensor] = {}
    by_segment: dict[Term, dict[tuple[int, int], Tensor]] = {}
    for student in students.values():
        student.optimizer.zero_grad(set_to_none=True)
    for term, direction in TERMS.items():
        loss, by_segment[term] = _loss(objective, term, students, teacher, batch, draws)
        weight = objective.preservation_weight if term.endswith("preservation") else 1.0
        (weight * loss).backward()
        losses[term] = loss.detach()
        if update == "alternating":
            norms[term] = _step(students[direction], clip)
    if update == "summed":
        norms = {direction: _step(student, clip) for direction, student in students.items()}
    return Iteration(losses, norms, {term: parts for term, parts in by_segment.items() if parts})


def _loss(
    objective: Objective,
    term: Term,
    students: Mapping[Direction, Student],
    teacher: NoisePredictor,
    batch: Batch,
    draws: Draws,
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    index_B: Tensor = getattr(draws, f"{term}_B")
    direction = TERMS[term]
    if term in ("reverse", "forward"):
        student = students[direction].predict
        return objective.consistency(direction, student, teacher, batch, index_B).loss, {}
    reverse, forward = students["reverse"].predict, students["forward"].predict
    result = objective.preservation(direction, reverse, forward, batch, index_B)
    return result.loss, result.by_segment


def _step(student: Student, clip: float) -> Tensor:
    """Clip, step and clear the gradients of one student."""
    norm = torch.nn.utils.clip_grad_norm_(student.parameters, clip)
    student.optimizer.step()
    student.optimizer.zero_grad(set_to_none=True)
    return norm
