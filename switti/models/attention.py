"""Attention within a scale (non-causal) or to all scales up to one's own (causal), and to the caption.

No L×L mask exists here: a scale is one unmasked call on a slice (Section 3.3).

Shape suffixes: B batch, L query tokens, M key tokens, T caption tokens, H heads, K head width, D = H·K,
C caption width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switti.models.cpu_attention import attend_by_products
from switti.models.kernels import uses_cpu_kernels
from switti.models.norm import unit_layer_norm, unit_rms_norm
from switti.models.rope import rotate

QUERY_KEY_NORMS = {"layer": unit_layer_norm, "rms": unit_rms_norm}


@dataclass
class Rotation:
    """Rotary tables of the tokens at hand, each [L, K]."""

    cosine: Tensor
    sine: Tensor

    def rows(self, start: int, stop: int) -> "Rotation":
        return Rotation(self.cosine[start:stop], self.sine[start:stop])


class KeyValueCache:
    """Keys and values of one block for all scales of a causal model, allocated once per call of the sampler.

    It is an argument that dies with the call. A smaller batch than the first one continues the first rows, as when
    guidance stops. Room for `length` tokens is made at the first scale, in the type in which attention computes.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled = 0
        self._room: tuple[Tensor, Tensor] | None = None

    def append(self, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens and returns views of everything so far."""
        batch, heads, new, width = k_BHLK.shape
        if self._room is None:
            shape = (batch, heads, self.length, width)
            self._room = k_BHLK.new_empty(shape), v_BHLK.new_empty(shape)
        start, self.filled = self.filled, self.filled + new
        keys, values = (room[:batch, :, : self.filled] for room in self._room)
        keys[:, :, start:] = k_BHLK
        values[:, :, start:] = v_BHLK
        return keys, values

    @property
    def nbytes(self) -> int:
        """Size of the room made so far."""
        return sum(room.nbytes for room in self._room or ())


def use_products(q: Tensor) -> bool:
    """Whether batched products are faster than the fused kernel: in bfloat16 on a CPU."""
    return q.dtype == torch.bfloat16 and uses_cpu_kernels(q)


def attend(q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask_B11M: Tensor | None = None) -> Tensor:
    """softmax(q·k / √K)·v. mask_B11M: bool, True where a key is seen.

    On a CPU in bfloat16 the scores are rounded to bfloat16, as any unfused attention does: an error of half a percent
    of the output, the size of bfloat16's own.
    """
    if use_products(q_BHLK):
        ranges = ((0, q_BHLK.shape[2], 0, k_BHMK.shape[2]),)
        return attend_by_products(q_BHLK, k_BHMK, v_BHMK, ranges, mask_B11M)
    return F.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, attn_mask=mask_B11M)


def attend_by_scale(
    q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, spans: tuple[tuple[int, int], ...], visibility: str
) -> Tensor:
    """All scales at once, as in training: one unmasked call a scale on its own tokens or on its prefix."""
    causal = visibility == "causal"
    if use_products(q_BHLK):
        ranges = tuple((start, stop, 0 if causal else start, stop) for start, stop in spans)
        return attend_by_products(q_BHLK, k_BHLK, v_BHLK, ranges)
    sizes = [stop - start for start, stop in spans]
    queries = q_BHLK.split(sizes, dim=2)
    if causal:
        keys, values = ([t[:, :, :stop] for _, stop in spans] for t in (k_BHLK, v_BHLK))
    else:
        keys, values = (list(t.split(sizes, dim=2)) for t in (k_BHLK, v_BHLK))
    calls = zip(queries, keys, values, strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in calls], dim=2)


class SelfAttention(nn.Module):
    """Query-key-normalised self-attention with normalised rotary embedding."""

    def __init__(self, width: int, heads: int, visibility: str, query_key_norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.visibility = visibility
        self.normalise = QUERY_KEY_NORMS[query_key_norm]
        self.to_qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x_BLD: Tensor,
        rotation: Rotation | None,
        spans: tuple[tuple[int, int], ...],
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """spans: token ranges of the scales in x, one scale when sampling; cache: a causal model's, when sampling."""
        q, k, v = self.project(x_BLD, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
            out = attend(q, k, v)
        else:
            out = attend_by_scale(q, k, v, spans, self.visibility)
        return self.proj(out.transpose(1, 2).flatten(2))

    def rotate(self, x_BLHK: Tensor, rotation: Rotation) -> Tensor:
        return rotate(x_BLHK, rotation.cosine, rotation.sine)

    def project(self, x_BLD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated queries and keys, and values, each [B, H, L, K]."""
        q, k, v = self.to_qkv(x_BLD).chunk(3, dim=-1)
        # Normalised over the full width, before the split into heads.
        q, k = (self.normalise(t).to(v.dtype).unflatten(-1, (self.heads, -1)) for t in (q, k))
        if rotation is not None:
            q, k = (self.rotate(t, rotation) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention to the caption; keys and values are computed once a caption and passed in."""

    def __init__(self, width: int, heads: int, text_width: int, query_key_norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.normalise = QUERY_KEY_NORMS[query_key_norm]
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(text_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def project_text(self, text_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the caption, each [B, H, T, K]."""
        k, v = self.to_kv(text_BTC).chunk(2, dim=-1)
        k = self.normalise(k).to(v.dtype)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (k, v))

    def project_tokens(self, x_BLD: Tensor) -> Tensor:
        """Normalised queries [B, H, L, K]."""
        q = self.to_q(x_BLD)
        return self.normalise(q).to(q.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x_BLD: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_B11T: Tensor | None) -> Tensor:
        out = attend(self.project_tokens(x_BLD), k_BHTK, v_BHTK, mask_B11T)
        return self.proj(out.transpose(1, 2).flatten(2))
