"""Attention maps while sampling (Figures 7 and 13), recorded by hooks; ordinary sampling runs none of this.

Attention is computed a second time from what the layers receive, a piece at a time; only means leave a piece.

Shape suffixes: B images, H heads, P tokens of one scale, T caption tokens, M keys, N scales, K head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from switti.models.attention import CrossAttention, SelfAttention
from switti.models.transformer import ScaleTransformer
from switti.scales import Pyramid

QUERIES_AT_A_TIME = 256


class CaptionAttention:
    """Mean attention of each scale's tokens to each caption token, over heads, tokens and blocks."""

    def __init__(self, images: int) -> None:
        self.images = images
        self._by_block: dict[CrossAttention, list[Tensor]] = {}

    def note(self, layer: CrossAttention, arguments: tuple[Any, ...]) -> None:
        """One call of a layer: the tokens of one scale, conditional rows first."""
        x, k, _, mask = arguments
        q_BHPK = layer.project_tokens(x[: self.images]).float()
        k_BHTK = k[: self.images].float()
        scores_BHPT = q_BHPK @ k_BHTK.transpose(-1, -2) * q_BHPK.shape[-1] ** -0.5
        if mask is not None:
            scores_BHPT = scores_BHPT.masked_fill(~mask[: self.images], -torch.inf)
        self._by_block.setdefault(layer, []).append(scores_BHPT.softmax(-1).mean(dim=(1, 2)).cpu())

    def result(self) -> Tensor:
        """[N, B, T]; each row sums to 1."""
        return torch.stack([torch.stack(calls) for calls in self._by_block.values()]).mean(0)


class ScaleAttention:
    """Share of each scale's self-attention that goes to each scale, over heads, tokens, images and blocks."""

    def __init__(self, pyramid: Pyramid, images: int) -> None:
        self.pyramid = pyramid
        self.images = images
        self._keys: dict[SelfAttention, list[Tensor]] = {}
        self._shares: dict[SelfAttention, list[Tensor]] = {}

    def note(self, layer: SelfAttention, arguments: tuple[Any, ...]) -> None:
        """One call of a layer: the tokens of one scale. A causal layer sees the keys of its earlier calls, too."""
        q_BHPK, k_BHPK, _ = layer.project(arguments[0][: self.images], arguments[1])
        keys = self._keys.setdefault(layer, [])
        scale = len(keys)
        keys.append(k_BHPK)
        first = 0 if layer.visibility == "causal" else scale
        k_BHMK = torch.cat(keys[first:], dim=2).float()
        sizes = self.pyramid.sizes[first : scale + 1]
        shares = torch.zeros(self.pyramid.count)
        for piece in q_BHPK.float().split(QUERIES_AT_A_TIME, dim=2):
            weights = (piece @ k_BHMK.transpose(-1, -2) * piece.shape[-1] ** -0.5).softmax(-1)
            for k, part in enumerate(weights.split(sizes, dim=-1), start=first):
                shares[k] += part.sum(-1).mean(dim=(0, 1)).sum().cpu()
        self._shares.setdefault(layer, []).append(shares / q_BHPK.shape[2])

    def result(self) -> Tensor:
        """[N, N]: row i is how scale i divides its attention; each row sums to 1."""
        return torch.stack([torch.stack(calls) for calls in self._shares.values()]).mean(0)


@contextmanager
def recording(model: ScaleTransformer, recorder: CaptionAttention | ScaleAttention) -> Iterator[None]:
    """Lets `recorder` see every call of its kind of layer."""
    layers = [
        block.cross_attn if isinstance(recorder, CaptionAttention) else block.attn
        for block in model.typed_blocks
    ]
    handles = [layer.register_forward_pre_hook(recorder.note) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
