"""Networks sharded between steps and gathered within one, in a group of one rank: gradients, values in place."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_modules.strategies.gather_per_step import (
    assign,
    full_state,
    full_tensor,
    reshard_with_gradients,
    shard_between_steps,
    unshard,
)
from switti.losses.adversarial import r1_penalty
from switti.tokenizer.discriminator import UNetDiscriminator

pytestmark = pytest.mark.usefixtures("group_of_one")


def networks() -> tuple[UNetDiscriminator, UNetDiscriminator]:
    """(sharded, plain), of the same weights and singular vectors."""
    torch.manual_seed(0)
    plain = UNetDiscriminator(4)
    sharded = copy.deepcopy(plain)
    shard_between_steps(sharded, init_device_mesh("cpu", (1,)))
    return sharded, plain


def run_step(critic: UNetDiscriminator) -> list[Tensor]:
    """Two micro-batches, each with a gradient of one layer and a second derivative; those gradients."""
    gradients = []
    for seed in range(2):
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        unshard(critic)
        loss = critic(image).square().mean() + critic(-image).mean()
        gradients += torch.autograd.grad(loss, critic.last.weight, retain_graph=True)
        image.requires_grad_()
        (loss + r1_penalty(critic(image), image)).backward()
    reshard_with_gradients(critic)
    return gradients


def test_a_step_computes_the_same_as_of_a_plain_network() -> None:
    """Spectral norm included; the weights are shards before and after, and further steps start from these."""
    sharded, plain = networks()
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.01) for net in (sharded, plain)]
    for _ in range(2):
        for actual, expected in zip(run_step(sharded), run_step(plain), strict=True):
            assert torch.equal(actual, expected)
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert isinstance(ours, DTensor) and isinstance(ours.grad, DTensor) and theirs.grad is not None
            assert torch.equal(ours.grad.full_tensor(), theirs.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = full_state(sharded)
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-7)


def test_a_frozen_discriminator_passes_gradients_on() -> None:
    """Gradients reach the image and not the weights, which are trained again afterwards."""
    sharded, _ = networks()
    unshard(sharded)
    sharded.requires_grad_(False)
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    sharded(image).mean().backward()
    sharded.requires_grad_(True)
    assert image.grad is not None and image.grad.any()
    reshard_with_gradients(sharded)
    assert all(p.grad is None and p.requires_grad for p in sharded.parameters())


def test_a_dict_is_sharded_by_entries_and_a_plain_one_stays() -> None:
    parts = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)})
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    unshard(parts), reshard_with_gradients(parts)
    assert not any(isinstance(p, DTensor) for p in parts.parameters())
    for _ in range(2):  # Lightning may call it twice
        shard_between_steps(parts, init_device_mesh("cpu", (1,)))
    assert all(isinstance(p, DTensor) for p in parts.parameters())
    assert all(torch.equal(value, before[name]) for name, value in full_state(parts).items())


def test_values_in_place() -> None:
    layer = nn.Linear(3, 5)
    plain = nn.Parameter(torch.zeros(5, 3))
    shard_between_steps(layer, init_device_mesh("cpu", (1,)))
    value = torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    for parameter in (layer.weight, plain):
        assign(parameter, value)
        assert torch.equal(full_tensor(parameter), value.float()) and not full_tensor(parameter).requires_grad
