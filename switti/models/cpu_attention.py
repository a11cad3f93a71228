"""CPU attention in bfloat16: batched matrix products in pieces that stay in the cache.

The fused kernel's many small products are 1.3 to 8 times slower there (`python -m experiments.bench`).

Shape suffixes: N = batch · heads, L query tokens, M key tokens, K head width; n, m tokens of one piece.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Scores computed at a time: 8 MiB in bfloat16.
PIECE = 2**22
# Attention weights kept for the backward pass in one call; above this they are computed again. 64 MiB in bfloat16.
KEPT = 2**25

# (first query, end of queries, first key, end of keys)
Range = tuple[int, int, int, int]


def pieces(ranges: tuple[Range, ...], rows: int) -> Iterator[tuple[slice, slice, slice]]:
    """(rows of N, queries, keys) of at most PIECE scores, where one query's scores are fewer than that."""
    for first_query, end_query, first_key, end_key in ranges:
        keys = slice(first_key, end_key)
        queries = max(1, min(end_query - first_query, PIECE // (end_key - first_key)))
        complete = queries == end_query - first_query
        group = max(1, min(rows, PIECE // (queries * (end_key - first_key)))) if complete else 1
        for row in range(0, rows, group):
            for query in range(first_query, end_query, queries):
                yield slice(row, row + group), slice(query, min(end_query, query + queries)), keys


def scores_of(ranges: tuple[Range, ...], rows: int) -> int:
    return rows * sum((b - a) * (d - c) for a, b, c, d in ranges)


class ProductAttention(torch.autograd.Function):
    """softmax(q·k / √K)·v for each range of queries and keys; scores are rounded to the inputs' type.

    q [N, L, K], k and v [N, M, K]; every query belongs to one range. visible: bool [N, 1, M], True where a key counts,
    or None. Returns [N, L, K]. Memory: KEPT weights at most, else one piece at a time; nothing grows with L².
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        ranges: tuple[Range, ...],
        keep: bool,
    ) -> Tensor:
        out = torch.empty_like(q)
        keep = keep and scores_of(ranges, len(q)) <= KEPT
        kept: list[Tensor] = []
        scaled = q * q.shape[-1] ** -0.5
        for rows, queries, keys in pieces(ranges, len(q)):
            weights = _weights(scaled, k, visible, rows, queries, keys)
            out[rows, queries] = torch.bmm(weights, v[rows, keys])
            if keep:
                kept.append(weights)
        ctx.save_for_backward(scaled, k, v, *([] if visible is None else [visible]), *kept)
        ctx.ranges, ctx.keep, ctx.masked = ranges, keep, visible is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled, k, v, *rest = ctx.saved_tensors
        visible = rest.pop(0) if ctx.masked else None
        gradient = gradients[0].contiguous()
        factor = k.shape[-1] ** -0.5
        # In float32, for many pieces add to the same keys; transposed, for aᵀ·w reads the large matrix w along its rows
        # and so takes up to a third less than wᵀ·a.
        exact = torch.promote_types(k.dtype, torch.float32)
        dq, (dk_NKM, dv_NKM) = (
            torch.empty_like(scaled),
            (k.new_zeros(k.mT.shape, dtype=exact) for _ in range(2)),
        )
        with torch.autocast(k.device.type, enabled=False):
            for i, (rows, queries, keys) in enumerate(pieces(ctx.ranges, len(k))):
                weights = rest[i] if ctx.keep else _weights(scaled, k, visible, rows, queries, keys)
                above = gradient[rows, queries]
                dv_NKM[rows, :, keys] += torch.bmm(above.mT, weights)
                of_weights = torch.bmm(above, v[rows, keys].mT)
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                dq[rows, queries] = torch.bmm(of_scores, k[rows, keys]).mul_(factor)
                dk_NKM[rows, :, keys] += torch.bmm(scaled[rows, queries].mT, of_scores)
        return dq, dk_NKM.mT.to(k.dtype), dv_NKM.mT.to(v.dtype), None, None, None


def _weights(
    scaled: Tensor, k: Tensor, visible: Tensor | None, rows: slice, queries: slice, keys: slice
) -> Tensor:
    """Attention weights of one piece [rows, n, m]."""
    scores = torch.bmm(scaled[rows, queries], k[rows, keys].mT)
    if visible is not None:
        scores = scores.masked_fill_(~visible[rows, :, keys], -torch.inf)
    return scores.softmax(dim=-1)


def attend_by_products(
    q_BHLK: Tensor,
    k_BHMK: Tensor,
    v_BHMK: Tensor,
    ranges: tuple[Range, ...],
    visible_B11M: Tensor | None = None,
) -> Tensor:
    """[B, H, L, K]: see `ProductAttention`."""
    batch, heads, length, width = q_BHLK.shape
    visible = None
    if visible_B11M is not None:
        visible = visible_B11M.expand(-1, heads, -1, -1).flatten(0, 1)
    q, k, v = (t.reshape(batch * heads, -1, width).contiguous() for t in (q_BHLK, k_BHMK, v_BHMK))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        out = ProductAttention.apply(q, k, v, visible, ranges, keep)
    return out.view(batch, heads, length, width)
