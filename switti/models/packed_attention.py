"""Variable-length attention over scales: the scales of all images are packed sequences of one kernel call.

A non-causal model's tokens [B, L] are such a packing as they lie. For a causal one each scale's keys are its prefix,
so that keys and values are copied prefix by prefix; the queries stay as they are.

Shape suffixes: B images, L tokens of all scales, M keys of all scales (L, or the sum of the prefixes), H heads, K head
width, S = B · scales sequences.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from switti.models import kernels

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packing:
    """Where each scale of each image begins among queries and keys, int32 [S + 1], and the longest of them.

    prefixes: ends of the prefixes that the keys consist of; None: the keys are the tokens.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    prefixes: tuple[int, ...] | None

    @classmethod
    def of(cls, spans: Spans, visibility: str, batch: int, device: torch.device) -> "Packing":
        sizes = tuple(stop - start for start, stop in spans)
        prefixes = tuple(stop for _, stop in spans) if visibility == "causal" else None
        lengths = prefixes or sizes

        def offsets(of_image: tuple[int, ...]) -> Tensor:
            return torch.tensor([0, *accumulate(of_image * batch)], dtype=torch.int32, device=device)

        return cls(offsets(sizes), offsets(lengths), max(sizes), max(lengths), prefixes)


class Prefixes(torch.autograd.Function):
    """[B, L, …] → [B, M, …]: the first tokens up to each of `ends`, one prefix after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: tuple[int, ...]) -> Tensor:
        ctx.length, ctx.ends = x.shape[1], ends
        return torch.cat([x[:, :end] for end in ends], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        dx = gradient.new_zeros(len(gradient), ctx.length, *gradient.shape[2:])
        for part, end in zip(gradient.split(ctx.ends, dim=1), ctx.ends, strict=True):
            dx[:, :end] += part
        return dx, None


def attend_packed(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, packing: Packing) -> Tensor:
    """softmax(q·k / √K)·v of every scale with its own tokens or its prefix, [B, H, L, K], in one call."""
    batch, _, length, _ = q_BHLK.shape
    q, k, v = (t.transpose(1, 2) for t in (q_BHLK, k_BHLK, v_BHLK))
    if packing.prefixes is not None:
        k, v = (Prefixes.apply(t, packing.prefixes) for t in (k, v))
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    offsets = packing.queries, packing.keys, packing.longest_query, packing.longest_key
    out = cast(Tensor, kernels.varlen_attn(q, k, v, *offsets))
    return out.unflatten(0, (batch, length)).transpose(1, 2)
