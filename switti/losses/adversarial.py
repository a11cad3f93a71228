"""Adversarial losses on logits of any shape (here one per pixel); high means real."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["bce", "hinge"]


def generator_loss(fake: Tensor, kind: Kind) -> Tensor:
    """The generator's loss, a scalar: −log σ(fake) ("bce", the non-saturating form) or −fake ("hinge")."""
    return F.softplus(-fake).mean() if kind == "bce" else -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: Kind) -> Tensor:
    """The discriminator's loss, a scalar: a mean over real logits plus a mean over fake ones.

    "bce": −log σ(real) and −log(1 − σ(fake)); "hinge": max(0, 1 − real) and max(0, 1 + fake).
    """
    if kind == "bce":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def r1_penalty(logits: Tensor, image_B3HW: Tensor) -> Tensor:
    """Squared gradient of each real image's summed logits with respect to its pixels (arXiv 1801.04406), a scalar.

    Divided by the number of logits per image, so that a weight means the same at any resolution; mean over images.
    logits [B, …] must have been computed from `image_B3HW` with its gradient required.
    """
    (slope_B3HW,) = torch.autograd.grad(logits.sum(), image_B3HW, create_graph=True)
    return slope_B3HW.square().sum() / logits.numel()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, limit: float = 1e4
) -> Tensor:
    """Factor that gives the adversarial loss the reconstruction's pull on the decoder's last layer (arXiv 2012.09841).

    Ratio of the two gradients' norms with respect to `last_layer`, at most `limit`; a scalar without gradient. Both
    graphs are kept.
    """
    wanted, given = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction, adversarial)
    )
    return (wanted / (given + 1e-8)).clamp(max=limit).detach()
