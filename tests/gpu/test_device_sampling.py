"""Sampling on a device: the CPU's images up to rounding, whatever the batch."""

import copy

import pytest
import torch
from sampler_cases import build, captions
from torch import Tensor

from switti.sampling.config import SamplingConfig
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import ScaleTrace, sample_latent
from switti.text.base import TextEmbedding

SETTINGS = {
    "soft": {"top_k": 16},
    "hard": {"top_k": 16, "gumbel": False},
    "stopped": {"top_k": 16, "guidance_stop": 2},
    "nucleus": {"top_k": 0, "top_p": 0.8, "gumbel": False},
}

SEEDS = [1, 2, 3, 4, 5, 6, 7, 8]


def sample(
    visibility: str, device: str, seeds: list[int], text: TextEmbedding | None = None, **settings: object
) -> Tensor:
    model, tokenizer = (copy.deepcopy(part).to(device) for part in build(visibility))
    text = (text or captions(len(seeds))).to(device)
    config = SamplingConfig(**settings)  # type: ignore[arg-type]
    noise = ImageNoise(seeds, torch.device(device))
    return sample_latent(model, tokenizer, text, captions(1, seed=4).to(device), config, noise).cpu()


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_the_cpus_up_to_rounding(device: str, visibility: str, name: str) -> None:
    """Soft mixtures magnify rounding by their low temperature."""
    expected = sample(visibility, "cpu", [1, 2, 3], **SETTINGS[name])
    actual = sample(visibility, device, [1, 2, 3], **SETTINGS[name])
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_an_image_does_not_depend_on_its_batch(device: str, visibility: str) -> None:
    together = sample(visibility, device, [5, 6, 7], **SETTINGS["hard"])
    again = sample(visibility, device, [5], captions(3)[[0]], **SETTINGS["hard"])
    torch.testing.assert_close(again[0], together[0], rtol=0, atol=1e-3)
    assert not torch.allclose(together[1], together[2], atol=1e-2)


def test_noise_is_the_same_on_every_device(device: str) -> None:
    expected = ImageNoise([1, 2**63], torch.device("cpu"))(5, (70, 600)).all()
    torch.testing.assert_close(
        ImageNoise([1, 2**63], torch.device(device))(5, (70, 600)).all().cpu(), expected, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_tokens_are_the_cpus_where_the_draw_is_not_close(device: str, visibility: str) -> None:
    """In float32. Where the two best candidates of a draw are as near as rounding, either may win, and finer scales
    follow; the first scale at which an image differs must be such a one."""

    def drawn(place: str) -> list[tuple[Tensor, Tensor]]:
        model, tokenizer = (copy.deepcopy(part).to(place) for part in build(visibility))
        traces: list[tuple[Tensor, Tensor]] = []

        def note(trace: ScaleTrace) -> None:
            assert trace.tokens_BP is not None
            noise = ImageNoise(SEEDS, torch.device("cpu"))(
                trace.scale, tuple(trace.guided_BPV.shape[1:])
            ).all()
            odds = trace.guided_BPV.cpu() - noise.log()
            best = odds.topk(2, dim=-1).values
            traces.append((trace.tokens_BP.cpu(), best[..., 0] - best[..., 1]))

        config = SamplingConfig(top_k=0, top_p=0.0, gumbel=False)
        text, null = captions(len(SEEDS)).to(place), captions(1, seed=4).to(place)
        noise = ImageNoise(SEEDS, torch.device(place))
        sample_latent(model, tokenizer, text, null, config, noise, on_scale_end=note)
        return traces

    same = torch.ones(len(SEEDS), dtype=torch.bool)
    for (expected_BP, margin_BP), (actual_BP, _) in zip(drawn("cpu"), drawn(device), strict=True):
        differs_BP = (expected_BP != actual_BP) & same[:, None]
        assert (margin_BP[differs_BP] < 1e-3).all()
        same &= ~differs_BP.any(dim=1)
    assert same.float().mean() >= 0.75
