"""Networks divided between steps and whole within one, by a group of one rank: passes, gradients, values in place."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_modules.strategies.gather_per_step import (
    assign,
    divide_step,
    divide_weights,
    hold_whole,
    whole,
    whole_state,
)
from switti.losses.adversarial import r1_penalty
from switti.tokenizer.discriminator import UNetDiscriminator


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def networks() -> tuple[UNetDiscriminator, UNetDiscriminator]:
    """(divided, plain), of the same weights and singular vectors."""
    torch.manual_seed(0)
    plain = UNetDiscriminator(4)
    divided = copy.deepcopy(plain)
    divide_weights(divided, init_device_mesh("cpu", (1,)))
    return divided, plain


def passes(critic: UNetDiscriminator) -> list[Tensor]:
    """Two micro-batches, each with a gradient of one layer and a second derivative; those gradients."""
    found = []
    for seed in range(2):
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        hold_whole(critic)
        loss = critic(image).square().mean() + critic(-image).mean()
        found += torch.autograd.grad(loss, critic.last.weight, retain_graph=True)
        image.requires_grad_()
        (loss + r1_penalty(critic(image), image)).backward()
    divide_step(critic)
    return found


def test_passes_of_a_step_are_those_of_a_plain_network() -> None:
    """Spectral norm included; the weights are parts before and after, and steps go on from there."""
    divided, plain = networks()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in (divided, plain)]
    for _ in range(2):
        for found, expected in zip(passes(divided), passes(plain), strict=True):
            assert torch.equal(found, expected)
        for ours, theirs in zip(divided.parameters(), plain.parameters(), strict=True):
            assert isinstance(ours, DTensor) and isinstance(ours.grad, DTensor) and theirs.grad is not None
            assert torch.equal(ours.grad.full_tensor(), theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = whole_state(divided)
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)


def test_frozen_while_it_judges() -> None:
    """Gradients reach the picture and not the weights, which learn again afterwards."""
    divided, _ = networks()
    hold_whole(divided)
    divided.requires_grad_(False)
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    divided(image).mean().backward()
    divided.requires_grad_(True)
    assert image.grad is not None and image.grad.any()
    divide_step(divided)
    assert all(p.grad is None and p.requires_grad for p in divided.parameters())


def test_a_dict_is_divided_by_entries_and_what_is_plain_stays() -> None:
    parts = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    hold_whole(parts), divide_step(parts)
    assert not any(isinstance(p, DTensor) for p in parts.parameters())
    for _ in range(2):  # Lightning may ask twice
        divide_weights(parts, init_device_mesh("cpu", (1,)))
    assert all(isinstance(p, DTensor) for p in parts.parameters())
    assert all(torch.equal(value, before[name]) for name, value in whole_state(parts).items())


def test_values_in_place() -> None:
    layer = nn.Linear(3, 5)
    plain = nn.Parameter(torch.zeros(5, 3))
    divide_weights(layer, init_device_mesh("cpu", (1,)))
    value = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    for parameter in (layer.weight, plain):
        assign(parameter, value)
        assert torch.equal(whole(parameter), value.float()) and not whole(parameter).requires_grad
