"""Count of optimizer steps skipped because a loss or gradient was not finite, with limits that end the run."""

import logging

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.base import OptimizerStepCallback, log_now
from switti.contracts import GuardedModule
from switti.errors import UserError

log = logging.getLogger(__name__)


def was_skipped(module: LightningModule) -> bool:
    """Whether the last optimizer step was skipped; modules that do not guard their steps skip none."""
    return isinstance(module, GuardedModule) and module.nonfinite_guard.skipped


class SkippedSteps(OptimizerStepCallback):
    """Logs train/skipped_steps, their number since the run began, whenever it grows.

    More than `total` of them, or more than `in_a_row`, are a UserError on all ranks, before a checkpoint of that step
    is written. The numbers are part of checkpoints.
    """

    def __init__(self, total: int, in_a_row: int) -> None:
        self.limit_total, self.limit_in_a_row = total, in_a_row
        self.total = self.in_a_row = 0

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if not was_skipped(module):
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        log_now(trainer, {"train/skipped_steps": self.total})
        _warn(f"step {step} skipped: its loss or gradient is not finite ({self.total} in all)")
        for count, limit, setting, words in (
            (self.in_a_row, self.limit_in_a_row, "max_skipped_in_a_row", "in a row"),
            (self.total, self.limit_total, "max_skipped_steps", "in all"),
        ):
            if count > limit:
                raise UserError(
                    f"step {step}: {count} steps {words} had a loss or gradient that is not finite, more than "
                    f"callbacks.{setting}={limit}; the weights are those of the last finite step, and so are the "
                    "checkpoints. Lower optimizer.learning_rate, raise optimizer.warmup_steps, or set "
                    "trainer.precision=32-true"
                )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]


@rank_zero_only
def _warn(message: str) -> None:
    log.warning(message)
