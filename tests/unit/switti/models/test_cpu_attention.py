"""Attention by batched products, in pieces, against PyTorch's kernel and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switti.models import cpu_attention as products
from switti.models.cpu_attention import attend_by_products, pieces

CAUSAL = ((0, 1, 0, 1), (1, 5, 0, 5), (5, 14, 0, 14))
NON_CAUSAL = ((0, 1, 0, 1), (1, 5, 1, 5), (5, 14, 5, 14))


def inputs(length: int = 14, keys: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = (length, keys or length, keys or length)
    return [torch.randn(2, 3, size, 8, dtype=dtype, requires_grad=True) for size in sizes]


def reference(q: Tensor, k: Tensor, v: Tensor, ranges: tuple[products.Range, ...]) -> Tensor:
    mask = torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    for a, b, c, d in ranges:
        mask[a:b, c:d] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("piece", [7, 40, 2**22])
@pytest.mark.parametrize("kept", [0, 2**25])
@pytest.mark.parametrize("ranges", [CAUSAL, NON_CAUSAL])
def test_values_and_gradients(
    ranges: tuple[products.Range, ...], kept: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of a piece, and whether weights are kept or computed again."""
    monkeypatch.setattr(products, "PIECE", piece)
    monkeypatch.setattr(products, "KEPT", kept)
    qkv = inputs()
    above = torch.randn(2, 3, 14, 8, dtype=torch.float64)
    found, expected = attend_by_products(*qkv, ranges), reference(*qkv, ranges)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(found, qkv, above), torch.autograd.grad(expected, qkv, above), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_captions_of_different_lengths() -> None:
    qkv = inputs(keys=6)
    visible_B11M = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    found = attend_by_products(*qkv, ((0, 14, 0, 6),), visible_B11M)
    expected = F.scaled_dot_product_attention(*qkv, attn_mask=visible_B11M)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad(found.sum(), qkv), torch.autograd.grad(expected.sum(), qkv), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_pieces_cover_every_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", 30)
    seen = torch.zeros(6, 14, dtype=torch.int64)
    for rows, queries, keys in pieces(CAUSAL, 6):
        seen[rows, queries] += 1
        cells = seen[rows, queries].numel() * (keys.stop - keys.start)
        assert cells <= 30 or queries.stop - queries.start == 1
    assert (seen == 1).all()


def test_bfloat16_error_is_that_of_its_rounding() -> None:
    exact = inputs(length=64)
    ranges = ((0, 64, 0, 64),)
    half = [t.detach().bfloat16().requires_grad_() for t in exact]
    found, expected = attend_by_products(*half, ranges), reference(*exact, ranges)
    assert (found.double() - expected).norm() < 0.01 * expected.norm()
    above = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, half, above.bfloat16()),
        torch.autograd.grad(expected, exact, above),
        strict=True,
    ):
        assert (a.double() - b).norm() < 0.02 * b.norm()
