"""Order of training samples: a pure function of (seed, position), so that one integer is the entire state.

A position counts samples from the start of the training, over all epochs and ranks. Every epoch visits each sample
once: its shards are shuffled, and within windows of a few shards all samples are. The shuffle is a sort by hashed
numbers, the same with every version of numpy.
"""

from functools import lru_cache

import numpy as np

from switti.errors import UserError

_MASK = (1 << 64) - 1


class EpochOrder:
    """`EpochOrder(counts, window, seed)`: counts are the samples of each shard; samples are numbered 0 … n - 1
    in the order of the shards."""

    def __init__(self, counts: list[int], window: int, seed: int) -> None:
        self.counts = np.array(counts, np.int64)
        self.firsts = np.concatenate([[0], np.cumsum(self.counts)])
        self.window, self.seed = window, seed
        self._epoch = lru_cache(2)(self._epoch_windows)
        self._window = lru_cache(4)(self._window_samples)

    @property
    def samples(self) -> int:
        """n, the samples of an epoch."""
        return int(self.firsts[-1])

    def sample(self, position: int) -> tuple[int, int]:
        """(epoch, sample number) at a position ≥ 0."""
        epoch, offset = divmod(position, self.samples)
        starts, _ = self._epoch(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        return epoch, int(self._window(epoch, window)[offset - starts[window]])

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample number."""
        shard = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        return shard, sample - int(self.firsts[shard])

    def _epoch_windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(offset in the epoch at which each window starts, all shards in the epoch's order)."""
        shards = _shuffled(np.arange(len(self.counts)), self.seed, epoch, 0)
        ends = np.cumsum(self.counts[shards])
        starts = np.concatenate([[0], ends])[:-1][:: self.window]
        return starts, shards

    def _window_samples(self, epoch: int, window: int) -> np.ndarray:
        _, shards = self._epoch(epoch)
        chosen = shards[window * self.window : (window + 1) * self.window]
        samples = np.concatenate([np.arange(self.firsts[s], self.firsts[s + 1]) for s in chosen])
        return _shuffled(samples, self.seed, epoch, window + 1)

    def __getstate__(self) -> dict[str, object]:
        return {"counts": self.counts.tolist(), "window": self.window, "seed": self.seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def rank_positions(consumed: int, rank_batch: int, rank: int, world_size: int) -> range:
    """Positions of one rank in the global batch that follows `consumed` samples."""
    start = consumed + rank * rank_batch
    return range(start, start + rank_batch)


def rank_batch_size(global_batch: int, world_size: int, accumulate: int) -> int:
    """Samples that one rank reads at a time.

    Raises:
        UserError: the global batch cannot be divided.
    """
    share, rest = divmod(global_batch, world_size * accumulate)
    if rest or not share:
        raise UserError(
            f"data.batch_size={global_batch} must be a multiple of "
            f"{world_size} ranks × trainer.accumulate={accumulate}"
        )
    return share


def validation_batches(samples: int, rank_batch: int, rank: int, world_size: int) -> list[list[int]]:
    """Every sample once, in order; every rank gets the same number of batches and none of them is empty.

    Ranks must agree in the number because sharded models communicate in each forward pass. A rest with fewer samples
    than ranks joins the batch before it.

    Raises:
        UserError: there are fewer samples than ranks.
    """
    if samples < world_size:
        raise UserError(f"data.validation has {samples} samples for {world_size} ranks; use fewer devices")
    step = rank_batch * world_size
    starts = list(range(0, samples, step))
    if len(starts) > 1 and samples - starts[-1] < world_size:
        starts.pop()
    stops = [*starts[1:], samples]
    shares = (np.array_split(np.arange(a, b), world_size)[rank] for a, b in zip(starts, stops, strict=True))
    return [share.tolist() for share in shares]


def _shuffled(values: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    salt = _mix(_mix(_mix(seed) ^ epoch) ^ stream)
    with np.errstate(over="ignore"):
        hashed = _mix_array(values.astype(np.uint64) ^ np.uint64(salt))
    return values[np.argsort(hashed, kind="stable")]


def _mix(x: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers whose output looks random."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
