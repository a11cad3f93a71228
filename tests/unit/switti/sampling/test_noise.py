"""Noise by counter: the same bits on every device, exponential, and independent of everything but its address."""

import math

import numpy as np
import pytest
import torch

from switti.errors import UserError
from switti.sampling import noise
from switti.sampling.noise import ImageNoise, keys_of

CPU = torch.device("cpu")
# Of seeds 0 and 1 at scale 3; of seed 1.
KEYS = [[2613022947, 1532590702, 2872237355], [4010755824, 4093133998, 1799442052]]
DRAWS = [0.008521, 0.149819, 1.169602, 2.124647, 0.292275, 1.033837]


def draws_at(counters: np.ndarray, key: np.ndarray) -> np.ndarray:
    draws = np.empty(len(counters), np.float32)
    noise._fill_by_blocks(draws, lambda start, stop: counters[start:stop].copy(), key)
    return draws


def test_torch_and_numpy_make_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block in NumPy, all at once in torch; logarithms may differ in their last bit."""
    monkeypatch.setattr(noise, "BLOCK", 1000)
    keys = keys_of([3, 2**64 - 1], 4)
    expected = torch.stack(
        [torch.from_numpy(draws_at(np.arange(4321, dtype=np.uint32), key)) for key in keys]
    )
    counters = torch.arange(4321, dtype=torch.int32)[None]
    bits = noise._hashed_by_torch(counters, torch.from_numpy(keys.view(np.int32)).T[:, :, None])
    torch.testing.assert_close(noise._exponential_by_torch(bits), expected, rtol=1e-6, atol=0)


def test_the_hash_is_the_published_one() -> None:
    """In Python's own integers."""
    key = (0x12345678, 0x9ABCDEF0, 0x0F1E2D3C)

    def hashed(x: int) -> int:
        for (shift, factor), word in zip(
            ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)), key, strict=True
        ):
            x ^= word
            x ^= x >> shift
            x = x * factor % 2**32
        return x ^ x >> 14

    counters = [0, 1, 2, 4095, 2**31, 2**32 - 1]
    draws = draws_at(np.array(counters, np.uint32), np.array(key, np.uint32))
    expected = [-math.log(((hashed(x) >> 9) + 0.5) / 2**23) for x in counters]
    np.testing.assert_allclose(draws, expected, rtol=1e-6)


def test_draws_are_exponential() -> None:
    draws = ImageNoise([7], CPU)(2, (500, 1000)).all().flatten().double()
    assert draws.amin() > 0 and draws.isfinite().all()
    # Kolmogorov-Smirnov at the 0.1 % level.
    ascending = draws.sort().values
    expected = 1 - (-ascending).exp()
    steps = torch.arange(1, len(draws) + 1, dtype=torch.float64) / len(draws)
    assert (expected - steps).abs().amax() < 1.95 / math.sqrt(len(draws))


@pytest.mark.parametrize("other", [(8, 2, 0), (7, 3, 0), (7, 2, 1)], ids=["seed", "scale", "token"])
def test_streams_are_not_related(other: tuple[int, int, int]) -> None:
    """Of neighbouring seeds, scales and tokens: no correlation of the draws, nor of neighbours in a row."""
    seed, scale, shift = other
    first = ImageNoise([7], CPU)(2, (101, 4096)).all()[0, :100]
    second = ImageNoise([seed], CPU)(scale, (101, 4096)).all()[0, shift : 100 + shift]
    for lag in (0, 1, 2, 64):
        a, b = first.flatten()[: first.numel() - lag], second.flatten()[lag:]
        if torch.equal(a, b):
            raise AssertionError("the same draws")
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / math.sqrt(len(a))


def test_an_image_has_its_own_stream_in_any_batch() -> None:
    together = ImageNoise([5, 6, 7], CPU)(1, (9, 32)).all()
    alone = ImageNoise([6], CPU)(1, (9, 32))
    assert torch.equal(alone.all()[0], together[1])
    places = np.array([3, 32, 100, 287])
    assert torch.equal(torch.from_numpy(alone.at(0, places)), together[1].flatten()[torch.from_numpy(places)])


def test_bits_stay_what_they_are() -> None:
    """Images of a seed stay the same from version to version."""
    assert keys_of([0, 1], 3).tolist() == KEYS
    torch.testing.assert_close(ImageNoise([1], CPU)(3, (2, 3)).all().flatten(), torch.tensor(DRAWS))


def test_too_large_a_scale_is_refused() -> None:
    with pytest.raises(UserError, match="more than a stream of noise numbers"):
        ImageNoise([1], CPU)(0, (1 << 20, 1 << 13))
