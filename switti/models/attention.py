"""Attention within a scale (non-causal) or to all scales up to one's own (causal), and to the caption.

No L×L mask exists here: a scale is one unmasked call on a slice (Section 3.3), or a sequence of one packed call.

Shape suffixes: B batch, L query tokens, M key tokens, T caption tokens, H heads, K head width, D = H·K,
C caption width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switti.models import cpu_tiles
from switti.models.cpu_attention import attend_by_products
from switti.models.kernels import Backend, attends_by_products, infers_in_tiles
from switti.models.norm import unit_layer_norm, unit_rms_norm
from switti.models.packed_attention import Packing, attend_packed
from switti.models.rope import rotate

QUERY_KEY_NORMS = {"layer": unit_layer_norm, "rms": unit_rms_norm}


@dataclass
class Rotation:
    """Rotary tables of the tokens at hand, each [L, K], or [B, L, K] where rows have different tokens."""

    cosine: Tensor
    sine: Tensor

    def rows(self, start: int, stop: int) -> "Rotation":
        return Rotation(self.cosine[start:stop], self.sine[start:stop])

    def take(self, tokens_BN: Tensor) -> "Rotation":
        """Of each row's own tokens, from tables of all."""
        return Rotation(F.embedding(tokens_BN, self.cosine), F.embedding(tokens_BN, self.sine))

    def complex(self) -> Tensor:
        """cosine + i·sine of each pair of channels, half as wide."""
        return torch.complex(self.cosine[..., ::2], self.sine[..., 1::2])


class KeyValueCache:
    """Keys and values of one block for all scales of a causal model, allocated once per call of the sampler.

    It is an argument that dies with the call. A smaller batch than the first one continues the first rows, as when
    guidance stops. Buffers for `length` tokens are allocated at the first scale, in the type in which attention
    computes.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.filled = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens and returns views of everything so far."""
        batch, heads, new, width = k_BHLK.shape
        if self.buffers is None:
            shape = (batch, heads, self.length, width)
            self.buffers = k_BHLK.new_empty(shape), v_BHLK.new_empty(shape)
        start, self.filled = self.filled, self.filled + new
        keys, values = (buffer[:batch, :, : self.filled] for buffer in self.buffers)
        keys[:, :, start:] = k_BHLK
        values[:, :, start:] = v_BHLK
        return keys, values

    @property
    def nbytes(self) -> int:
        """Size of the buffers allocated so far."""
        return sum(buffer.nbytes for buffer in self.buffers or ())


def attend(
    q_BHLK: Tensor,
    k_BHMK: Tensor,
    v_BHMK: Tensor,
    mask_B11M: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(q·k / √K)·v. mask_B11M: bool, True where a key is seen.

    As products in bfloat16 the scores are rounded to bfloat16, as in any unfused attention: an error of half a percent
    of the output, the size of bfloat16's own.
    """
    if attends_by_products(backend, q_BHLK):
        ranges = ((0, q_BHLK.shape[2], 0, k_BHMK.shape[2]),)
        return attend_by_products(q_BHLK, k_BHMK, v_BHMK, ranges, mask_B11M)
    return F.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, attn_mask=mask_B11M)


def attend_by_scale(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLK: Tensor,
    spans: tuple[tuple[int, int], ...],
    visibility: str,
    backend: Backend = "auto",
) -> Tensor:
    """All scales at once, as in training: one unmasked call per scale, on its own tokens or on its prefix."""
    causal = visibility == "causal"
    if attends_by_products(backend, q_BHLK):
        ranges = tuple((start, stop, 0 if causal else start, stop) for start, stop in spans)
        return attend_by_products(q_BHLK, k_BHLK, v_BHLK, ranges)
    sizes = [stop - start for start, stop in spans]
    queries = q_BHLK.split(sizes, dim=2)
    if causal:
        keys, values = ([t[:, :, :stop] for _, stop in spans] for t in (k_BHLK, v_BHLK))
    else:
        keys, values = (list(t.split(sizes, dim=2)) for t in (k_BHLK, v_BHLK))
    calls = zip(queries, keys, values, strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v) for q, k, v in calls]
    # A single scale, as in sampling, is not copied.
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


class SelfAttention(nn.Module):
    """Query-key-normalized self-attention with normalized rotary embedding."""

    def __init__(
        self, width: int, heads: int, visibility: str, query_key_norm: str, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.visibility = visibility
        self.backend: Backend = backend
        self.normalize = QUERY_KEY_NORMS[query_key_norm]
        self.to_qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x_BLD: Tensor,
        rotation: Rotation | None,
        spans: tuple[tuple[int, int], ...],
        cache: KeyValueCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """spans: token ranges of the scales in x, one scale when sampling; cache: a causal model's, when sampling;
        packing: of all scales, for the variable-length kernel."""
        if len(spans) == 1 and infers_in_tiles(self.backend, x_BLD):
            return self.in_tiles(x_BLD, rotation, cache)
        q, k, v = self.project(x_BLD, rotation)
        if cache is not None:
            k, v = cache.append(k, v)
        out = self.attend(q, k, v, spans, cache is not None, packing)
        return self.proj(out.transpose(1, 2).flatten(2))

    def in_tiles(self, x_BLD: Tensor, rotation: Rotation | None, cache: KeyValueCache | None) -> Tensor:
        """The same for one scale, see `cpu_tiles`."""
        batch, length, width = x_BLD.shape
        q, k, v = (x_BLD.new_empty(batch, self.heads, length, width // self.heads) for _ in range(3))
        table = None if rotation is None else rotation.complex().expand(batch, -1, -1)
        centered = self.normalize is unit_layer_norm
        factor, bounded = cpu_tiles.score_factor(width, q.shape[-1])
        for rows in cpu_tiles.row_groups(batch, length):
            parts = self.to_qkv(x_BLD[rows]).chunk(3, dim=-1)
            v[rows] = parts[2].unflatten(-1, (self.heads, -1)).transpose(1, 2)
            turns = None if table is None else table[rows]
            cpu_tiles.normalize_heads(parts[0], q[rows], centered, factor, turns)
            cpu_tiles.normalize_heads(parts[1], k[rows], centered, 1.0, turns)
        if cache is not None:
            k, v = cache.append(k, v)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = cpu_tiles.attend(q, k, v, None, bounded)
        return self.proj(cpu_tiles.join_heads(out, self.heads))

    def attend(
        self,
        q_BHLK: Tensor,
        k_BHMK: Tensor,
        v_BHMK: Tensor,
        spans: tuple[tuple[int, int], ...],
        cached: bool,
        packing: Packing | None = None,
    ) -> Tensor:
        """Values [B, H, L, K] of what each token sees: all keys of a cache, else those that its scale may see."""
        if cached:
            return attend(q_BHLK, k_BHMK, v_BHMK, backend=self.backend)
        if packing is not None:
            return attend_packed(q_BHLK, k_BHMK, v_BHMK, packing)
        return attend_by_scale(q_BHLK, k_BHMK, v_BHMK, spans, self.visibility, self.backend)

    def rotate(self, x_BLHK: Tensor, rotation: Rotation) -> Tensor:
        return rotate(x_BLHK, rotation.cosine, rotation.sine)

    def project(self, x_BLD: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized and rotated queries and keys, and values, each [B, H, L, K]."""
        q, k, v = self.to_qkv(x_BLD).chunk(3, dim=-1)
        # Normalized over the full width, before the split into heads.
        q, k = (self.normalize(t).to(v.dtype).unflatten(-1, (self.heads, -1)) for t in (q, k))
        if rotation is not None:
            q, k = (self.rotate(t, rotation) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention to the caption; keys and values are computed once per caption and passed in."""

    def __init__(
        self, width: int, heads: int, text_width: int, query_key_norm: str, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.backend: Backend = backend
        self.normalize = QUERY_KEY_NORMS[query_key_norm]
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(text_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def project_text(self, text_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the caption, each [B, H, T, K]."""
        k, v = self.to_kv(text_BTC).chunk(2, dim=-1)
        k = self.normalize(k).to(v.dtype)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (k, v))

    def project_tokens(self, x_BLD: Tensor) -> Tensor:
        """Normalized queries [B, H, L, K]."""
        q = self.to_q(x_BLD)
        return self.normalize(q).to(q.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def in_tiles(self, x_BLD: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """The same, see `cpu_tiles`."""
        batch, length, width = x_BLD.shape
        q = x_BLD.new_empty(batch, self.heads, length, width // self.heads)
        centered = self.normalize is unit_layer_norm
        factor, bounded = cpu_tiles.score_factor(width, q.shape[-1])
        for rows in cpu_tiles.row_groups(batch, length):
            cpu_tiles.normalize_heads(self.to_q(x_BLD[rows]), q[rows], centered, factor, None)
        visible = None
        if mask_B11T is not None and not bool(mask_B11T.all()):
            visible = mask_B11T.expand(-1, self.heads, -1, -1).flatten(0, 1)
        q, k, v = (t.flatten(0, 1) for t in (q, k_BHTK, v_BHTK))
        out = cpu_tiles.attend(q, k, v, visible, bounded)
        return self.proj(cpu_tiles.join_heads(out, self.heads))

    def forward(self, x_BLD: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask_B11T: Tensor | None) -> Tensor:
        if infers_in_tiles(self.backend, x_BLD):
            return self.in_tiles(x_BLD, k_BHTK, v_BHTK, mask_B11T)
        out = attend(self.project_tokens(x_BLD), k_BHTK, v_BHTK, mask_B11T, self.backend)
        return self.proj(out.transpose(1, 2).flatten(2))
