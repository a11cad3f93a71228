"""Filters, guidance, noise and the sampler against straightforward references."""

import pytest
import torch
from sampler_cases import build, captions

from switti.sampling.config import SamplingConfig
from switti.sampling.filters import draw_tokens, filtered_probabilities, gumbel_softmax, gumbel_temperature
from switti.sampling.guidance import GuidanceSchedule
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import ScaleTrace, sample_latent
from switti.scales import Pyramid


def plain_filter(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The definition, one row at a time."""
    rows = []
    for row in logits.flatten(0, -2):
        keep = torch.ones(len(row), dtype=torch.bool)
        if 0 < top_k < len(row):
            keep &= row >= row.sort(descending=True).values[top_k - 1]
        if top_p > 0:
            order = row.masked_fill(~keep, -torch.inf).argsort(stable=True)
            mass = 0.0
            probabilities = row.masked_fill(~keep, -torch.inf).softmax(-1)
            for token in order[:-1].tolist():
                mass += probabilities[token].item()
                if mass <= 1 - top_p:
                    keep[token] = False
        rows.append(row.masked_fill(~keep, -torch.inf).softmax(-1))
    return torch.stack(rows).view_as(logits)


@pytest.mark.parametrize("top_k", [0, 1, 5, 30, 1000])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95, 1.0])
def test_filters_equal_their_definition(top_k: int, top_p: float) -> None:
    logits = 2 * torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = filtered_probabilities(logits, top_k, top_p)
    torch.testing.assert_close(found, plain_filter(logits, top_k, top_p), rtol=0, atol=1e-12)


def test_ties_with_the_kth_largest_stay() -> None:
    logits = torch.tensor([[[3.0, 1.0, 3.0, 3.0, 0.0]]])
    assert filtered_probabilities(logits, 2, 0.0)[0, 0].gt(0).tolist() == [True, False, True, True, False]


def test_draws_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(1, 40_000, 4)
    noise = torch.empty(1, 40_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    found = draw_tokens(logits, 3, 0.0, noise).flatten().bincount(minlength=4) / 40_000
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert found[3] == 0
    torch.testing.assert_close(found[:3], expected, rtol=0, atol=0.01)


def test_gumbel_mixture_hardens_along_the_scales() -> None:
    assert gumbel_temperature(0.0) == pytest.approx(0.27)
    assert gumbel_temperature(1.0) == pytest.approx(0.0135)
    logits = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(1))
    soft = [gumbel_softmax(logits, noise, gumbel_temperature(r)).amax(-1).mean() for r in (0.0, 0.5, 1.0)]
    assert soft[0] < soft[1] < soft[2]


def test_guidance_plan_by_hand() -> None:
    schedule = GuidanceSchedule.of(
        SamplingConfig(guidance=6.0, guidance_start=1, guidance_stop=3, late_temperature=0.5),
        Pyramid((1, 2, 3, 4, 5)),
    )
    assert schedule.strengths == pytest.approx((0.0, 1.5, 3.0, 0.0, 0.0))
    assert [schedule.needs_unconditional(k, causal=False) for k in range(5)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert [schedule.needs_unconditional(k, causal=True) for k in range(5)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    both = torch.tensor([[[1.0, 2.0]], [[0.5, 0.0]]])
    assert schedule.combine(both, 1, 2).tolist() == [[[1.0 * 4 - 0.5 * 3, 2.0 * 4]]]
    assert schedule.combine(both[:1], 1, 3).tolist() == [[[2.0, 4.0]]]


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("gumbel", [True, False])
def test_a_picture_does_not_depend_on_its_batch(visibility: str, gumbel: bool) -> None:
    model, tokenizer = build(visibility)
    text, null = captions(3), captions(1, seed=4)
    config = SamplingConfig(guidance=3.0, guidance_stop=3, top_k=20, gumbel=gumbel)
    cpu = torch.device("cpu")
    together = sample_latent(model, tokenizer, text, null, config, ImageNoise([5, 6, 7], cpu))
    alone = sample_latent(model, tokenizer, text[[2]], null, config, ImageNoise([7], cpu))
    torch.testing.assert_close(together[2:], alone, rtol=0, atol=1e-5)
    other = sample_latent(model, tokenizer, text[[2]], null, config, ImageNoise([8], cpu))
    assert not torch.allclose(alone, other)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_skipped_rows_change_nothing(visibility: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving out unconditional rows where nothing uses them gives what computing them everywhere gives."""
    model, tokenizer = build(visibility)
    text, null = captions(2), captions(1, seed=4)
    config = SamplingConfig(guidance=3.0, guidance_start=1, guidance_stop=3, top_k=20, gumbel=False)
    rows: list[int] = []

    def run() -> torch.Tensor:
        noise = ImageNoise([1, 2], torch.device("cpu"))

        def note(trace: ScaleTrace) -> None:
            rows.append(len(trace.logits))

        return sample_latent(model, tokenizer, text, null, config, noise, on_scale_end=note)

    sparing = run()
    assert rows == ([4, 4, 4, 2] if visibility == "causal" else [2, 4, 4, 2])
    monkeypatch.setattr(GuidanceSchedule, "needs_unconditional", lambda self, scale, causal: True)
    rows.clear()
    torch.testing.assert_close(run(), sparing, rtol=0, atol=1e-5)
    assert rows == [4, 4, 4, 4]


def test_non_causal_model_needs_no_cache() -> None:
    sizes = {}
    for visibility in ("causal", "non_causal"):
        model, tokenizer = build(visibility)
        seen = sizes.setdefault(visibility, [])
        noise = ImageNoise([1, 2], torch.device("cpu"))
        sample_latent(
            model, tokenizer, captions(2), captions(1), SamplingConfig(top_k=8), noise,
            on_scale_end=lambda trace, seen=seen: seen.append(trace.cache_bytes),
        )  # fmt: skip
    assert sizes["non_causal"] == [0] * 4
    # Two blocks, keys and values, four rows, 30 tokens of width 32 in float32: allocated once, at the first scale.
    assert sizes["causal"] == [2 * 2 * 4 * 30 * 32 * 4] * 4


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_mixed_precision_samples_close_to_float32(visibility: str) -> None:
    model, tokenizer = build(visibility)
    text, null, config = (
        captions(2),
        captions(1, seed=4),
        SamplingConfig(guidance=1.0, top_k=20, gumbel=False),
    )
    logits: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for half, seen in logits.items():
        noise = ImageNoise([1, 2], torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            sample_latent(
                model, tokenizer, text, null, config, noise,
                on_scale_end=lambda trace, seen=seen: seen.append(trace.logits),
            )  # fmt: skip
    # The first scale has the same input in both; later ones follow tokens that may differ.
    assert logits[True][0].dtype == torch.float32
    torch.testing.assert_close(logits[True][0], logits[False][0], rtol=0, atol=0.15)
    assert all(torch.isfinite(values).all() for values in logits[True])
