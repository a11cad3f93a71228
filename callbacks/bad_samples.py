"""Counts of missing and corrupt samples over workers, ranks and restarts, by kind and shard, with list and limit."""

import csv
import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from callbacks.base import OptimizerStepCallback, data_module, log_now
from switti.contracts import BadSample
from switti.distributed.collectives import all_gather_object, all_reduce_sum
from switti.environment import masked
from switti.errors import UserError
from switti.files import atomic_write, check_target, read_bytes, writing
from switti.run_folder import DAMAGED

log = logging.getLogger(__name__)

COLUMNS = ("step", "kind", "shard", "key", "reason")
# More are counted, not listed.
LISTED = 10_000
_MAX_BYTES = 64 << 20
# kind, shard, key, reason, number of samples
Report = tuple[str, str, str, str, int]


class BadSamples(OptimizerStepCallback):
    """Logs data/bad/<kind>, samples since the run began, whenever one of them grows; damaged.csv names each once.

    A line of the log names kind and shard at the 1st, 2nd, 4th, 8th, … time. The data module's limit is applied to the
    sum of all ranks, so that all of them end at the same step, with the list in the error. Counts belong to batches
    that were trained on: what workers have read ahead is counted when its turn comes, also after a resume.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / DAMAGED
        # Of the order's samples; those that never had a place there are judged beforehand.
        self.read = self.bad = 0
        # By (kind, shard).
        self.by_shard: Counter[tuple[str, str]] = Counter()
        # (kind, key) → row of the list.
        self._rows: dict[tuple[str, str], tuple[Any, ...]] = {}
        # Of this rank, since the last optimizer step.
        self._read_here = 0
        self._reports_here: list[Report] = []

    @property
    def state_key(self) -> str:
        """The name under which checkpoints hold the counts."""
        return "DataDamage"

    @property
    def totals(self) -> dict[str, int]:
        """Samples by kind."""
        totals: Counter[str] = Counter()
        for (kind, _), number in self.by_shard.items():
            totals[kind] += number
        return dict(sorted(totals.items()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            data_module(trainer).watched = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was missing from the beginning is counted once; a resumed run has it in its checkpoint."""
        super().on_train_start(trainer, pl_module)
        step = trainer.global_step
        self._rows = self._listed_until(step) if step else {}
        if trainer.is_global_zero and self.path.is_file():
            with atomic_write(self.path) as temporary:
                temporary.write_text("")
            self._append(list(self._rows.values()))
        if not step:
            self._add(trainer, [_report(sample) for sample in data_module(trainer).missing_samples])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        reports = data_module(trainer).bad_samples
        # The loader has just returned a batch.
        assert reports is not None
        read, bad = reports.claim()
        self._read_here += read
        self._reports_here += [_report(sample) for sample in bad]
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        bad = sum(report[-1] for report in self._reports_here)
        read, bad, number = all_reduce_sum([self._read_here, bad, len(self._reports_here)])
        self.read, self.bad = self.read + read, self.bad + bad
        if number:
            self._add(trainer, [report for part in all_gather_object(self._reports_here) for report in part])
            reasons = {key: reason for (_, key), (*_, reason) in self._rows.items()}
            reports = data_module(trainer).bad_samples
            assert reports is not None
            reports.judge(self.bad, self.read, reasons)
        self._read_here, self._reports_here = 0, []

    def _add(self, trainer: Trainer, reports: list[Report]) -> None:
        new: list[tuple[Any, ...]] = []
        for kind, shard, key, reason, samples in reports:
            before = self.by_shard[kind, shard]
            self.by_shard[kind, shard] += samples or 1
            if (kind, key) not in self._rows and len(self._rows) < LISTED:
                self._rows[kind, key] = (trainer.global_step, kind, shard, key, reason)
                new.append(self._rows[kind, key])
            now = self.by_shard[kind, shard]
            if trainer.is_global_zero and now.bit_length() > before.bit_length():
                log.warning("bad data: %s × %s in %s, last %s: %s", now, kind, shard, key, reason)
        if reports:
            log_now(trainer, {f"data/bad/{kind}": number for kind, number in self.totals.items()})
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
        """What the file lists up to the step that the run resumes from; later entries will come again."""
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


def _report(sample: BadSample) -> Report:
    """What can be sent to other ranks and listed."""
    return sample.kind, masked(sample.shard), masked(sample.key), masked(sample.reason), sample.samples
