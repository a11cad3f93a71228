"""DataLoader that counts bad samples in the main process, where there is one count."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from datamodules.batches import Batch, Encode, PackedBatch
from datamodules.shards.bad_samples import BadSample, Fatal
from datamodules.workers import explained_worker_failures, started
from switti.errors import UserError

log = logging.getLogger(__name__)

# Samples before which the share of bad ones is not judged (or one epoch, if that is smaller).
FIRST_LOOK = 1000
NAMED = 10


class BadSampleCount:
    """Counts samples that cannot be read; too large a share of them ends the run.

    Args:
        limit: data.max_bad_fraction. samples: of an epoch, None for streams.
        watched: a callback takes the reports batch by batch with `claim`, sums them over all ranks, and applies the
            limit with `judge`; nothing is judged or logged here.
    """

    def __init__(self, limit: float, samples: int | None, watched: bool = False) -> None:
        self.limit, self.watched = limit, watched
        self.first_look = FIRST_LOOK if samples is None else min(FIRST_LOOK, samples)
        self.read = 0
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._named: set[tuple[str, str]] = set()
        self._unclaimed: deque[tuple[int, list[BadSample]]] = deque()

    def add(self, read: int, bad: list[BadSample]) -> None:
        """Count a batch. UserError for a fatal error and, if unwatched, where the limit is exceeded."""
        for sample in bad:
            if isinstance(sample, Fatal):
                raise UserError(sample.reason)
        if self.watched:
            self._unclaimed.append((read, bad))
            return
        self.read += read
        for sample in bad:
            self.count += sample.samples
            self.reasons.setdefault(sample.key, sample.reason)
            if (
                sample.kind,
                sample.shard,
            ) not in self._named:  # once a shard: a broken one would fill the log
                self._named.add((sample.kind, sample.shard))
                log.warning(
                    "%s %s: %s (further ones of this shard are counted)",
                    sample.kind.replace("_", " "),
                    sample.key,
                    sample.reason,
                )
        if bad:
            self.judge(self.count, self.read, self.reasons)

    def claim(self) -> tuple[int, list[BadSample]]:
        """(samples read, bad) of the oldest batch not yet claimed: that of the step just made, although the
        loader is ahead of it."""
        return self._unclaimed.popleft() if self._unclaimed else (0, [])

    def judge(self, count: int, read: int, reasons: dict[str, str]) -> None:
        """UserError if `count` of `read` samples are too many; reasons: key → reason of some of them."""
        if count <= self.limit * max(read, self.first_look):
            return
        named = "; ".join(f"{key}: {reason}" for key, reason in list(reasons.items())[:NAMED])
        more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        raise UserError(
            f"{count} of {read} samples are missing or corrupt, more than data.max_bad_fraction={self.limit}: "
            f"{named}{more}"
        )


class CountingLoader(DataLoader[Any]):
    """A DataLoader whose batches have passed a BadSampleCount.

    A batch without a readable sample is skipped if may_skip, and otherwise ends the run: ranks must stay in step.
    `waiting`, if set, is called whenever the next batch is asked for. encode: embeds captions that come without.
    """

    def __init__(
        self,
        *args: Any,
        bad_samples: BadSampleCount,
        may_skip: bool = False,
        encode: Encode | None = None,
        max_length: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.bad_samples, self.may_skip = bad_samples, may_skip
        self.encode, self.max_length = encode, max_length
        self.waiting: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        with explained_worker_failures():
            for packed in self._announced():
                self.bad_samples.add(packed.read, packed.bad)
                if batch := packed.unpack(self.encode, self.max_length):
                    yield batch
                elif not self.may_skip:
                    first = packed.bad[0]
                    raise UserError(f"no sample of a batch can be read, first {first.key}: {first.reason}")

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
