"""The order of the samples: a permutation an epoch, the same from any position and for any world size."""

from collections import Counter

import numpy as np
import pytest

from datamodules.shards.order import EpochOrder, rank_batch_size, rank_positions, validation_batches
from switti.errors import UserError

COUNTS = [5, 1, 7, 3, 4]
N = sum(COUNTS)


def samples(order: EpochOrder, start: int, stop: int) -> list[int]:
    return [order.sample(position)[1] for position in range(start, stop)]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 9])
def test_every_epoch_visits_each_sample_once(window):
    order = EpochOrder(COUNTS, window, seed=3)
    for epoch in range(4):
        visited = samples(order, epoch * N, (epoch + 1) * N)
        assert sorted(visited) == list(range(N))
        assert {order.sample(p)[0] for p in range(epoch * N, (epoch + 1) * N)} == {epoch}


def test_epochs_and_seeds_differ_and_repeat():
    first = samples(EpochOrder(COUNTS, 2, 0), 0, 2 * N)
    assert first[:N] != first[N:]
    assert first == samples(EpochOrder(COUNTS, 2, 0), 0, 2 * N)
    assert first != samples(EpochOrder(COUNTS, 2, 1), 0, 2 * N)


def test_window_keeps_its_shards_together():
    order = EpochOrder([4] * 6, 2, seed=0)
    for start in range(0, 24, 8):  # a window is two shards of four
        assert len({order.locate(s)[0] for s in samples(order, start, start + 8)}) == 2


def test_locate_against_a_flat_list():
    flat = [(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)]
    order = EpochOrder(COUNTS, 2, 0)
    assert [order.locate(sample) for sample in range(N)] == flat


def test_shuffle_is_uniform():
    """Each sample lands on each place equally often: chi-square over 4 000 epochs, 25 cells, mean 160."""
    order = EpochOrder([5], 1, seed=11)
    table = np.zeros((5, 5))
    for epoch in range(800):
        for place, sample in enumerate(samples(order, epoch * 5, epoch * 5 + 5)):
            table[place, sample] += 1
    assert ((table - 160) ** 2 / 160).sum() < 40  # 16 degrees of freedom: P(> 40) < 0.001


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("consumed", [0, 8, 16, 3 * N + 1])
def test_ranks_together_read_the_global_batch_in_order(world_size, consumed):
    share = rank_batch_size(8, world_size, accumulate=1)
    joined = [p for rank in range(world_size) for p in rank_positions(consumed, share, rank, world_size)]
    assert joined == list(range(consumed, consumed + 8))


def test_accumulation_divides_the_batch_of_a_step():
    assert rank_batch_size(64, 4, 2) == 8
    for batch, world_size, accumulate in ((10, 4, 1), (2, 4, 1), (8, 2, 3)):
        with pytest.raises(UserError, match=f"data.batch_size={batch}"):
            rank_batch_size(batch, world_size, accumulate)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("share", [1, 2, 5])
@pytest.mark.parametrize("count", [4, 5, 9, 16, 33])
def test_validation_is_shared_out_whole_and_in_step(world_size, share, count):
    ranks = [validation_batches(count, share, rank, world_size) for rank in range(world_size)]
    assert Counter(s for batches in ranks for batch in batches for s in batch) == Counter(range(count))
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) >= 1 and max(sizes) <= share + 1


def test_first_validation_batches_do_not_depend_on_the_world_size():
    for world_size in (1, 2, 4):
        first = [validation_batches(33, 8 // world_size, rank, world_size)[0] for rank in range(world_size)]
        assert sorted(s for batch in first for s in batch) == list(range(8))


def test_more_ranks_than_validation_samples():
    with pytest.raises(UserError, match="3 samples for 4 ranks"):
        validation_batches(3, 2, 0, 4)
