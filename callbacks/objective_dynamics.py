"""Early stopping by an objective's dynamics: DVAR on one fixed batch (arXiv 2302.04841), or a rule on image scores.

The objective is evaluated before the first step and after every few optimizer steps, of the live weights, without
gradients and without touching the random streams of training. The decision is a pure function of the history of these
values (`switti.objective_dynamics`). Every rank evaluates the same batch and decides by rank zero's value, so that all
stop at the same step, which is also that of a single process.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from callbacks.base import OptimizerStepCallback, log_now
from callbacks.objective_dynamics_config import ObjectiveDynamicsConfig
from callbacks.online_metrics import ImageMetrics, measure_images, same_modes
from callbacks.prompt_set import PromptSet
from callbacks.skipped_steps import was_skipped
from switti.contracts import ObjectiveModule
from switti.distributed.collectives import all_gather_object
from switti.errors import UserError
from switti.objective_dynamics import PatienceRule, StoppingRule, WindowRule

log = logging.getLogger(__name__)

GROUP = "objective_dynamics"
# Sampled images of a batch.
_IMAGES = 16


class Objective(Protocol):
    """What is evaluated. name: of its value, in the log. identity: what the values of one history have in common."""

    name: str
    identity: list[str]

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the first evaluation, on the module's device."""

    def evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """The value by `name`, and further values for the log. Every rank must call it."""


class FixedBatchLoss:
    """The training loss of one batch, encoded once.

    batch: as of a training loader, on the host; it is taken over when training starts.
    """

    name = "loss"

    def __init__(self, batch: dict[str, Any]) -> None:
        self.identity = list(batch["key"])
        self._batch: dict[str, Any] = batch
        self._prepared: Any = None

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, ObjectiveModule):
            raise UserError(
                f"callbacks.objective_dynamics: {type(module).__name__} cannot evaluate its loss on a fixed batch; "
                "set callbacks.objective_dynamics.criterion=null"
            )
        # Seeds stay on the host, as in a training step.
        batch = {
            name: value.to(module.device) if isinstance(value, Tensor) and name != "seed" else value
            for name, value in self._batch.items()
        }
        with trainer.precision_plugin.val_step_context():
            self._prepared = module.prepare_objective(batch)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert isinstance(module, ObjectiveModule)
        with trainer.precision_plugin.val_step_context():
            values = module.objective(self._prepared)
        numbers = torch.stack([value.detach().double().cpu() for value in values.values()]).tolist()
        return dict(zip(values, numbers, strict=True))


class ImageScore:
    """One metric of images sampled for fixed captions under fixed noise, by the EMA if there is one.

    metrics: builds a set with this metric alone on a device.
    """

    def __init__(
        self, name: str, prompts: PromptSet, metrics: Callable[[torch.device], ImageMetrics]
    ) -> None:
        self.name = name
        self.prompts = prompts
        self.identity = list(prompts.prompts)
        self.build_metrics = metrics
        self._metrics: ImageMetrics | None = None

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        self._metrics = self.build_metrics(module.device)

    def evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert self._metrics is not None
        values = measure_images(trainer, module, self.prompts, self._metrics, _IMAGES)
        # Under the label of its backbone, followed by that of shuffled captions.
        scores = [value for label, value in values.items() if not label.endswith("_shuffled")]
        return {self.name: scores[0] if scores else math.nan}


class ObjectiveDynamics(OptimizerStepCallback):
    """Evaluates `objective` every `every` optimizer steps and stops the run when `rule` says so.

    Skipped steps do not count: a repeated value would shrink the window's variance. A value that is not finite is
    dropped and counted. Logs objective_dynamics/<value> and /<statistic>. History and decision are part of checkpoints;
    a run that was stopped stays stopped when it is resumed, unless `trainer.max_steps` was raised: then it is evaluated
    further, and not stopped again.

    Place it behind callbacks that look at the forward passes of a training step.

    Args:
        min_steps: completed steps before which the run is not stopped.
        on_stop: is told the reason, the step, the statistic and the number of evaluations, as they are recorded.
    """

    def __init__(
        self,
        rule: StoppingRule,
        objective: Objective,
        every: int = 1,
        min_steps: int = 0,
        on_stop: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.rule, self.objective = rule, objective
        self.every, self.min_steps, self.on_stop = every, min_steps, on_stop
        self.history: list[float] = []
        self.evaluations = self.dropped = 0
        # Since the last evaluation.
        self._steps = 0
        # As recorded, and the max_steps of the run at that time.
        self.stopped: dict[str, Any] | None = None
        self._of = self._identity

    @property
    def _identity(self) -> list[str]:
        return [self.objective.name, *self.objective.identity]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._of != self._identity:
            _warn("the objective is evaluated on other images than before: its history begins again")
            self.history, self.evaluations, self._steps, self._of = [], 0, 0, self._identity
        with torch.no_grad(), isolate_rng(), same_modes(pl_module):
            pl_module.eval()
            self.objective.start(trainer, pl_module)
        if self.stopped and trainer.max_steps <= self.stopped["max_steps"]:
            self._stop(trainer)
        elif not self.evaluations:
            self._evaluate(trainer, pl_module)

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if was_skipped(module):
            return
        self._steps += 1
        if self._steps >= self.every:
            self._steps = 0
            self._evaluate(trainer, module)

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        with torch.no_grad(), isolate_rng(), same_modes(module):
            module.eval()
            values = self.objective.evaluate(trainer, module)
        values = all_gather_object(values)[0]
        value = values[self.objective.name]
        self.evaluations += 1
        if not math.isfinite(value):
            self.dropped += 1
            log_now(trainer, {f"{GROUP}/dropped": self.dropped})
            return
        self.history.append(value)
        statistic = self.rule.statistic(self.history)
        if math.isfinite(statistic):
            values = values | {self.rule.label: statistic}
        log_now(trainer, {f"{GROUP}/{name}": number for name, number in values.items()})
        step = trainer.global_step
        may_stop = self.stopped is None and self.min_steps <= step < trainer.max_steps
        if may_stop and self.rule.stops(statistic):
            self.stopped = {
                "reason": self.rule.reason(statistic),
                "step": step,
                self.rule.label: statistic,
                "evaluations": self.evaluations,
                "max_steps": trainer.max_steps,
            }
            _warn(f"stopped at step {step} of {trainer.max_steps}: {self.stopped['reason']}")
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        """On all ranks: each has the same history. What is due at the end of a run follows."""
        assert self.stopped is not None
        trainer.should_stop = True
        if self.on_stop is not None:
            self.on_stop({name: value for name, value in self.stopped.items() if name != "max_steps"})

    def state_dict(self) -> dict[str, Any]:
        return {
            "of": self._of,
            "history": list(self.history),
            "evaluations": self.evaluations,
            "dropped": self.dropped,
            "steps": self._steps,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._of, self.history = list(state_dict["of"]), list(state_dict["history"])
        self.evaluations, self.dropped = state_dict["evaluations"], state_dict["dropped"]
        self._steps, self.stopped = state_dict["steps"], state_dict["stopped"]


def build_rule(config: ObjectiveDynamicsConfig) -> StoppingRule:
    """The rule that `criterion` names."""
    if config.criterion == "clip_s":
        return PatienceRule(config.margin, config.patience)
    assert config.criterion is not None
    return WindowRule(config.criterion, config.window, config.threshold)


@rank_zero_only
def _warn(message: str) -> None:
    log.warning(message)
