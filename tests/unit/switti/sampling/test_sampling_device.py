"""Sampling on an accelerator: no step waits for the host, and no shape depends on values."""

import pytest
import torch
from fake_cuda import HostRoundTripError, fake_cuda, move_to_cuda, on_cuda
from sampler_cases import build, captions
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from switti.sampling import filters
from switti.sampling.config import PruningConfig, SamplingConfig
from switti.sampling.filters import kept_tokens
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import sample_latent
from switti.text.base import TextEmbedding


def embedding(text: TextEmbedding) -> TextEmbedding:
    assert text.mask_BT is not None
    return TextEmbedding(on_cuda(text.tokens_BTC), on_cuda(text.mask_BT), on_cuda(text.pooled_BP))


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.9},
        {"top_k": 8, "gumbel": False},
        {"top_k": 8, "guidance_stop": 2},
        {"guidance": 0.0},
        {"pruning": PruningConfig([2, 3], [0.5], 1), "guidance_stop": 3},
    ],
)
def test_no_scale_waits_for_the_host(visibility: str, dtype: torch.dtype, settings: dict) -> None:
    model, tokenizer = build(visibility)
    text, null = captions(2), captions(1, seed=4)
    with fake_cuda():
        latent = sample_latent(
            move_to_cuda(model, dtype),
            move_to_cuda(tokenizer),
            embedding(text),
            embedding(null),
            SamplingConfig(**settings),
            ImageNoise([1, 2], torch.device("cuda")),
        )
        assert latent.device.type == "cuda" and latent.shape[0] == 2


def test_the_device_notices_what_asks_it() -> None:
    with fake_cuda():
        x = torch.empty(3, 5, device="cuda")
        with pytest.raises(DataDependentOutputException):
            bool(x.sum() > 0)
        with pytest.raises(DynamicOutputShapeException):
            x.nonzero()
        with pytest.raises(HostRoundTripError):
            x.cpu()


@pytest.mark.parametrize("top_k", [0, 1, 7, 40])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("rounded", [True, False])
def test_both_devices_keep_the_same_tokens(top_k: int, top_p: float, rounded: bool) -> None:
    """Of random logits and of such that are often equal."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300, 40, generator=generator, dtype=torch.float64)
    for x in (logits, logits.round() if rounded else logits):
        on_device = filters._kept_on_device(x, top_k, top_p, rounded)
        torch.testing.assert_close(kept_tokens(x, top_k, top_p, rounded), on_device)
