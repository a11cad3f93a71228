"""The fast formulation computes what the plain one does: logits, gradients, latents."""

import pytest
import torch
from sampler_cases import build, captions
from transformer_cases import inputs, model

from benchmarks.reference_model import DenseTransformer, draw_from_sorted, same_weights, sample_latent_plainly
from switti.sampling.config import SamplingConfig
from switti.sampling.filters import draw_tokens
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import sample_latent


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("ladder", [{}, {"norms": "pre", "ffn": "gelu", "rope": False}])
def test_logits_and_gradients(visibility: str, ladder: dict) -> None:
    fast = model(visibility=visibility, **ladder)
    plain = same_weights(fast, DenseTransformer)
    outputs = [built(**inputs()) for built in (fast, plain)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for output in outputs:
        output.square().mean().backward()
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("stop", [None, 2])
def test_latents(visibility: str, stop: int | None) -> None:
    fast, tokenizer = build(visibility)
    plain = same_weights(fast, DenseTransformer)
    config = SamplingConfig(guidance=2.0, guidance_stop=stop, top_k=20, top_p=0.9, gumbel=False)
    text, null = captions(2), captions(1, seed=4)
    found = sample_latent(fast, tokenizer, text, null, config, ImageNoise([1, 2], torch.device("cpu")))
    noise = ImageNoise([1, 2], torch.device("cpu"))
    expected = sample_latent_plainly(plain, tokenizer, text, null, config, noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_draws_from_the_sorted_vocabulary_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 50, 200, generator=generator)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    assert torch.equal(draw_tokens(logits, 40, 0.9, noise), draw_from_sorted(logits, 40, 0.9, noise))
