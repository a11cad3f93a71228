"""Cross-entropy with the head, chunk by chunk, against the plain formulation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from switti.losses.cross_entropy import head_losses, token_losses

WIDTH, VOCABULARY = 12, 37


def case(dtype: torch.dtype, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    return head, 3 * torch.randn(3, 17, WIDTH).to(dtype), torch.randint(VOCABULARY, (3, 17))


def results(losses: Any, head: nn.Linear, x: Tensor, weight: float) -> list[Tensor]:
    """Mean of the losses, and gradients of `weight` times it."""
    head.zero_grad()
    x = x.clone().requires_grad_()
    mean = losses(head, x)
    (weight * mean).backward()
    return [mean.detach(), x.grad, *(p.grad for p in head.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 7, 51, 100])
def test_loss_and_gradients_are_those_of_the_plain_formulation(
    bias: bool, smoothing: float, rows: int
) -> None:
    head, x, tokens = case(torch.float64, bias)

    def plain(head: nn.Linear, x: Tensor) -> Tensor:
        return token_losses(head(x), tokens, smoothing).mean()

    def chunked(head: nn.Linear, x: Tensor) -> Tensor:
        return head_losses(head, x, tokens, smoothing, chunk=rows * VOCABULARY).mean

    for expected, actual in zip(results(plain, head, x, 0.3), results(chunked, head, x, 0.3), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_losses_and_hits_of_each_token_are_those_of_the_plain_formulation() -> None:
    head, x, tokens = case(torch.float64)
    tokens[0] = head(x)[0].argmax(dim=-1)
    losses = head_losses(head, x, tokens, 0.1, chunk=10 * VOCABULARY)
    torch.testing.assert_close(losses.tokens_BL, token_losses(head(x), tokens, 0.1), rtol=0, atol=1e-14)
    assert torch.equal(losses.correct_BL, head(x).argmax(dim=-1) == tokens)
    assert not losses.tokens_BL.requires_grad and losses.correct_BL[0].all()
    with torch.no_grad():
        assert not head_losses(head, x, tokens).mean.requires_grad


@pytest.mark.parametrize("autocast", [True, False])
def test_the_head_runs_in_the_precision_of_its_surroundings(autocast: bool) -> None:
    """bfloat16 under autocast, else the weights' own; gradients have the weights' type."""
    head, x, tokens = case(torch.float32)

    def plain(head: nn.Linear, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return token_losses(head(x), tokens).mean()

    def chunked(head: nn.Linear, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return head_losses(head, x, tokens, chunk=20 * VOCABULARY).mean

    expected, actual = results(plain, head, x, 1.0), results(chunked, head, x, 1.0)
    # The logits are the same to the last bit, also where they are rounded.
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-6)
    rounding = 2e-2 if autocast else 1e-5
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= rounding * b.norm()


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *made, 0) if made else self.elements
        return result


def test_no_tensor_holds_the_logits_of_all_tokens() -> None:
    head, x, tokens = case(torch.float32)
    with Largest() as largest:
        head_losses(head, x.requires_grad_(), tokens, chunk=20 * VOCABULARY).mean.backward()
    assert largest.elements <= max(20 * VOCABULARY, x.numel())
    with Largest() as largest:
        token_losses(head(x), tokens).mean().backward()
    assert largest.elements == tokens.numel() * VOCABULARY
