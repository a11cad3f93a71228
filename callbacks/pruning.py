"""Pruning: ends a run when a search asks for it with the file `prune.json` in the run folder."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from switti.run_folder import PRUNE

# Between two checks.
_SECONDS = 1.0


class Pruning(Callback):
    """Rank zero looks for the file and sends itself SIGTERM: all ranks then finish the step, save and stop as usual.

    The search's driver reads the metric from metrics.csv, decides and writes the file; so the run does not depend on
    the search, may be on another machine, and waits for nobody.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / PRUNE
        self._checked = 0.0
        self._pruned = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # There is a new value to be judged by.
        self._checked = 0.0

    def _check(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if self._pruned or not trainer.is_global_zero or now - self._checked < _SECONDS:
            return
        self._checked = now
        if self.path.is_file():
            self._pruned = True
            os.kill(os.getpid(), signal.SIGTERM)
