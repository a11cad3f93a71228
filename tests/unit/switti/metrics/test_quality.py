"""PSNR, SSIM and LPIPS of reconstructions, and per-scale token statistics, against plain numpy and scipy."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.ndimage import correlate1d

from switti.losses.perceptual import build_lpips
from switti.metrics.image_quality import ReconstructionQuality, lpips_distance, psnr, ssim
from switti.metrics.scale_statistics import (
    ScaleStatistics,
    codebook_use,
    perplexity,
)
from switti.scales import Pyramid
from switti.tokenizer.codebook import entropy, token_counts


def _pair(count: int = 3, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(count, 3, side, side, generator=generator)
    return (targets + 0.1 * torch.randn(targets.shape, generator=generator)).clamp(0, 1), targets


def test_psnr_of_a_constant_error() -> None:
    targets = torch.full((2, 3, 8, 8), 0.5)
    images = targets + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(images, targets).tolist() == pytest.approx([20.0, 40.0], rel=1e-5)
    assert torch.isinf(psnr(targets, targets)).all()


def _ssim_in_numpy(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 with an 11-tap Gaussian, σ = 1.5, mirrored at the borders, one channel at a time."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()

    def blur(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, taps, axis=0, mode="mirror"), taps, axis=1, mode="mirror")

    values = []
    for x, y in zip(a, b, strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, cxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        values.append(((2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(values))


def test_ssim_against_numpy() -> None:
    images, targets = _pair()
    expected = [
        _ssim_in_numpy(a, b) for a, b in zip(images.double().numpy(), targets.double().numpy(), strict=True)
    ]
    assert ssim(images, targets).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(images[:1], targets[:1]).tolist() == pytest.approx(expected[:1], abs=1e-5)


def test_quality_is_the_mean_over_pictures_however_they_are_batched() -> None:
    network = build_lpips("alex")
    images, targets = _pair(5)
    metric = ReconstructionQuality(network)
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        metric.update(images[part], targets[part])
    values = metric.compute()
    assert set(values) == {"psnr", "ssim", "lpips_alex"}
    assert values["psnr"] == pytest.approx(float(psnr(images, targets).mean()), rel=1e-6)
    assert values["ssim"] == pytest.approx(float(ssim(images, targets).mean()), rel=1e-4)
    expected = network(images * 2 - 1, targets * 2 - 1).mean()
    assert values["lpips_alex"] == pytest.approx(float(expected), rel=1e-4)
    assert lpips_distance(network, images, targets).shape == (5,)


def test_quality_without_lpips() -> None:
    metric = ReconstructionQuality()
    metric.update(*_pair(1))
    assert set(metric.compute()) == {"psnr", "ssim"}


PYRAMID, ENTRIES = Pyramid((1, 2, 3)), 7


def _tokens() -> torch.Tensor:
    tokens = torch.randint(0, ENTRIES, (6, 14), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 3  # one entry only at the first scale
    return tokens


def test_statistics_against_counter_and_scipy() -> None:
    tokens = _tokens()
    counts = token_counts(tokens, PYRAMID, ENTRIES)
    for scale, (start, stop) in enumerate([(0, 1), (1, 5), (5, 14)]):
        plain = Counter(tokens[:, start:stop].reshape(-1).tolist())
        assert counts[scale].tolist() == [plain[entry] for entry in range(ENTRIES)]
        expected = scipy.stats.entropy(list(plain.values()))
        assert float(entropy(counts)[scale]) == pytest.approx(expected, abs=1e-12)
        assert float(codebook_use(counts)[scale]) == len(plain) / ENTRIES
        assert float(perplexity(counts)[scale]) == pytest.approx(math.exp(expected), rel=1e-12)


def test_entropy_bounds() -> None:
    uniform = torch.full((1, 16), 5)
    assert float(entropy(uniform)[0]) == pytest.approx(math.log(16), rel=1e-12)
    assert float(perplexity(uniform)[0]) == pytest.approx(16, rel=1e-12)
    assert entropy(torch.zeros(1, 4, dtype=torch.int64)).tolist() == [0.0]


def test_accumulator_takes_statistics_of_the_sums() -> None:
    tokens = _tokens()
    metric = ScaleStatistics(PYRAMID, ENTRIES)
    metric.update(tokens[:2])
    metric.update(tokens[2:])
    values, counts = metric.compute(), token_counts(tokens, PYRAMID, ENTRIES)
    torch.testing.assert_close(values["unigram_entropy"], entropy(counts))
    assert float(values["codebook_use_total"]) == len(tokens.unique()) / ENTRIES
