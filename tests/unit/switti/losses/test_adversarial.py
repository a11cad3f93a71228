"""Adversarial losses against closed forms and finite differences, in float64."""

import math

import pytest
import torch
from torch import Tensor

from switti.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty

REAL = torch.tensor([[2.0, 0.25], [-1.5, 0.0]], dtype=torch.float64)
FAKE = torch.tensor([[-2.0, 0.5], [1.0, -0.25]], dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bce_is_the_cross_entropy_of_the_right_answer() -> None:
    real, fake = REAL.flatten().tolist(), FAKE.flatten().tolist()
    expected = sum(-math.log(sigmoid(x)) for x in real) / 4 + sum(-math.log(1 - sigmoid(x)) for x in fake) / 4
    assert discriminator_loss(REAL, FAKE, "bce").item() == pytest.approx(expected, rel=1e-12)
    expected = sum(-math.log(sigmoid(x)) for x in fake) / 4
    assert generator_loss(FAKE, "bce").item() == pytest.approx(expected, rel=1e-12)


def test_hinge() -> None:
    """Real: 0, 0.75, 2.5, 1; fake: 0, 1.5, 2, 0.75. The generator: −mean."""
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(4.25 / 4 + 4.25 / 4, rel=1e-12)
    assert generator_loss(FAKE, "hinge").item() == pytest.approx(0.75 / 4, rel=1e-12)


def test_bce_does_not_overflow() -> None:
    far = torch.tensor([-1e4], dtype=torch.float32)
    assert generator_loss(far, "bce").item() == pytest.approx(1e4)
    assert discriminator_loss(far, -far, "bce").item() == pytest.approx(2e4)


def judge(x: Tensor) -> Tensor:
    """Some smooth map from images to a logit per pixel."""
    return (x.sin() * x.roll(1, -1)).sum(1, keepdim=True)


def test_r1_against_finite_differences() -> None:
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    image.requires_grad_()
    found = r1_penalty(judge(image), image)
    still, h, total = image.detach(), 1e-6, 0.0
    for index in range(still.numel()):
        step = torch.zeros_like(still).flatten()
        step[index] = h
        step = step.view_as(still)
        total += ((judge(still + step) - judge(still - step)).sum().item() / (2 * h)) ** 2
    assert found.item() == pytest.approx(total / 2 / 16, rel=1e-7)


def test_r1_of_a_linear_judge_and_its_gradient() -> None:
    """Logits w · x: the squared slope is w² per colour of each pixel, 3 w² per logit; its derivative is 6 w."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for side in (2, 8):  # the same at any resolution
        image = torch.randn(2, 3, side, side, dtype=torch.float64, requires_grad=True)
        penalty = r1_penalty(w * image.sum(1), image)
        assert penalty.item() == pytest.approx(3 * 0.49, rel=1e-12)
        (slope,) = torch.autograd.grad(penalty, w)
        assert slope.item() == pytest.approx(4.2, rel=1e-12)


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
    reconstruction = 0.5 * layer.square().sum()  # gradient: the layer itself, norm 5
    adversarial = layer.sum() * 2  # gradient (2, 2), norm 2·√2
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(5 / (2 * math.sqrt(2)), rel=1e-7)
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    assert layer.grad is not None
    assert layer.grad.tolist() == pytest.approx([3 + 2 * weight.item(), -4 + 2 * weight.item()])


def test_adaptive_weight_has_a_limit() -> None:
    layer = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert adaptive_weight(layer.sum(), 0 * layer.sum(), layer, limit=50).item() == 50
