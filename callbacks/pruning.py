"""Stops a run that a search has given up: the file `prune.json` in the run folder says so."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from switti.run_folder import PRUNE

_SECONDS = 1.0  # between two looks


class Pruning(Callback):
    """Rank zero looks for the file and sends itself SIGTERM: all ranks then finish the step, save and stop as ever.

    The search's driver reads the metric from metrics.csv, decides and writes the file; so the run knows no search,
    may be on another machine, and waits for nobody.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / PRUNE
        self._looked = 0.0
        self._told = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked = 0.0  # there is a new value to be judged by

    def _look(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if self._told or not trainer.is_global_zero or now - self._looked < _SECONDS:
            return
        self._looked = now
        if self.path.is_file():
            self._told = True
            os.kill(os.getpid(), signal.SIGTERM)
