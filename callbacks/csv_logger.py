"""CSV logger: metrics.csv holds each logged number as one row, which spreadsheets and reports can both read."""

import time
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from switti.run_folder import METRICS, Row, append_metrics, check_metric, rewind_metrics


class CompletedSteps(Logger):
    """A logger whose steps are completed optimizer steps, so that all files of a run agree.

    Lightning's own counter lags by one when it logs, and callbacks count differently; once `follow` has been called,
    the trainer's count replaces both.
    """

    _trainer: Trainer | None = None

    def follow(self, trainer: Trainer) -> None:
        """Take step and epoch from this trainer from now on."""
        self._trainer = trainer

    def completed(self, step: int | None) -> int:
        """The trainer's step if there is a trainer, otherwise the given one."""
        return step or 0 if self._trainer is None else self._trainer.global_step

    @abstractmethod
    def rewind(self, step: int) -> None:
        """Drop what is after `step`: a resumed run writes it again."""


class MetricsCSV(CompletedSteps):
    """Long-format, append-only log. Columns: step, epoch, metric, value, time (Unix seconds).

    Each call is flushed to the file, so that a killed run loses nothing that it had logged.
    """

    def __init__(self, run_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(run_dir) / METRICS
        self._names: set[str] = set()
        self._epoch = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run writes them again. Other rows stay byte for byte."""
        rewind_metrics(self.path.parent, step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row per metric; `epoch` among them fills the column."""
        values = dict(metrics)
        self._epoch = int(values.pop("epoch", self._epoch))
        if self._trainer is not None:
            self._epoch = self._trainer.current_epoch
        if not self._names:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        for name in values.keys() - self._names:
            check_metric(name, len(self._names))
            self._names.add(name)
        now = time.time()
        step = self.completed(step)
        rows = [Row(step, self._epoch, name, float(value), now) for name, value in values.items()]
        append_metrics(self.path.parent, rows)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """No-op: the run folder's config.yaml holds them."""
