"""Inference on a CPU in tiles: between two matrix products, arithmetic is float32 on pieces that stay in the cache.

PyTorch's elementwise kernels are several times faster in float32 than in bfloat16, and whole tensors of a fine scale
fit no cache. Any precision works; `switti.models.kernels.infers_in_tiles` says where this path is taken.

Shape suffixes: B batch, L query tokens, M key tokens, H heads, K head width, D = H·K; N = batch · heads.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from switti.models.norm import pieces

# Tokens whose products are computed at a time: enough for full speed, few enough for their results to stay in cache.
TOKENS = 2048
# Attention scores computed at a time: 2 MiB in bfloat16.
SCORES = 2**20
EPS = 1e-6


def row_groups(batch: int, length: int) -> Iterator[slice]:
    """Slices of the batch of about TOKENS tokens."""
    count = max(1, TOKENS // length)
    for start in range(0, batch, count):
        yield slice(start, min(batch, start + count))


def normalize_heads(
    x_BLD: Tensor, out_BHLK: Tensor, centered: bool, factor: float, table_BLK: Tensor | None
) -> None:
    """Writes LayerNorm (centered) or RMSNorm of x without gain, times `factor`, rotated and split into heads.

    table_BLK: complex rotary table [B, L, K / 2], None for no rotation. x may be overwritten.
    """
    width, heads = x_BLD.shape[-1], out_BHLK.shape[1]
    exact = torch.promote_types(x_BLD.dtype, torch.float32)
    for rows, tokens in pieces(*x_BLD.shape):
        wide = x_BLD[rows, tokens].to(exact)
        if centered:
            wide = wide.sub_(wide.mean(dim=-1, keepdim=True))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(width).add_(EPS).rsqrt_().mul_(factor)
        if table_BLK is None:
            wide.mul_(scale)
        else:
            pairs = torch.view_as_complex(wide.unflatten(-1, (heads, -1, 2)))
            pairs.mul_((table_BLK[rows, tokens] * scale)[:, :, None])
        # First narrowed, then transposed: in one step the copy takes twice as long.
        narrow = wide.to(out_BHLK.dtype)
        out_BHLK[rows, :, tokens] = narrow.unflatten(-1, (heads, -1)).transpose(1, 2)


def score_factor(width: int, head_width: int) -> tuple[float, bool]:
    """(factor of the queries, whether `attend` may take powers of two without subtracting the largest score).

    Queries and keys are normalized over all heads, so that no score exceeds D / √K: up to 64 nats, neither the powers
    nor their sums leave float32's range, and scores are taken in bits.
    """
    factor = head_width**-0.5
    bounded = width * factor <= 64.0
    return (factor * math.log2(math.e) if bounded else factor), bounded


def attend(
    scaled_NLK: Tensor, k_NMK: Tensor, v_NMK: Tensor, visible_N1M: Tensor | None, bounded: bool
) -> Tensor:
    """softmax(q·k / √K)·v, [N, L, K]; q is scaled, see `score_factor`. visible: bool, True where a key is seen."""
    rows, length, _ = scaled_NLK.shape
    out_NLK = torch.empty_like(scaled_NLK)
    step = max(1, SCORES // k_NMK.shape[1])
    group = max(1, step // length)
    for row in range(0, rows, group):
        some = slice(row, row + group)
        for start in range(0, length, step):
            part = out_NLK[some, start : start + step]
            scores = torch.bmm(scaled_NLK[some, start : start + step], k_NMK[some].mT)
            if visible_N1M is not None:
                scores.masked_fill_(~visible_N1M[some], -torch.inf)
            if bounded:
                torch.bmm(scores.exp2_(), v_NMK[some], out=part)
                # Summed in float32 and rounded once, without `dtype`, which would convert every score first.
                part.div_(scores.sum(dim=-1, keepdim=True))
            else:
                torch.bmm(scores.softmax(dim=-1), v_NMK[some], out=part)
    return out_NLK


def join_heads(out_NLK: Tensor, heads: int) -> Tensor:
    """[B, L, D]."""
    return out_NLK.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def swiglu(
    x_BLD: Tensor,
    gate: Callable[[Tensor], Tensor],
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
) -> Tensor:
    """down(SiLU(gate(x)) · up(x)), some tokens at a time."""
    out_BLD = torch.empty_like(x_BLD)
    tokens = zip(*(t.flatten(0, 1).split(TOKENS) for t in (x_BLD, out_BLD)), strict=True)
    for given, out in tokens:
        out.copy_(down(F.silu(gate(given), inplace=True).mul_(up(given))))
    return out_BLD
