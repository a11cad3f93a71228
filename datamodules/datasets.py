"""Shards on disk as map-style data sets: an item is a pure function of its position."""

from collections.abc import Callable, Iterator

from torch.utils.data import Dataset, Sampler

from datamodules.embeddings import EmbeddingStore
from datamodules.hashing import sample_seed
from datamodules.index import ShardIndex, ShardReader, unique_names
from datamodules.order import EpochOrder, rank_positions
from datamodules.pictures import DamagedPictureError
from datamodules.samples import Damage, Framing, Sample, make_sample

STAND_INS = 16  # so many neighbours of a damaged sample are tried


class ShardSamples:
    """Reads samples by (shard, row) and joins their embeddings."""

    def __init__(
        self, shards: list[ShardIndex], framing: Framing, store: EmbeddingStore | None, seed: int
    ) -> None:
        self.shards, self.framing, self.store, self.seed = shards, framing, store, seed
        self.names = unique_names([shard.path for shard in shards])
        self.reader = ShardReader(shards)

    def read(self, shard: int, row: int, epoch: int) -> Sample | Damage:
        """The sample, or what is wrong with it."""
        key = f"{self.names[shard]}/{self.shards[shard].keys[row]}"
        try:
            sample = make_sample(
                self.reader.picture(shard, row),
                self.reader.caption(shard, row),
                self.reader.meta(shard, row),
                key,
                sample_seed(self.seed, epoch, key),
                self.framing,
            )
        except (DamagedPictureError, OSError) as error:
            return Damage(self.names[shard], key, str(error))
        if self.store is not None:
            sample.text = self.store.read(shard, row)
        return sample


class TrainingSet(Dataset[Sample | Damage]):
    """Item i is the sample at position i of the training, counted over all epochs; it has no end.

    A damaged sample is stood in for by the next whole one of its shard, so that batches keep their size on every
    rank; the damage goes along and is counted in the main process.
    """

    def __init__(self, samples: ShardSamples, order: EpochOrder) -> None:
        self.samples, self.order = samples, order

    def __getitem__(self, position: int) -> Sample | Damage:
        epoch, number = self.order.sample(position)
        shard, row = self.order.locate(number)
        damages: list[Damage] = []
        rows = len(self.samples.shards[shard])
        for step in range(min(STAND_INS, rows)):
            sample = self.samples.read(shard, (row + step) % rows, epoch)
            if isinstance(sample, Sample):
                sample.damages = damages
                return sample
            damages.append(sample)
        return damages[0]


class ValidationSet(Dataset[Sample | Damage]):
    """Item i is sample i in the order of the shards, cropped in the centre, always with the seed of epoch 0."""

    def __init__(self, samples: ShardSamples) -> None:
        self.samples = samples
        self.order = EpochOrder([len(shard) for shard in samples.shards], window=1, seed=0)

    def __len__(self) -> int:
        return self.order.samples

    def __getitem__(self, number: int) -> Sample | Damage:
        return self.samples.read(*self.order.locate(number), epoch=0)


class PositionBatches(Sampler[list[int]]):
    """This rank's positions of one global batch after another, from what is consumed when iteration begins."""

    def __init__(self, consumed: Callable[[], int], rank_batch: int, rank: int, world_size: int) -> None:
        self.consumed, self.rank_batch, self.rank, self.world_size = consumed, rank_batch, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.consumed()
        while True:
            yield list(rank_positions(start, self.rank_batch, self.rank, self.world_size))
            start += self.rank_batch * self.world_size
