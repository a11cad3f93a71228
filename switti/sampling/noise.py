"""Counter-based random numbers: the noise of a token is a function of (seed, scale, token, codebook entry) alone.

The same bits come out on every device, for every batch size and in every order, and numbers that nothing asks for are
never made. On a CPU NumPy computes them block by block in cache; elsewhere torch does, without a host in between.

Shape suffixes: B images, P tokens of a scale, V codebook entries.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switti import arguments
from switti.errors import UserError

BLOCK = 1 << 15  # numbers that are computed at a time on a CPU, so that they stay in its cache
# Multipliers and shifts of the "triple32" integer hash (C. Wellons, hash-prospector), whose bias is that of a random
# permutation. One word of the key enters before each of its three rounds.
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST_SHIFT = 14
_BITS = 23  # of a draw, in the middle of their intervals: float32 holds them exactly, and none is 0 or 1


@dataclass
class ImageNoise:
    """Exp(1) draws of one random stream an image, so that an image depends on its seed alone.

    Args:
        seeds: one an image, in [0, 2^64); a generator gives a seed and so moves on.
        device: where the draws are made.
        dtype: of the draws, which are computed in float32.
    """

    seeds: Sequence[int | torch.Generator]
    device: torch.device
    dtype: torch.dtype = torch.float32
    _seeds: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._seeds = [_as_seed(seed) for seed in self.seeds]

    def __call__(self, scale: int, shape: tuple[int, int]) -> "ScaleNoise":
        return ScaleNoise(keys_of(self._seeds, scale), shape, torch.device(self.device), self.dtype)


@dataclass
class ScaleNoise:
    """The Exp(1) draws of one scale, made when they are asked for.

    keys_B3: uint32. shape: (P, V).
    """

    keys_B3: np.ndarray
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        tokens, entries = self.shape
        if tokens * entries > 1 << 32:
            raise UserError(
                f"{tokens} tokens of {entries} codebook entries are more than a stream of noise numbers"
            )

    def all(self) -> Tensor:
        """Every draw, [B, P, V]."""
        if self.device.type == "cpu":
            return self._all_on_cpu().to(self.dtype)
        counters = torch.arange(self.shape[0] * self.shape[1], device=self.device)
        # An int32 tensor holds the bits; it wraps around as uint32 does.
        keys = torch.from_numpy(self.keys_B3.view(np.int32)).to(self.device, non_blocking=True)
        bits = _hashed_by_torch(counters.to(torch.int32)[None], keys.T[:, :, None])
        return _exponential_by_torch(bits).view(-1, *self.shape).to(self.dtype)

    def at(self, image: int, positions: np.ndarray) -> np.ndarray:
        """Float32 draws of one image at `positions` = token · V + entry, on a CPU."""
        draws = np.empty(len(positions), np.float32)
        _fill_by_blocks(
            draws, lambda start, stop: positions[start:stop].astype(np.uint32), self.keys_B3[image]
        )
        return draws

    def _all_on_cpu(self) -> Tensor:
        draws = np.empty((len(self.keys_B3), self.shape[0] * self.shape[1]), np.float32)

        def fill(image: int) -> None:
            _fill_by_blocks(
                draws[image],
                lambda start, stop: np.arange(start, stop, dtype=np.uint32),
                self.keys_B3[image],
            )

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(len(draws))))
        return torch.from_numpy(draws).view(-1, *self.shape)


def keys_of(seeds: Sequence[int], scale: int) -> np.ndarray:
    """Keys of the streams of one scale, uint32 [B, 3]."""
    words = [np.random.SeedSequence([seed, scale]).generate_state(3, np.uint32) for seed in seeds]
    return np.stack(words) if words else np.empty((0, 3), np.uint32)


def _fill_by_blocks(draws: np.ndarray, counters: Callable[[int, int], np.ndarray], key: np.ndarray) -> None:
    """Write float32 draws at as many counters, which come in blocks: counters(start, stop), uint32."""
    scratch = np.empty(min(len(draws), BLOCK), np.uint32)
    for start in range(0, len(draws), BLOCK):
        stop = min(len(draws), start + BLOCK)
        x, shifted, out = counters(start, stop), scratch[: stop - start], draws[start:stop]
        for (shift, factor), word in zip(_ROUNDS, key, strict=True):
            x ^= word
            x ^= np.right_shift(x, np.uint32(shift), out=shifted)
            x *= np.uint32(factor)
        x ^= np.right_shift(x, np.uint32(_LAST_SHIFT), out=shifted)
        np.copyto(out, np.right_shift(x, np.uint32(32 - _BITS), out=x), casting="same_kind")
        out += np.float32(0.5)
        out *= np.float32(2.0**-_BITS)
        np.negative(np.log(out, out=out), out=out)


def _hashed_by_torch(x: Tensor, key: Any) -> Tensor:
    """The same bits as int32 tensors; key: three of them that broadcast against `x`."""
    for (shift, factor), word in zip(_ROUNDS, key, strict=True):
        x = x ^ word
        x = x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))
        x = x * (factor - (1 << 32) if factor >= 1 << 31 else factor)
    return x ^ ((x >> _LAST_SHIFT) & ((1 << (32 - _LAST_SHIFT)) - 1))


def _exponential_by_torch(bits: Tensor) -> Tensor:
    """-log of the upper bits as numbers in (0, 1), float32."""
    upper = (bits >> (32 - _BITS)) & ((1 << _BITS) - 1)
    return (upper.to(torch.float32) + 0.5).mul_(2.0**-_BITS).log_().neg_()


def _as_seed(seed: int | torch.Generator) -> int:
    """A number in [0, 2^64) that a stream can start from. Raises UserError for any other."""
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    return arguments.seed("seed", seed)
