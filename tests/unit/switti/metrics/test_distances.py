"""Set distances against scipy's matrix square root, a plain double loop, and torchmetrics' own estimator."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.image.kid import KernelInceptionDistance

from switti.errors import UserError
from switti.metrics import fid
from switti.metrics.fid import FrechetDistance, InceptionFeatures, KernelDistance, kernel_distance


def _samples(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 100))
    return torch.randn(count, width, generator=generator) @ mixing / width**0.5 + shift


def _frechet(real: torch.Tensor, fake: torch.Tensor) -> float:
    a, b = real.double().numpy(), fake.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def test_frechet_distance_against_scipy() -> None:
    real, fake = _samples(300, 8, 0), _samples(200, 8, 1, shift=0.5)
    metric = FrechetDistance(8)
    for chunk in real.split(77):
        metric.update(chunk, real=True)
    for chunk in fake.split(64):
        metric.update(chunk, real=False)
    assert float(metric.compute()) == pytest.approx(_frechet(real, fake), rel=1e-5)


def test_frechet_distance_of_known_gaussians() -> None:
    """Diagonal covariances a², b² and means m apart: |m|² + Σ (a − b)². Samples are whitened to be exact."""
    base = _samples(64, 3, 2).double()
    base = base - base.mean(0)
    white = base @ torch.linalg.inv(torch.linalg.cholesky(base.T.cov())).T
    metric = FrechetDistance(3)
    metric.update(white * torch.tensor([1.0, 2.0, 3.0]), real=True)
    metric.update(white * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([3.0, 0.0, 4.0]), real=False)
    assert float(metric.compute()) == pytest.approx(25 + 1 + 0 + 4, rel=1e-9)


def test_real_statistics_stay_over_reset() -> None:
    real, first, second = _samples(50, 4, 0), _samples(50, 4, 1), _samples(60, 4, 2)
    for metric in (FrechetDistance(4), KernelDistance()):
        metric.update(real, real=True)
        metric.update(first, real=False)
        before = metric.compute()
        metric.reset()
        metric.update(second, real=False)
        assert metric.compute() != before
        metric.reset()
        metric.update(first, real=False)
        assert metric.compute() == before


@pytest.mark.parametrize("real_count", [0, 1])
def test_too_few_samples_give_nan(real_count: int) -> None:
    for metric in (FrechetDistance(4), KernelDistance()):
        metric.update(_samples(real_count, 4, 0), real=True)
        metric.update(_samples(5, 4, 1), real=False)
        assert torch.isnan(metric.compute())


def _kid_by_loops(real: np.ndarray, fake: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(values: np.ndarray) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(values) for j, y in enumerate(values) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in real for y in fake]
    return within(real) + within(fake) - 2 * sum(between) / len(between)


def test_kernel_distance_against_loops() -> None:
    real, fake = _samples(23, 5, 3), _samples(17, 5, 4, shift=0.3)
    expected = _kid_by_loops(real.double().numpy(), fake.double().numpy())
    assert float(kernel_distance(real, fake)) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_agrees_with_torchmetrics_on_one_full_subset() -> None:
    real, fake = _samples(40, 6, 5), _samples(40, 6, 6, shift=0.2)

    class Given(torch.nn.Module):
        num_features = 6

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    theirs = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=40)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = KernelDistance()
    for chunk in real.split(15):
        ours.update(chunk, real=True)
    ours.update(fake, real=False)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()[0]), rel=1e-4)


@pytest.mark.parametrize(("real_count", "fake_count"), [(2, 3), (7, 8), (40, 33)])
def test_kernel_distance_by_blocks_is_that_of_whole_matrices(
    real_count: int, fake_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fake = _samples(real_count, 6, 1), _samples(fake_count, 6, 2, shift=0.3)
    expected = _kid_by_loops(real.double().numpy(), fake.double().numpy())
    for block in (1, 7, 8, 1000):
        monkeypatch.setattr(fid, "BLOCK", block)
        assert float(kernel_distance(real, fake)) == pytest.approx(expected, rel=1e-9)
    assert torch.isnan(kernel_distance(real[:1], fake)) and torch.isnan(kernel_distance(real, fake[:0]))


def test_kernel_distance_never_holds_a_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that it makes has BLOCK × BLOCK numbers, or those of a block's features."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(fid, "BLOCK", 16)
    real, fake = _samples(400, 5, 1), _samples(300, 5, 2)
    with Watch():
        kernel_distance(real, fake)
    assert largest == 16 * 16


def test_missing_inception_names_the_file(tmp_path) -> None:
    with pytest.raises(UserError, match=r"metrics.inception=.*nothing.pth: no such file"):
        InceptionFeatures(tmp_path / "nothing.pth")
    (tmp_path / "rubbish.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"torch-fidelity|does not hold Inception weights"):
        InceptionFeatures(tmp_path / "rubbish.pth")
