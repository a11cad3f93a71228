"""Shards on disk as map-style data sets: an item is a pure function of its position."""

import errno
import resource
from collections.abc import Callable, Iterator
from typing import Protocol

from torch.utils.data import Dataset, Sampler

from datamodules.images import BadImageError
from datamodules.shards.bad_samples import BadSample, Fatal, Kind
from datamodules.shards.embeddings import EmbeddingStore, MissingEmbeddingError
from datamodules.shards.index import ShardIndex, ShardReader
from datamodules.shards.open_files import CutOffError, is_machine_fault
from datamodules.shards.order import EpochOrder, rank_positions
from datamodules.shards.samples import Framing, Sample, make_sample
from datamodules.shards.shard_paths import unique_names
from datamodules.stable_seeds import sample_seed, stable_hash
from switti.errors import UserError

# Replacements that are tried for a sample that cannot be read.
REPLACEMENTS = 16


class Samples(Protocol):
    """Samples by (shard, row). counts: rows of each shard. store: embeddings of the captions, if there are any."""

    @property
    def counts(self) -> list[int]: ...

    @property
    def store(self) -> EmbeddingStore | None: ...

    def read(self, shard: int, row: int, epoch: int) -> Sample | BadSample: ...


class ShardSamples:
    """Reads samples from shards on disk and joins their embeddings."""

    def __init__(
        self, shards: list[ShardIndex], framing: Framing, store: EmbeddingStore | None, seed: int
    ) -> None:
        self.shards, self.framing, self.store, self.seed = shards, framing, store, seed
        self.counts = [len(shard) for shard in shards]
        self.names = unique_names([shard.path for shard in shards])
        self.reader = ShardReader(shards)

    def read(self, shard: int, row: int, epoch: int) -> Sample | BadSample:
        """The sample, or a report of why it cannot be read."""
        key = f"{self.names[shard]}/{self.shards[shard].keys[row]}"
        try:
            sample = make_sample(
                self.reader.image(shard, row),
                self.reader.caption(shard, row),
                self.reader.meta(shard, row),
                key,
                sample_seed(self.seed, epoch, key),
                self.framing,
            )
            if self.store is not None:
                sample.text = self.store.read(shard, row, sample.variant, sample.caption)
        except (BadImageError, MissingEmbeddingError, OSError, UserError, UnicodeDecodeError) as error:
            if is_machine_fault(error):
                return fatal(self.names[shard], error)
            return BadSample(self.names[shard], key, str(error), kind_of(error))
        return sample


def kind_of(error: Exception) -> Kind:
    """Category of a bad sample, by the exception that reading it raised."""
    if isinstance(error, BadImageError):
        return "undecodable_picture"
    if isinstance(error, MissingEmbeddingError):
        return "missing_embedding"
    if isinstance(error, CutOffError):
        return "truncated_shard"
    if isinstance(error, UnicodeDecodeError):
        return "undecodable_caption"
    return "missing_shard" if isinstance(error, FileNotFoundError) else "unreadable_shard"


def fatal(shard: str, error: Exception) -> Fatal:
    """For an error of the machine, which would hit every other sample as well."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    descriptors = f"data reading has no file descriptor left (limit {limit}): raise it with `ulimit -n 4096`"
    memory = "data reading has no memory left: lower data.workers or data.batch_size"
    reason = memory if getattr(error, "errno", None) == errno.ENOMEM else descriptors
    return Fatal(
        shard, shard, f"{reason}; the same command then resumes the run ({error})", "unreadable_shard"
    )


class TrainingSet(Dataset[Sample | BadSample]):
    """Item i is the sample at position i of the training, counted over all epochs; it has no end.

    A sample that cannot be read is replaced by another one of the epoch, so that batches keep their size on every rank.
    Which one follows from run seed and position alone: the same after a resume, and on any number of ranks. The
    position counts as consumed; the bad sample goes along and is counted in the main process.
    """

    def __init__(self, samples: Samples, order: EpochOrder) -> None:
        self.samples, self.order = samples, order

    def __getitem__(self, position: int) -> Sample | BadSample:
        epoch, number = self.order.sample(position)
        bad = self.samples.read(*self.order.locate(number), epoch)
        if isinstance(bad, Sample | Fatal):
            return bad
        for attempt in range(REPLACEMENTS):
            other = stable_hash(f"{self.order.seed}/{position}/stand-in {attempt}") % self.order.samples
            sample = self.samples.read(*self.order.locate(other), epoch)
            if isinstance(sample, Sample):
                sample.replaced = [bad]
                return sample
        return bad


class ValidationSet(Dataset[Sample | BadSample]):
    """Item i is sample i in the order of the shards, cropped in the centre, always with the seed of epoch 0."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.order = EpochOrder(samples.counts, window=1, seed=0)

    def __len__(self) -> int:
        return self.order.samples

    def __getitem__(self, number: int) -> Sample | BadSample:
        return self.samples.read(*self.order.locate(number), epoch=0)


class PositionBatches(Sampler[list[int]]):
    """This rank's positions in each global batch, starting from the samples consumed when iteration begins."""

    def __init__(self, consumed: Callable[[], int], rank_batch: int, rank: int, world_size: int) -> None:
        self.consumed, self.rank_batch, self.rank, self.world_size = consumed, rank_batch, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed()
        while True:
            yield list(rank_positions(start, self.rank_batch, self.rank, self.world_size))
            start += self.rank_batch * self.world_size
