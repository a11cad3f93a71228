"""Token pruning at the last scales, without training (FastVAR, Guo et al. 2025, arXiv 2503.23367).

At a pruned scale each sub-layer is computed for the tokens whose input lies farthest from the mean over the map. The
others add what the sub-layer added at the last scale that was computed in full, interpolated to their map.

Shape suffixes: B rows, P tokens of one scale, N tokens that are computed, D width, T caption tokens, K head width.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from switti.models.attention import KeyValueCache, Rotation
from switti.models.block import Block, BlockCondition

# (input of a sub-layer, numbers of its tokens [B, N] or None for all tokens) → the input plus what it adds.
SubLayer = Callable[[Tensor, Tensor | None], Tensor]


def farthest_tokens(x_BPD: Tensor, count: int, images: int) -> Tensor:
    """Numbers of the `count` tokens that lie farthest from the mean over the map, ascending, int64 [B, count].

    Among equally distant ones, lower numbers go first. Conditional and unconditional row of an image (rows b and
    images + b) get the same tokens, by the sum of their distances: guidance multiplies the difference of the two rows,
    and with it the error of interpolating only one of them.
    """
    exact = torch.promote_types(x_BPD.dtype, torch.float32)
    mean_B1D = x_BPD.mean(dim=1, keepdim=True, dtype=exact)
    distance_BP = torch.linalg.vector_norm(x_BPD - mean_B1D, dim=-1).square()
    if len(x_BPD) > images:
        distance_BP = distance_BP.unflatten(0, (-1, images)).sum(0).repeat(len(x_BPD) // images, 1)
    order_BP = distance_BP.argsort(dim=-1, descending=True, stable=True)
    return order_BP[:, :count].sort(dim=-1).values


def resize_map(x_BPD: Tensor, size: int) -> Tensor:
    """A square map of tokens as one of `size` tokens, by area interpolation."""
    side, target = int(x_BPD.shape[1] ** 0.5 + 0.5), int(size**0.5 + 0.5)
    x_BDHW = x_BPD.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return F.interpolate(x_BDHW, (target, target), mode="area").permute(0, 2, 3, 1).flatten(1, 2)


class TokenPruning:
    """Which tokens are computed, and what sub-layers added before: the state of one call of the sampler.

    It is an argument that dies with the call. All shapes follow from the settings, so that no step waits for the host.

    counts: pruned scale → number of its tokens that are computed. first_block: blocks before it are computed in full.
    images: rows beyond that number are the unconditional ones.
    """

    def __init__(self, counts: Mapping[int, int], first_block: int, images: int) -> None:
        self.counts = dict(counts)
        self.first_block = first_block
        self.images = images
        # Of the scale that runs: None if it is computed in full.
        self.count: int | None = None
        # Rows of the last scale in full whose sub-layers' sums are kept, and those sums by (block, sub-layer).
        self.rows = 0
        self.added: dict[tuple[int, int], Tensor] = {}

    def begin_scale(self, scale: int, rows: int) -> bool:
        """Whether blocks from `first_block` on must run through `advance` at this scale.

        A scale with more rows than were kept, as where guidance begins late, is computed in full.
        """
        self.count = self.counts.get(scale) if rows <= self.rows else None
        keeps = self.count is None and scale + 1 in self.counts
        if keeps:
            self.rows = rows
        return keeps or self.count is not None

    def forget(self) -> None:
        """Compute the next scale in full: what was added before belongs to another caption."""
        self.rows = 0
        self.added.clear()

    def advance(
        self,
        number: int,
        block: Block,
        x_BPD: Tensor,
        condition: BlockCondition,
        mask_B11T: Tensor | None,
        rotation: Rotation | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """`Block.advance` for one scale, by block `number` of the model.

        Only tokens that are computed have keys and values: a causal model's later scales see no others.
        """

        def attend(x: Tensor, tokens: Tensor | None) -> Tensor:
            turned = rotation if rotation is None or tokens is None else rotation.take(tokens)
            return block.add_self_attention(x, condition, turned, ((0, x.shape[1]),), cache)

        def attend_to_caption(x: Tensor, _: Tensor | None) -> Tensor:
            return block.add_cross_attention(x, condition, mask_B11T)

        def feed_forward(x: Tensor, _: Tensor | None) -> Tensor:
            return block.add_feed_forward(x, condition)

        x = x_BPD
        for place, layer in enumerate((attend, attend_to_caption, feed_forward)):
            x = self._run(layer, (number, place), x)
        return x

    def _run(self, layer: SubLayer, key: tuple[int, int], x_BPD: Tensor) -> Tensor:
        if self.count is None:
            result = layer(x_BPD, None)
            self.added[key] = result - x_BPD
            return result
        batch, size, _ = x_BPD.shape
        tokens_BN = farthest_tokens(x_BPD, self.count, self.images)
        starts_B1 = torch.arange(0, batch * size, size, device=x_BPD.device)[:, None]
        places = (tokens_BN + starts_B1).flatten()
        computed = layer(x_BPD.flatten(0, 1).index_select(0, places).unflatten(0, (batch, -1)), tokens_BN)
        result = x_BPD + resize_map(self.added[key][:batch], size)
        return result.flatten(0, 1).index_copy_(0, places, computed.flatten(0, 1)).view_as(x_BPD)
