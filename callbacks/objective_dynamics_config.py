"""Settings of early stopping by an objective's dynamics (DVAR and the rules it is compared with). Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from switti.config_values import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, check
from switti.errors import UserError


@dataclass
class ObjectiveDynamicsConfig:
    """Early stopping when the training objective on one fixed batch has stopped changing (arXiv 2302.04841)."""

    criterion: Literal["dvar", "ema_change", "hall", "trend", "clip_s"] | None = None
    """What ends the run. dvar: variance of the last `window` evaluations over the variance of all; ema_change: relative
    change of their moving average; hall: their range over their mean; trend: their slope; clip_s: an image score that
    no longer gains. Null: nothing is evaluated."""
    every: int = 1
    """Optimizer steps between evaluations; skipped steps do not count. The paper has 1, and 50 for clip_s."""
    window: int = 200
    """Evaluations over which dvar, ema_change, hall and trend look back. It delays the stop by about as many
    evaluations: the paper has 180 to 440; runs of a few hundred steps want 40 to 60."""
    threshold: float = 0.15
    """Stop as soon as the magnitude of the statistic is below it. The paper has 0.15 to 0.4 for dvar; no value of the
    other criteria serves more than one data set."""
    batch: int = 4
    """Training images of the fixed batch, drawn once by the run's seed; all of them if there are fewer. The paper has
    4. For clip_s: images that are sampled and scored, one for each of their captions; the paper has 8."""
    min_steps: int = 0
    """Completed steps before which the run is not stopped."""
    margin: float = 0.02
    """For clip_s: a score counts as a gain if it exceeds the best one so far by more than this."""
    patience: int = 6
    """For clip_s: scores in a row without a gain after which one more ends the run."""
    score: Literal["mini_clip_score", "clip_score", "pick_score"] = "mini_clip_score"
    """For clip_s: the metric, whose networks metrics.* name."""

    @property
    def enabled(self) -> bool:
        return self.criterion is not None

    @property
    def least_steps(self) -> int:
        """Completed steps at the earliest possible stop."""
        evaluations = self.patience + 1 if self.criterion == "clip_s" else self.window
        return self.every * evaluations

    def validate(self, path: str) -> None:
        check(self, path, AT_LEAST_1, "every", "batch")
        check(self, path, NOT_NEGATIVE, "min_steps", "margin", "patience")
        check(self, path, (lambda value: value >= 2, "must be at least 2 evaluations"), "window")
        if self.criterion in (None, "dvar"):
            words = "must lie in (0, 1): it is a share of the variance, such as 0.15"
            check(self, path, (lambda value: 0.0 < value < 1.0, words), "threshold")
        check(self, path, POSITIVE, "threshold")

    def check_length(self, path: str, task: str, max_steps: int) -> None:
        """UserError if the run is too short to be stopped, or of a task that has nothing to evaluate."""
        if not self.enabled:
            return
        if self.criterion == "clip_s" and task != "generator":
            raise UserError(
                f"{path}.criterion=clip_s scores sampled images, which a {task} run does not have; set it to dvar"
            )
        if self.least_steps > max_steps:
            names = ("patience", "every") if self.criterion == "clip_s" else ("window", "every")
            values = " and ".join(f"{path}.{name}={getattr(self, name)}" for name in names)
            raise UserError(
                f"{values} cannot stop the run before step {self.least_steps}, beyond trainer.max_steps={max_steps}; "
                f"lower {path}.{names[0]} or raise trainer.max_steps"
            )
