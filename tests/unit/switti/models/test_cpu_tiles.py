"""Inference in tiles against the ordinary path: the same numbers in float64, equal up to rounding in bfloat16."""

import pytest
import torch
from transformer_cases import inputs, model

from benchmarks.cases import Size, build, random_captions
from switti.models import attention, block, cpu_tiles
from switti.models import norm as norms
from switti.models.transformer import ScaleTransformer


def logits_by_scale(built: ScaleTransformer, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs().items()}
    found = []
    with torch.no_grad():
        condition = built.prepare(given["text_BTC"], given["mask_BT"], given["pooled_BP"], given["crop_B4"])
        cache = built.build_cache()
        for scale, (start, stop) in enumerate(built.pyramid.spans):
            rows = None if scale == 0 else given["x_BMC"][:, start - 1 : stop - 1]
            found.append(built.forward_scale(scale, rows, condition, cache))
    return found


def in_tiles(monkeypatch: pytest.MonkeyPatch, tiny: bool) -> None:
    """Takes the path in float64, too; with `tiny`, in pieces of a few tokens, scores and rows."""
    for module in (attention, block):
        monkeypatch.setattr(module, "infers_in_tiles", lambda *_: True)
    if tiny:
        monkeypatch.setattr(cpu_tiles, "TOKENS", 5)
        monkeypatch.setattr(cpu_tiles, "SCORES", 12)
        monkeypatch.setattr(norms, "PIECE", 70)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("ladder", [{}, {"query_key_norm": "rms"}, {"norms": "pre", "rope": False}])
def test_tiles_compute_the_same_in_float64(
    ladder: dict, visibility: str, bounded: bool, tiny: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = model(visibility=visibility, **ladder)
    expected = logits_by_scale(built)
    in_tiles(monkeypatch, tiny)
    if not bounded:
        monkeypatch.setattr(cpu_tiles, "score_factor", lambda _width, head_width: (head_width**-0.5, False))
    for found, logits in zip(logits_by_scale(built), expected, strict=True):
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_in_bfloat16_tiles_are_as_close_to_the_exact_logits_as_the_ordinary_path(visibility: str) -> None:
    weights = model(visibility=visibility).to(torch.bfloat16)
    tiles = ScaleTransformer(weights.config).to(torch.bfloat16)
    ordinary = ScaleTransformer(weights.config, backend="fused").to(torch.bfloat16)
    exact = ScaleTransformer(weights.config).double()
    for other in (tiles, ordinary, exact):
        other.load_state_dict(weights.state_dict())
    assert cpu_tiles.score_factor(32, 16)[1]
    ours, theirs, reference = (
        torch.cat(logits_by_scale(built, built.head.weight.dtype), dim=1).double()
        for built in (tiles, ordinary, exact)
    )
    assert not torch.equal(ours, theirs)
    assert (ours - reference).norm() < 1.2 * (theirs - reference).norm()


@pytest.mark.parametrize(("width", "head_width", "bounded"), [(512, 64, True), (1920, 64, False)])
def test_scores_that_might_overflow_are_not_taken_as_powers(
    width: int, head_width: int, bounded: bool
) -> None:
    assert cpu_tiles.score_factor(width, head_width)[1] == bounded


def test_the_largest_possible_scores_stay_finite_in_bfloat16() -> None:
    """All of a token's norm in one head, in the direction of its key or against it."""
    factor, bounded = cpu_tiles.score_factor(512, 64)
    q = torch.full((2, 3, 64), 8.0**0.5)
    q[1] *= -1
    k, v = q[:1].expand(2, -1, -1), torch.randn(2, 3, 64)
    found = cpu_tiles.attend((q * factor).bfloat16(), k.bfloat16(), v.bfloat16(), None, bounded)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02)
    assert (q * factor @ k.mT).abs().max() > 90


def test_an_image_does_not_depend_on_its_batch() -> None:
    """To the bit, with a padded caption beside it or without."""
    config = Size(width=128, heads=2, depth=1).config(256, "non_causal")
    built = build(config, torch.device("cpu")).eval().to(torch.bfloat16)
    text = random_captions(config, 3, torch.device("cpu"))
    text.mask_BT[0, 5:] = False
    x_BPC = torch.randn(3, built.pyramid.sizes[5], config.code_width)

    def logits(rows: slice) -> torch.Tensor:
        condition = built.prepare(text.tokens_BTC[rows], text.mask_BT[rows], text.pooled_BP[rows])
        return built.forward_scale(5, x_BPC[rows], condition, None)

    with torch.no_grad():
        assert torch.equal(logits(slice(None))[1:2], logits(slice(1, 2)))
