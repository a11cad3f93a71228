"""What the golden comparisons share: a deviation with its tolerance, and how it is measured."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# In float32, see the data's own description; [-1, 1] pictures amplify the latent's rounding about tenfold.
FEATURE_TOLERANCE = 1e-4
IMAGE_TOLERANCE = 1e-3
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


@dataclass
class Check:
    """Worst deviation of one quantity. exact: a number of unequal elements, which must be 0."""

    quantity: str
    deviation: float
    tolerance: float
    exact: bool = False

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.deviation <= self.tolerance


def load_float32(path: Path) -> dict[str, Tensor]:
    """Tensors of a file; float16 storage becomes float32, integers stay."""
    return {
        key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()
    }


def close(quantity: str, found: Tensor, expected: Tensor, tolerance: float) -> Check:
    """Largest absolute difference; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return Check(quantity, float("inf"), tolerance)
    difference = (found.detach().double() - expected.double()).abs()
    return Check(quantity, difference.max().item() if difference.numel() else 0.0, tolerance)


def equal(quantity: str, found: Tensor, expected: Tensor) -> Check:
    """Number of unequal elements, e.g. of token indices."""
    if found.shape != expected.shape:
        return Check(quantity, float("inf"), 0.0, exact=True)
    return Check(quantity, float((found != expected).sum().item()), 0.0, exact=True)


def relative(quantity: str, found: Tensor | None, expected: Tensor, tolerance: float) -> Check:
    """L2 norm of the difference over the expected L2 norm; infinite if nothing was found."""
    if found is None or found.shape != expected.shape:
        return Check(quantity, float("inf"), tolerance)
    scale = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return Check(quantity, ((found.double() - expected.double()).norm() / scale).item(), tolerance)


def gradient_norms(
    found: dict[str, float], expected: dict[str, float | None], tolerance: float
) -> list[Check]:
    """L2 norms of all gradients; None: the parameter receives no gradient.

    Relative to the norm itself, but not below 1e-4 of the largest one: in front of a normalisation some gradients are
    zero but for rounding.
    """
    floor = 1e-4 * max(norm for norm in expected.values() if norm is not None)
    checks = []
    for key in sorted(expected.keys() | found.keys()):
        norm, wanted = found.get(key), expected.get(key)
        if key not in expected or (norm is None) != (wanted is None):
            deviation = float("inf")
        else:
            deviation = abs((norm or 0.0) - (wanted or 0.0)) / max(wanted or 0.0, floor)
        checks.append(Check(f"grad_l2.{key}", deviation, tolerance))
    return checks
