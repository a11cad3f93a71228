"""Settings of the callbacks. Imports no torch. `*_every` counts optimiser steps; 0 switches the callback off."""

from dataclasses import dataclass, field
from typing import Literal

from switti.errors import UserError


@dataclass
class CallbacksConfig:
    """What is watched, drawn and saved during a run.

    metrics_every: steps between online metrics (metrics.* says which). samples_every: between sample grids.
    sample_prompts: captions of the grid (empty: the first sample_count validation captions).
    ema_decay: weight of the old average per step (null: no average is kept).
    checkpoint_every: steps between checkpoints; keep_last: how many of the newest stay. keep_every: those of every
      such step stay for good (0: none). best_metric: a validation metric such as validation/loss; the checkpoint of its
      best value stays, too (null: none). best_mode: whether the smallest or the largest value is the best one.
    prunable: a search may give the run up (sweeps set it).
    grace_seconds: time between a signal of the scheduler and the end of the process; less than the scheduler leaves.
    requeue: under SLURM, queue the job again after SIGUSR1 or SIGUSR2.
    max_skipped_steps, max_skipped_in_a_row: more steps than that with a loss or gradient that is not finite, which are
      left out, end the run.
    heartbeat_seconds: between two writings of heartbeat/rank_<r>.json. watchdog_seconds: without any progress for so
      long, every rank says where it stands and the run ends (0: never). More than the longest sampling or saving takes.
    """

    activation_norms_every: int = 50
    metrics_every: int = 0
    samples_every: int = 500
    sample_prompts: list[str] = field(default_factory=list)
    sample_count: int = 8
    ema_decay: float | None = 0.999
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    prunable: bool = False
    grace_seconds: float = 120.0
    requeue: bool = True
    max_skipped_steps: int = 100
    max_skipped_in_a_row: int = 5
    heartbeat_seconds: float = 5.0
    watchdog_seconds: float = 1800.0

    def validate(self, path: str) -> None:
        for name in ("activation_norms_every", "metrics_every", "samples_every", "keep_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must be 0 (off) or positive")
        for name in ("sample_count", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"{path}.{name}={getattr(self, name)} must be at least 1")
        for name in ("max_skipped_steps", "max_skipped_in_a_row", "watchdog_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must not be negative")
        for name in ("grace_seconds", "heartbeat_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{path}.{name}={getattr(self, name)} must be positive")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise UserError(
                f"{path}.ema_decay={self.ema_decay} must lie in (0, 1), or be null for no average"
            )
