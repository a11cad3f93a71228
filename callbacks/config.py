"""Settings of the callbacks. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from callbacks.objective_dynamics_config import ObjectiveDynamicsConfig
from switti.config_values import AT_LEAST_1, NOT_NEGATIVE, OFF_OR_POSITIVE, POSITIVE, check
from switti.import_path import check_paths


@dataclass
class CallbacksConfig:
    """What is measured, drawn and saved during a run, and when a run stops. `*_every` counts optimizer steps."""

    activation_norms_every: int = 50
    """Steps between measurements of the norms of every block's output (Figure 3). 0: never."""
    metrics_every: int = 0
    """Steps between measurements of metrics.* on generated images. 0: never."""
    samples_every: int = 500
    """Steps between sample grids, one with guidance and one without. 0: never."""
    sample_prompts: list[str] = field(default_factory=list)
    """Captions of the sample grids. Empty: sample_count captions spread evenly over the validation split;
    where that has held-out pairs of concept and style, half are training captions and half are held-out pairs."""
    sample_count: int = 8
    """Images in a sample grid if sample_prompts is empty."""
    ema_decay: float | None = 0.999
    """Decay of the weights' exponential moving average per step, in (0, 1); lower in the first steps. Sampling,
    validation of tokenizers and exports use the EMA. Null: no EMA."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is also written at the end and when the run is interrupted."""
    keep_last: int = 2
    """Number of the newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this one are kept for good. 0: none."""
    best_metric: str | None = None
    """Metric of a validation, such as validation/loss: the checkpoint with its best value is kept as best.ckpt. Null:
    none."""
    best_mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value of best_metric is the best one."""
    prunable: bool = False
    """Let a search stop the run early when its trial is pruned; set by experiments.sweep."""
    grace_seconds: float = 120.0
    """Seconds between a scheduler's signal and the end of the process, for the step to finish and be saved. Less than
    the scheduler itself allows."""
    requeue: bool = True
    """Under SLURM, requeue the job after SIGUSR1 or SIGUSR2."""
    max_skipped_steps: int = 100
    """Most optimizer steps in the run that may be skipped because their loss or gradient is not finite; one more stops
    the run."""
    max_skipped_in_a_row: int = 5
    """Most such steps in a row; one more stops the run."""
    heartbeat_seconds: float = 5.0
    """Seconds between two updates of `heartbeat/rank_<r>.json`, which experiments.status reads."""
    watchdog_seconds: float = 1800.0
    """Seconds without progress after which every rank prints its stack and the run ends; more than the longest
    validation, sampling or saving takes. 0: never."""
    objective_dynamics: ObjectiveDynamicsConfig = field(default_factory=ObjectiveDynamicsConfig)
    """Early stopping when the training objective on one fixed batch has stopped changing."""
    extra: list[str] = field(default_factory=list)
    """Callbacks of your own, each `package.module:Name` of a Lightning Callback class that is built without arguments,
    or of a function of the run's settings that returns one (docs/extending.md). They run before checkpoints are
    written, which hold their state."""

    def validate(self, path: str) -> None:
        check_paths(f"{path}.extra", self.extra)
        intervals = ("activation_norms_every", "metrics_every", "samples_every", "keep_every")
        check(self, path, OFF_OR_POSITIVE, *intervals)
        check(self, path, AT_LEAST_1, "sample_count", "checkpoint_every", "keep_last")
        check(self, path, NOT_NEGATIVE, "max_skipped_steps", "max_skipped_in_a_row", "watchdog_seconds")
        check(self, path, POSITIVE, "grace_seconds", "heartbeat_seconds")
        decay = (lambda value: 0.0 < value < 1.0, "must lie in (0, 1), or be null for no EMA")
        check(self, path, decay, "ema_decay")
