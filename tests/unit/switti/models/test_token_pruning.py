"""Pruned scales against the same computed token by token, in float64."""

import math

import pytest
import torch
from torch import Tensor
from transformer_cases import SCALES, inputs, model

from switti.models.attention import Rotation
from switti.models.block import Block
from switti.models.pruning import TokenPruning, farthest_tokens, resize_map
from switti.models.transformer import ScaleTransformer
from switti.scales import Pyramid

COUNTS = {2: 4, 3: 11}


def rows_of_scale(given: dict[str, Tensor], pyramid: Pyramid, scale: int) -> Tensor | None:
    start, stop = pyramid.spans[scale]
    return given["x_BMC"][:, start - 1 : stop - 1] if scale else None


def logits_by_scale(
    built: ScaleTransformer, given: dict[str, Tensor], pruning: TokenPruning | None, rows: int
) -> list[Tensor]:
    """Of the first `rows` rows."""
    names = ("text_BTC", "mask_BT", "pooled_BP", "crop_B4")
    condition = built.prepare(*(given[name] for name in names)).first_rows(rows)
    cache = built.build_cache()
    found = []
    for scale in range(built.pyramid.count):
        x = rows_of_scale(given, built.pyramid, scale)
        found.append(built.forward_scale(scale, None if x is None else x[:rows], condition, cache, pruning))
    return found


# ---- the reference: one row, one token at a time ------------------------------------------------------------------


def rms(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + 1e-6) * gain


def centered(x: Tensor) -> Tensor:
    x = x - x.mean()
    return x / math.sqrt(float((x * x).mean()) + 1e-6)


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for m in range(0, len(x), 2):
        c, s = float(cosine[m]), float(sine[m + 1])
        out[m], out[m + 1] = x[m] * c - x[m + 1] * s, x[m] * s + x[m + 1] * c
    return out


def mix(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    parts = []
    for q, *pairs in zip(
        query.chunk(heads),
        *(zip(k.chunk(heads), v.chunk(heads), strict=True) for k, v in zip(keys, values, strict=True)),
        strict=True,
    ):
        odds = [math.exp(float(q @ k) / math.sqrt(len(q))) for k, _ in pairs]
        parts.append(sum(o / sum(odds) * v for o, (_, v) in zip(odds, pairs, strict=True)))
    return torch.cat(parts)


def area(values: list[Tensor], side: int) -> list[Tensor]:
    old = math.isqrt(len(values))

    def window(i: int) -> range:
        return range(i * old // side, -(-(i + 1) * old // side))

    return [
        sum(values[r * old + c] for r in window(y) for c in window(x)) / (len(window(y)) * len(window(x)))
        for y in range(side)
        for x in range(side)
    ]


class RowByRow:
    """One row of a model with sandwich norms and SwiGLU. `tokens`: of each pruned sub-layer, in order."""

    def __init__(self, built: ScaleTransformer, given: dict[str, Tensor], row: int) -> None:
        self.built, self.row, self.given = built, row, given
        self.past: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in built.typed_blocks]
        self.added: dict[tuple[int, str], list[Tensor]] = {}
        single = {name: value[row : row + 1] for name, value in given.items()}
        names = ("text_BTC", "mask_BT", "pooled_BP", "crop_B4")
        self.condition = built.prepare(*(single[name] for name in names))
        self.mask = given["mask_BT"][row]

    def scale(self, scale: int, counts: dict[int, int], first_block: int, keeps: bool) -> Tensor:
        built = self.built
        start, stop = built.pyramid.spans[scale]
        inner = rows_of_scale(self.given, built.pyramid, scale)
        if inner is None:
            xs = list(self.condition.first_BPD[0] + built.lvl_embed.weight[0])
        else:
            xs = [built.word_embed(v) + built.lvl_embed.weight[scale] for v in inner[self.row]]
        tables = built.cosine_LK[start:stop].double(), built.sine_LK[start:stop].double()
        for i, block in enumerate(built.typed_blocks):
            for part in ("self", "cross", "feed-forward"):
                count = counts.get(scale) if i >= first_block else None
                kept = list(range(len(xs))) if count is None else self.farthest(xs, count)
                done = dict(zip(kept, self.layer(part, i, block, xs, kept, tables), strict=True))
                if count is None:
                    new = [done[t] for t in range(len(xs))]
                    if keeps:
                        self.added[i, part] = [a - b for a, b in zip(new, xs, strict=True)]
                else:
                    side = built.pyramid.sides[scale]
                    other = area(self.added[i, part], side)
                    new = [done[t] if t in done else xs[t] + other[t] for t in range(len(xs))]
                xs = new
        return torch.stack([built.classify(x[None, None], self.condition.head)[0, 0] for x in xs])

    @staticmethod
    def farthest(xs: list[Tensor], count: int) -> list[int]:
        mean = sum(xs) / len(xs)
        distances = [float(((x - mean) ** 2).sum()) for x in xs]
        return sorted(sorted(range(len(xs)), key=lambda t: (-distances[t], t))[:count])

    def layer(
        self,
        part: str,
        i: int,
        block: Block,
        xs: list[Tensor],
        kept: list[int],
        tables: tuple[Tensor, Tensor],
    ) -> list[Tensor]:
        gate1, gate2, scale1, scale2, shift1, shift2 = (m[0, 0] for m in self.condition.blocks[i].modulation)
        heads = block.attn.heads
        if part == "self":
            qs, keys, values = [], [], []
            for t in kept:
                h = rms(xs[t], block.self_attention_norm1.weight) * (scale1 + 1) + shift1
                q, k, v = block.attn.to_qkv(h).chunk(3)
                q, k = (
                    torch.cat([turn(p, tables[0][t], tables[1][t]) for p in centered(z).chunk(heads)])
                    for z in (q, k)
                )
                qs.append(q)
                keys.append(k)
                values.append(v)
            if self.built.config.visibility == "causal":
                keys, values = self.past[i][0] + keys, self.past[i][1] + values
                self.past[i] = keys, values
            outs = [block.attn.proj(mix(q, keys, values, heads)) for q in qs]
            return [
                xs[t] + gate1 * rms(out, block.self_attention_norm2.weight)
                for t, out in zip(kept, outs, strict=True)
            ]
        if part == "cross":
            keys, values = (
                [t for t, seen in zip(kv[0].transpose(0, 1).flatten(1), self.mask, strict=True) if seen]
                for kv in (self.condition.blocks[i].keys, self.condition.blocks[i].values)
            )
            result = []
            for t in kept:
                q = centered(block.cross_attn.to_q(rms(xs[t], block.cross_attention_norm1.weight)))
                out = block.cross_attn.proj(mix(q, keys, values, heads))
                result.append(xs[t] + rms(out, block.cross_attention_norm2.weight))
            return result
        result = []
        for t in kept:
            out = block.ffn(rms(xs[t], block.ffn_norm1.weight) * (scale2 + 1) + shift2)
            result.append(xs[t] + gate2 * rms(out, block.ffn_norm2.weight))
        return result


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("first_block", [0, 1])
@torch.no_grad()
def test_pruned_scales_equal_the_same_token_by_token(visibility: str, first_block: int) -> None:
    built, given = model(visibility=visibility), inputs()
    found = logits_by_scale(built, given, TokenPruning(COUNTS, first_block, images=3), rows=3)
    full = logits_by_scale(built, given, None, rows=3)
    for row in range(3):
        reference = RowByRow(built, given, row)
        for scale in range(len(SCALES)):
            expected = reference.scale(scale, COUNTS, first_block, keeps=scale == 1)
            torch.testing.assert_close(found[scale][row], expected, rtol=0, atol=1e-9)
    assert torch.equal(found[1], full[1]) and not torch.allclose(found[2], full[2])


@torch.no_grad()
def test_equally_distant_tokens_are_taken_by_their_number() -> None:
    x = torch.zeros(1, 9, 2)
    x[0, [1, 4, 5, 8], 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert farthest_tokens(x, 3, images=1).tolist() == [[1, 4, 5]]
    assert farthest_tokens(torch.ones(2, 9, 2), 4, images=2).tolist() == [[0, 1, 2, 3]] * 2


def test_both_rows_of_an_image_get_the_same_tokens() -> None:
    x = torch.zeros(4, 4, 1)
    x[0, :, 0] = torch.tensor([3.0, -3.0, 0.0, 0.0])
    x[2, :, 0] = torch.tensor([0.0, 0.0, 9.0, -9.0])
    x[1, :, 0] = x[3, :, 0] = torch.tensor([0.0, 1.0, -1.0, 0.0])
    assert farthest_tokens(x, 2, images=2).tolist() == [[2, 3], [1, 2], [2, 3], [1, 2]]
    assert farthest_tokens(x, 2, images=4).tolist() == [[0, 1], [1, 2], [2, 3], [1, 2]]


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 5), (2, 4), (1, 3)])
def test_maps_are_resized_by_the_mean_over_areas(old: int, new: int) -> None:
    x = torch.randn(2, old * old, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([torch.stack(area(list(row), new)) for row in x])
    torch.testing.assert_close(resize_map(x, new * new), expected)


@torch.no_grad()
def test_more_rows_than_were_kept_are_computed_in_full() -> None:
    built, given = model(visibility="non_causal"), inputs()
    pruning = TokenPruning({2: 4, 3: 11}, 0, images=2)
    condition = built.prepare(*(given[name] for name in ("text_BTC", "mask_BT", "pooled_BP", "crop_B4")))
    full = logits_by_scale(built, given, None, rows=3)
    rows = [2, 2, 3, 2]
    found = []
    for scale, count in enumerate(rows):
        x = rows_of_scale(given, built.pyramid, scale)
        part = condition.first_rows(count)
        found.append(built.forward_scale(scale, None if x is None else x[:count], part, None, pruning))
    # Scale 2 in full, and what it added is used at scale 3.
    assert torch.equal(found[2], full[2]) and not torch.allclose(found[3], full[3][:2])
    assert all(len(added) == 3 and added.shape[1] == 9 for added in pruning.added.values())


@torch.no_grad()
def test_a_causal_model_keeps_keys_of_the_computed_tokens_alone() -> None:
    built, given = model(visibility="causal"), inputs()
    cache = built.build_cache()
    assert cache is not None
    pruning = TokenPruning(COUNTS, 1, images=3)
    condition = built.prepare(*(given[name] for name in ("text_BTC", "mask_BT", "pooled_BP", "crop_B4")))
    for scale in range(built.pyramid.count):
        built.forward_scale(scale, rows_of_scale(given, built.pyramid, scale), condition, cache, pruning)
    assert [one.filled for one in cache] == [1 + 4 + 9 + 25, 1 + 4 + 4 + 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_with_different_tokens_are_turned_by_their_own_angles(dtype: torch.dtype) -> None:
    """In every type in which attention has a path of its own, against float64."""
    built = model(width=64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 64, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[0, 7, 8], [2, 3, 24]])
    start, stop = built.pyramid.spans[3]
    found = []
    for kind in (torch.float64, dtype):
        built = built.to(kind)
        rotation = Rotation(built.cosine_LK, built.sine_LK).rows(start, stop).take(tokens)
        found.append(built.typed_blocks[0].attn(x.to(kind), rotation, ((0, 3),)).double())
    alone = Rotation(built.cosine_LK, built.sine_LK).rows(start, stop).take(tokens[1:])
    single = built.typed_blocks[0].attn(x[1:].to(dtype), alone, ((0, 3),)).double()
    scale = float(found[0].abs().max())
    torch.testing.assert_close(
        found[1], found[0], rtol=0, atol=scale * (0.03 if dtype.itemsize < 4 else 1e-5)
    )
    torch.testing.assert_close(
        found[1][1:], single, rtol=0, atol=scale * (0.02 if dtype.itemsize < 4 else 1e-5)
    )


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_gives_the_same() -> None:
    built, given = model(visibility="causal"), inputs()
    plain = logits_by_scale(built, given, TokenPruning(COUNTS, 0, images=3), rows=3)
    torch._dynamo.reset()
    built.forward_scale = torch.compile(built.forward_scale, backend="aot_eager")
    compiled = logits_by_scale(built, given, TokenPruning(COUNTS, 0, images=3), rows=3)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
