"""Fixed samples: a few of a data set, the same for every batch size and number of ranks."""

from itertools import count as numbers

from datamodules.datasets import Samples
from datamodules.shards.bad_samples import Fatal
from datamodules.shards.order import EpochOrder
from datamodules.shards.samples import Sample
from datamodules.stable_seeds import stable_hash
from switti.errors import UserError


def fixed_samples(samples: Samples, seed: int, count: int) -> list[Sample]:
    """`count` different readable samples in the order in which the seed draws them; all if there are not more.

    Each is as in epoch 0. Raises UserError for an error of the machine.
    """
    order = EpochOrder(samples.counts, window=1, seed=0)
    good: list[Sample] = []
    seen: set[int] = set()
    for draw in numbers():
        if len(good) == count or len(seen) == order.samples:
            break
        number = stable_hash(f"{seed}/fixed sample {draw}") % order.samples
        if number in seen:
            continue
        seen.add(number)
        sample = samples.read(*order.locate(number), epoch=0)
        if isinstance(sample, Fatal):
            raise UserError(sample.reason)
        if isinstance(sample, Sample):
            good.append(sample)
    return good


def evenly_spread(samples: Samples, count: int) -> list[tuple[int, int]]:
    """(shard, row) of `count` samples, or of all, spread evenly."""
    places = [(shard, row) for shard, rows in enumerate(samples.counts) for row in range(rows)]
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]
