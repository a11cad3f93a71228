"""Counts of what could not be read: over workers, ranks and restarts, by kind and shard, with a list and a limit."""

import csv
import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from switti.distributed.collectives import all_gather_object, all_reduce_sum
from switti.environment import masked
from switti.errors import UserError
from switti.files import atomic_write, check_target, read_bytes, writing
from switti.run_folder import DAMAGED

log = logging.getLogger(__name__)

COLUMNS = ("step", "kind", "shard", "key", "reason")
LISTED = 10_000  # more are counted, not listed
_MAX_BYTES = 64 << 20


class DataDamage(Callback):
    """Logs data/bad/<kind>, samples since the run began, whenever one of them grows; damaged.csv names each once.

    A line of the log tells kind and shard at the 1st, 2nd, 4th, 8th, … time. The data module's limit is applied to the
    sum of all ranks, so that all of them end at the same step, with the list in the error. Counts belong to batches
    that were trained on: what workers have read ahead is counted when its turn comes, also after a resume.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / DAMAGED
        self.read = self.bad = (
            0  # of the order's samples; those that never had a place there are judged beforehand
        )
        self.by_shard: Counter[tuple[str, str]] = Counter()  # (kind, shard)
        self._rows: dict[tuple[str, str], tuple[Any, ...]] = {}  # (kind, key) → row of the list
        self._read_here = 0
        self._damages_here: list[tuple[Any, ...]] = []
        self._step = 0

    @property
    def totals(self) -> dict[str, int]:
        """Samples by kind."""
        found: Counter[str] = Counter()
        for (kind, _), number in self.by_shard.items():
            found[kind] += number
        return dict(sorted(found.items()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.datamodule.watched = True  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was missing from the beginning is counted once; a resumed run has it in its checkpoint."""
        self._step = trainer.global_step
        self._rows = self._listed_until(self._step) if self._step else {}
        if trainer.is_global_zero and self.path.is_file():
            with atomic_write(self.path) as temporary:
                temporary.write_text("")
            self._append(list(self._rows.values()))
        if not self._step:
            losses = [_plain(loss) for loss in trainer.datamodule.losses]  # type: ignore[attr-defined]
            self._add(trainer, losses)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        counted = trainer.datamodule.damage  # type: ignore[attr-defined]
        read, damages = counted.claim()
        self._read_here += read
        self._damages_here += [_plain(damage) for damage in damages]
        if trainer.global_step == self._step:
            return  # gradients are being accumulated
        self._step = trainer.global_step
        bad = sum(damage[-1] for damage in self._damages_here)
        read, bad, number = all_reduce_sum([self._read_here, bad, len(self._damages_here)])
        self.read, self.bad = self.read + read, self.bad + bad
        if number:
            self._add(trainer, [damage for part in all_gather_object(self._damages_here) for damage in part])
            reasons = {key: reason for (_, key), (*_, reason) in self._rows.items()}
            counted.judge(self.bad, self.read, reasons)
        self._read_here, self._damages_here = 0, []

    def _add(self, trainer: Trainer, damages: list[tuple[Any, ...]]) -> None:
        new: list[tuple[Any, ...]] = []
        for kind, shard, key, reason, samples in damages:
            before = self.by_shard[kind, shard]
            self.by_shard[kind, shard] += samples or 1
            if (kind, key) not in self._rows and len(self._rows) < LISTED:
                self._rows[kind, key] = (self._step, kind, shard, key, reason)
                new.append(self._rows[kind, key])
            if trainer.is_global_zero and self.by_shard[kind, shard].bit_length() > before.bit_length():
                now = self.by_shard[kind, shard]
                log.warning("bad data: %s × %s in %s, last %s: %s", now, kind, shard, key, reason)
        if damages:
            values = {f"data/bad/{kind}": float(number) for kind, number in self.totals.items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self._step)
        if new and trainer.is_global_zero:
            self._append(new)

    # ---- the list (rank zero writes) and the state --------------------------------------------------------------

    def _append(self, rows: list[tuple[Any, ...]]) -> None:
        check_target(self.path)
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            if stream.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerows(rows)

    def _listed_until(self, step: int) -> dict[tuple[str, str], tuple[Any, ...]]:
        """What the file lists up to the step that the run goes on from; later entries will come again."""
        if not self.path.is_file():
            return {}
        text = read_bytes(self.path, _MAX_BYTES).decode("utf-8", errors="replace")
        try:
            rows = [[row.get(name) or "" for name in COLUMNS] for row in csv.DictReader(io.StringIO(text))]
        except csv.Error as error:
            raise UserError(f"{self.path} is not valid CSV ({error}); move it away") from error
        return {
            (kind, key): (int(at), kind, shard, key, reason)
            for at, kind, shard, key, reason in rows
            if at.isdecimal() and len(at) < 19 and int(at) <= step
        }

    def state_dict(self) -> dict[str, Any]:
        by_shard = [[*names, number] for names, number in self.by_shard.items()]
        return {"read": self.read, "bad": self.bad, "by_shard": by_shard}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.read, self.bad = state_dict["read"], state_dict["bad"]
        self.by_shard = Counter({(kind, shard): number for kind, shard, number in state_dict["by_shard"]})


def _plain(damage: Any) -> tuple[Any, ...]:
    """Of a datamodules.shards.samples.Damage: what can be sent and listed."""
    return damage.kind, masked(damage.shard), masked(damage.key), masked(damage.reason), damage.samples
