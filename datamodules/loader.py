"""The loader that counts what could not be read. It runs in the main process, where a count is one count."""

import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from datamodules.samples import DAMAGED, Batch, Damage
from datamodules.streams import StreamFailed
from switti.errors import UserError

log = logging.getLogger(__name__)

FIRST_LOOK = 1000  # the share of damaged samples is not judged on fewer (or on one epoch, if that is smaller)
NAMED = 10


class DamageCount:
    """Counts damaged samples; too large a share of those read ends the run.

    Args:
        limit: data.max_bad_fraction. samples: of an epoch, None for streams.
    """

    def __init__(self, limit: float, samples: int | None) -> None:
        self.limit = limit
        self.first_look = FIRST_LOOK if samples is None else min(FIRST_LOOK, samples)
        self.read = 0
        self.damages: dict[str, str] = {}
        self.count = 0
        self._shards: set[str] = set()

    def add(self, read: int, damages: list[Damage]) -> None:
        """Note a batch. Raises UserError if a stream failed or the limit is passed."""
        self.read += read
        for damage in damages:
            if isinstance(damage, StreamFailed):
                raise UserError(f"stream failed: {damage.key}: {damage.reason}")
            self.count += 1
            self.damages.setdefault(damage.key, damage.reason)
            if damage.shard not in self._shards:  # once a shard: a broken one would fill the log
                self._shards.add(damage.shard)
                log.warning(
                    "damaged picture %s: %s (further ones of this shard are counted)",
                    damage.key,
                    damage.reason,
                )
        if damages and self.count > self.limit * max(self.read, self.first_look):
            named = "; ".join(f"{key}: {reason}" for key, reason in list(self.damages.items())[:NAMED])
            more = f"; and {len(self.damages) - NAMED} more" if len(self.damages) > NAMED else ""
            raise UserError(
                f"{self.count} of {self.read} samples are damaged, more than data.max_bad_fraction={self.limit}: "
                f"{named}{more}"
            )


class CountingLoader(DataLoader[Any]):
    """A DataLoader whose batches have passed a DamageCount.

    A batch without any whole sample is left out if may_skip, and otherwise ends the run: ranks must stay in step.
    """

    def __init__(self, *args: Any, damage: DamageCount, may_skip: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.damage, self.may_skip = damage, may_skip

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            damages = batch.pop(DAMAGED)
            self.damage.add(len(batch.get("key", ())) + len(damages), damages)
            if batch:
                yield batch
            elif not self.may_skip:
                raise UserError(f"a whole batch is damaged, first {damages[0].key}: {damages[0].reason}")
