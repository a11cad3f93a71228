"""The loader that counts what could not be read. It runs in the main process, where a count is one count."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from datamodules.batches import Batch, Encode, PackedBatch
from datamodules.shards.bad_samples import Damage, Fatal
from datamodules.workers import explained_worker_failures, started
from switti.errors import UserError

log = logging.getLogger(__name__)

FIRST_LOOK = 1000  # the share of damaged samples is not judged on fewer (or on one epoch, if that is smaller)
NAMED = 10


class DamageCount:
    """Counts damaged samples; too large a share of those read ends the run.

    Args:
        limit: data.max_bad_fraction. samples: of an epoch, None for streams.
        watched: somebody claims batch after batch with `claim`, adds up all ranks, and judges the sum with `judge`;
            nothing is judged or logged here.
    """

    def __init__(self, limit: float, samples: int | None, watched: bool = False) -> None:
        self.limit, self.watched = limit, watched
        self.first_look = FIRST_LOOK if samples is None else min(FIRST_LOOK, samples)
        self.read = 0
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._named: set[tuple[str, str]] = set()
        self._unclaimed: deque[tuple[int, list[Damage]]] = deque()

    def add(self, read: int, damages: list[Damage]) -> None:
        """Note a batch. Raises UserError for what is fatal and if, unwatched, the limit is passed."""
        for damage in damages:
            if isinstance(damage, Fatal):
                raise UserError(damage.reason)
        if self.watched:
            self._unclaimed.append((read, damages))
            return
        self.read += read
        for damage in damages:
            self.count += damage.samples
            self.reasons.setdefault(damage.key, damage.reason)
            if (
                damage.kind,
                damage.shard,
            ) not in self._named:  # once a shard: a broken one would fill the log
                self._named.add((damage.kind, damage.shard))
                log.warning(
                    "%s %s: %s (further ones of this shard are counted)",
                    damage.kind.replace("_", " "),
                    damage.key,
                    damage.reason,
                )
        if damages:
            self.judge(self.count, self.read, self.reasons)

    def claim(self) -> tuple[int, list[Damage]]:
        """(samples read, damages) of the oldest batch not yet claimed: that of the step just made, although the
        loader is ahead of it."""
        return self._unclaimed.popleft() if self._unclaimed else (0, [])

    def judge(self, count: int, read: int, reasons: dict[str, str]) -> None:
        """UserError if `count` of `read` samples are too many; reasons: key → reason of some of them."""
        if count <= self.limit * max(read, self.first_look):
            return
        named = "; ".join(f"{key}: {reason}" for key, reason in list(reasons.items())[:NAMED])
        more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        raise UserError(
            f"{count} of {read} samples are damaged, more than data.max_bad_fraction={self.limit}: {named}{more}"
        )


class CountingLoader(DataLoader[Any]):
    """A DataLoader whose batches have passed a DamageCount.

    A batch without any whole sample is left out if may_skip, and otherwise ends the run: ranks must stay in step.
    `waiting`, if set, is called whenever the next batch is asked for. encode: embeds captions that come without.
    """

    def __init__(
        self,
        *args: Any,
        damage: DamageCount,
        may_skip: bool = False,
        encode: Encode | None = None,
        max_length: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.damage, self.may_skip = damage, may_skip
        self.encode, self.max_length = encode, max_length
        self.waiting: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with explained_worker_failures():
            for packed in self._announced():
                self.damage.add(packed.read, packed.damages)
                if batch := packed.unpack(self.encode, self.max_length):
                    yield batch
                elif not self.may_skip:
                    first = packed.damages[0]
                    raise UserError(f"a whole batch is damaged, first {first.key}: {first.reason}")

    def _announced(self) -> Iterator[PackedBatch]:
        if self.waiting is not None:
            self.waiting()
        batches = started(super().__iter__, self.num_workers)
        while True:
            try:
                yield next(batches)
            except StopIteration:
                return
            if self.waiting is not None:
                self.waiting()
