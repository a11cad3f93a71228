"""Sampling with a compiled transformer."""

import pytest
import torch
from sampler_cases import SCALES, build, captions

from switti.models.compiled_scales import CompiledScales
from switti.sampling.config import SamplingConfig
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import ScaleTrace, sample_latent


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_each_scale_is_compiled_by_itself_and_once(visibility: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def as_it_is(function, **options):
        assert options == {"dynamic": False}
        compiled.append(function.__code__.co_name)
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    expected = sample(visibility, compile_scales=False)
    actual = sample(visibility, compile_scales=True)
    assert compiled == [f"forward_scale_{scale}" for scale in range(len(SCALES))]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_a_compiled_model_draws_the_tokens_of_an_eager_one(visibility: str) -> None:
    """Also where guidance stops, and in a second call, which compiles nothing again."""
    expected = sample(visibility, compile_scales=False)
    torch._dynamo.utils.counters.clear()
    graphs: list[int] = []
    actual = sample(visibility, compile_scales=True, graphs=graphs)
    assert graphs[0] == graphs[1] >= len(SCALES)
    assert not torch._dynamo.utils.counters["graph_break"]
    for a, b in zip(actual[:-2], expected[:-2], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(actual[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def sample(visibility: str, compile_scales: bool, graphs: list[int] | None = None) -> list[torch.Tensor]:
    """Tokens of every scale of two calls, and their latents. graphs: gets the number of compiled ones after each."""
    model, tokenizer = build(visibility)
    if compile_scales:
        model.compile_scales()
        model.compile_scales()
        assert isinstance(model.forward_scale, CompiledScales)
        assert isinstance(model.forward_scale.model, type(model))
    tokens: list[torch.Tensor] = []

    def note(trace: ScaleTrace) -> None:
        assert trace.tokens_BP is not None
        tokens.append(trace.tokens_BP)

    settings = SamplingConfig(guidance=2.0, guidance_stop=3, top_k=10, gumbel=False)
    latents = []
    for seed in (3, 5):
        noise = ImageNoise([1, seed], torch.device("cpu"))
        text, null = captions(2, seed), captions(1, 4)
        latents.append(sample_latent(model, tokenizer, text, null, settings, noise, on_scale_end=note))
        if graphs is not None:
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return [*tokens, *latents]
