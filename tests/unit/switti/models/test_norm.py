"""RMSNorm with its modulation and residual sum, against the formula and finite differences."""

import pytest
import torch
from torch import Tensor

from switti.models import norm as norms
from switti.models.norm import LayerNorm, NoNorm, RMSNorm


def formula(x: Tensor, gain: Tensor, addend: Tensor | None, eps: float = 1e-6) -> Tensor:
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain
    return out if addend is None else out + addend


def norm_of(width: int) -> RMSNorm:
    norm = RMSNorm(width).double()
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("piece", [1, 12, 2**18])
@pytest.mark.parametrize("addend_rows", [None, 1, 5])
@pytest.mark.parametrize("modulated", [False, True])
def test_values_and_gradients(
    modulated: bool, addend_rows: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of one token, of two, and of several images."""
    monkeypatch.setattr(norms, "PIECE", piece)
    torch.manual_seed(0)
    norm = norm_of(6)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True) if modulated else None
    rows = addend_rows
    addend = None if rows is None else torch.randn(2, rows, 6, dtype=torch.float64, requires_grad=True)
    gain = norm.weight if factor is None else norm.weight * factor
    torch.testing.assert_close(norm(x, factor, addend), formula(x, gain, addend), atol=1e-13, rtol=0)
    given = tuple(t for t in (x, factor, addend, norm.weight) if t is not None)
    assert torch.autograd.gradcheck(lambda *_: norm(x, factor, addend), given, atol=1e-7)


def test_rows_of_zeros_have_finite_gradients() -> None:
    norm = norm_of(4)
    x = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


def test_types_under_autocast() -> None:
    """Towards a matrix product: autocast's type; into the residual stream: the stream's type."""
    norm, x, gate = RMSNorm(8), torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        assert norm(x, gate, gate).dtype == torch.bfloat16
        assert norm(x.bfloat16(), gate, x).dtype == torch.float32
    assert norm(x.bfloat16()).dtype == torch.float32
    assert norm.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_under_autocast_are_close_to_exact_ones() -> None:
    torch.manual_seed(0)
    norm, residual = RMSNorm(64), torch.randn(2, 9, 64, requires_grad=True)
    x, gate = torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 1, 64, requires_grad=True)
    above = torch.randn(2, 9, 64)
    given = (x, gate, residual, norm.weight)
    exact = torch.autograd.grad(formula(x, norm.weight * gate, residual), given, above)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x.bfloat16(), gate, residual)
    for found, expected in zip(torch.autograd.grad(out, given, above), exact, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("norm", [LayerNorm(6, eps=1e-6), NoNorm()])
def test_other_norms_take_the_same_arguments(norm: torch.nn.Module) -> None:
    x, factor, addend = torch.randn(2, 3, 6), torch.randn(2, 1, 6), torch.randn(2, 3, 6)
    torch.testing.assert_close(norm(x, factor, addend), addend + norm(x) * factor)
    torch.testing.assert_close(norm(x, factor), norm(x) * factor)
    torch.testing.assert_close(norm(x, None, addend), norm(x) + addend)


def test_the_backend_chooses_the_kernel() -> None:
    """On a CPU in pieces; fused in one piece, whatever the size, and with the same values."""
    x = torch.randn(2, 5, 8, requires_grad=True)
    auto, fused, products = (RMSNorm(8, backend=backend)(x) for backend in ("auto", "fused", "products"))
    in_pieces = ["ModulatedRMS" in type(y.grad_fn).__name__ for y in (auto, fused, products)]
    assert in_pieces == [True, False, True]
    torch.testing.assert_close(fused, auto)
