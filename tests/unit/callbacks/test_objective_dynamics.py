"""Early stopping by an objective's dynamics: what is evaluated, when, what it leaves untouched, and when it stops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_cases import TOKENIZER, fit, module
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import default_collate
from training_samples import random_sample

from callbacks.checkpointing import find_resume
from callbacks.objective_dynamics import FixedBatchLoss, ObjectiveDynamics, build_rule
from callbacks.objective_dynamics_config import ObjectiveDynamicsConfig
from callbacks.skipped_steps import SkippedSteps
from configs.loading import load
from configs.resume_rules import FIXED
from switti.errors import UserError
from switti.losses.cross_entropy import token_losses
from switti.objective_dynamics import WindowRule, stop_evaluation
from switti.run_folder import metric_values

NEVER = WindowRule("dvar", 4, 1e-9)


def fixed_batch(count: int = 3) -> dict[str, Any]:
    return default_collate([random_sample(500 + i, TOKENIZER.resolution) for i in range(count)])


class Scripted:
    """An objective whose values are given."""

    name = "loss"

    def __init__(self, values: list[float], identity: str = "a") -> None:
        self.values, self.identity, self.steps = values, [identity], []

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        assert not module.training

    def evaluate(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert not module.training and not torch.is_grad_enabled()
        torch.rand(5)
        self.steps.append(trainer.global_step)
        return {"loss": self.values[trainer.global_step], "other": 1.0}


class Poison(Callback):
    """A not-finite loss at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            batch["text"].fill_(float("nan"))


# ---- what is evaluated --------------------------------------------------------------------------------------------


def test_the_objective_is_the_training_loss_of_the_fixed_batch(tmp_path: Path) -> None:
    """Against the training step's own loss in evaluation mode, with the tokens of the seeds' noise."""
    built = module(steps=3)
    callback = ObjectiveDynamics(NEVER, FixedBatchLoss(fixed_batch()))
    fit(built, tmp_path, callbacks=(callback,))
    assert len(callback.history) == 4
    built.eval()
    with torch.no_grad():
        noise = built.loss_config.latent_noise
        losses, _ = built.compute_losses(fixed_batch(), built.generator, noise, correct=False)
    assert callback.history[-1] == pytest.approx(float(losses.mean), rel=1e-6)
    logged = metric_values(tmp_path, "objective_dynamics/loss")
    assert logged == pytest.approx(dict(enumerate(callback.history)), rel=1e-9)
    scales = [metric_values(tmp_path, f"objective_dynamics/loss_by_scale/{k}")[3] for k in range(3)]
    shares = [side**2 / 21 for side in TOKENIZER.scales]
    assert sum(a * b for a, b in zip(scales, shares, strict=True)) == pytest.approx(
        callback.history[-1], rel=1e-5
    )


def test_the_live_weights_are_evaluated_not_their_average(tmp_path: Path) -> None:
    built = module(steps=2)
    callback = ObjectiveDynamics(NEVER, FixedBatchLoss(fixed_batch()))
    fit(built, tmp_path, callbacks=(callback,))
    objective = callback.objective
    assert isinstance(objective, FixedBatchLoss)
    prepared = built.prepare_objective(fixed_batch())
    logits = built.ema_generator(prepared.inputs, *prepared.conditions)
    assert abs(float(token_losses(logits, prepared.tokens, 0.0).mean()) - callback.history[-1]) > 1e-4


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    plain, watched = module(), module()
    losses = fit(plain, tmp_path / "a").losses
    callback = ObjectiveDynamics(NEVER, FixedBatchLoss(fixed_batch()))
    assert fit(watched, tmp_path / "b", callbacks=(callback,)).losses == losses
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_random_streams_and_modes_stay(tmp_path: Path) -> None:
    built = module(steps=2)
    built.configure_model()
    built.generator.blocks[0].eval()
    objective = Scripted([1.0] * 9)
    torch.manual_seed(4)
    expected = torch.rand(3)

    class Draw(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 1:
                self.drawn = torch.rand(3)
            else:
                torch.manual_seed(4)

    draw = Draw()
    fit(built, tmp_path, callbacks=(draw, ObjectiveDynamics(NEVER, objective)))
    assert torch.equal(draw.drawn, expected)
    assert built.generator.training


# ---- when ---------------------------------------------------------------------------------------------------------


def test_it_is_evaluated_every_few_steps_that_were_not_skipped(tmp_path: Path) -> None:
    """Steps 1 and 4 (counted from 0) are skipped."""
    objective = Scripted([float(n) for n in range(20)])
    callback = ObjectiveDynamics(NEVER, objective, every=2)
    fit(module(steps=9), tmp_path, callbacks=(Poison(1, 4), SkippedSteps(9, 9), callback))
    assert objective.steps == [0, 3, 6, 8]
    assert (callback.evaluations, callback.history) == (4, [0.0, 3.0, 6.0, 8.0])


def test_each_step_counts_once_while_gradients_accumulate(tmp_path: Path) -> None:
    objective = Scripted([float(n) for n in range(20)])
    fit(module(steps=3, accumulate=2), tmp_path, callbacks=(ObjectiveDynamics(NEVER, objective),))
    assert objective.steps == [0, 1, 2, 3]


def test_it_stops_at_the_evaluation_of_the_pure_function(tmp_path: Path) -> None:
    values = [1 + math.exp(-n) for n in range(40)]
    rule = WindowRule("dvar", 4, 0.2)
    first = stop_evaluation(rule, values)
    assert first is not None
    told: list[dict[str, Any]] = []
    callback = ObjectiveDynamics(rule, Scripted(values), on_stop=told.append)
    losses = fit(module(steps=30), tmp_path, callbacks=(callback,)).losses
    assert len(losses) == first - 1
    ratio = rule.statistic(values[:first])
    reason = f"dvar: ratio {ratio:.4g} below 0.2"
    assert told == [{"reason": reason, "step": first - 1, "ratio": ratio, "evaluations": first}]
    assert metric_values(tmp_path, "objective_dynamics/ratio")[first - 1] == ratio
    assert find_resume(tmp_path).name == f"step_{first - 1:06d}.ckpt"


def test_it_does_not_stop_before_min_steps(tmp_path: Path) -> None:
    values = [1 + math.exp(-n) for n in range(40)]
    callback = ObjectiveDynamics(WindowRule("dvar", 4, 0.2), Scripted(values), min_steps=12)
    assert len(fit(module(steps=30), tmp_path, callbacks=(callback,)).losses) == 12


def test_at_the_last_step_nothing_is_stopped_early(tmp_path: Path) -> None:
    values = [1 + math.exp(-n) for n in range(40)]
    rule = WindowRule("dvar", 4, 0.2)
    callback = ObjectiveDynamics(rule, Scripted(values))
    fit(module(steps=stop_evaluation(rule, values) - 1), tmp_path, callbacks=(callback,))
    assert callback.stopped is None


def test_values_that_are_not_finite_neither_poison_nor_stop(tmp_path: Path) -> None:
    values = [1 + math.exp(-n) for n in range(40)]
    rule = WindowRule("dvar", 4, 0.2)
    first = stop_evaluation(rule, values[:1] + values[3:])
    holes = [values[0], math.nan, math.inf, *values[3:]]
    callback = ObjectiveDynamics(rule, Scripted(holes))
    losses = fit(module(steps=30), tmp_path, callbacks=(callback,)).losses
    assert callback.dropped == 2 and len(losses) == first + 1
    assert metric_values(tmp_path, "objective_dynamics/dropped") == {1: 1.0, 2: 2.0}


# ---- resume -------------------------------------------------------------------------------------------------------


def resumed(folder: Path, callback: ObjectiveDynamics, steps: int) -> list[float]:
    return fit(module(steps=steps), folder, callbacks=(callback,), resume=find_resume(folder)).losses


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    rule = WindowRule("dvar", 4, 0.6)
    whole, first, rest = (ObjectiveDynamics(rule, FixedBatchLoss(fixed_batch()), every=2) for _ in range(3))
    length = len(fit(module(steps=60), tmp_path / "a", callbacks=(whole,)).losses)
    assert 8 < length < 60
    fit(module(steps=60), tmp_path / "b", callbacks=(first,), stop_after=5)
    assert len(resumed(tmp_path / "b", rest, 60)) == length - 5
    assert (rest.history, rest.stopped) == (whole.history, whole.stopped)


def test_a_stopped_run_stays_stopped_until_max_steps_is_raised(tmp_path: Path) -> None:
    values = [1 + math.exp(-n) for n in range(40)]
    rule = WindowRule("dvar", 4, 0.2)
    step = stop_evaluation(rule, values) - 1
    fit(module(steps=20), tmp_path, callbacks=(ObjectiveDynamics(rule, Scripted(values)),))
    told: list[dict[str, Any]] = []
    again = ObjectiveDynamics(rule, Scripted(values), on_stop=told.append)
    assert resumed(tmp_path, again, 20) == [] and told[0]["step"] == step
    further = ObjectiveDynamics(rule, Scripted(values), on_stop=told.append)
    assert len(resumed(tmp_path, further, 24)) == 24 - step
    assert len(told) == 1 and len(further.history) == 25


def test_a_history_of_other_images_begins_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(module(steps=8), tmp_path, callbacks=(ObjectiveDynamics(NEVER, Scripted([1.0] * 20)),), stop_after=3)
    other = ObjectiveDynamics(NEVER, Scripted([2.0] * 20, identity="b"))
    resumed(tmp_path, other, 8)
    assert other.history == [2.0] * 6
    assert "begins again" in caplog.text


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["threshold=0"], r"threshold=0.0 must lie in \(0, 1\)"),
        (["threshold=1"], r"threshold=1.0 must lie in \(0, 1\)"),
        (["every=0"], "every=0 must be at least 1"),
        (["batch=0"], "batch=0 must be at least 1"),
        (["window=1"], "window=1 must be at least 2 evaluations"),
        (["patience=-1"], "patience=-1 must not be negative"),
        (["criterion=dvar", "window=300", "every=2"], "before step 600, beyond trainer.max_steps=500; lower"),
        (["criterion=clip_s", "every=100"], "patience=6 and .*every=100 cannot stop the run before step 700"),
        (["criterion=var"], "not one of dvar, ema_change, hall, trend, clip_s"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings: list[str], words: str) -> None:
    given = [f"callbacks.objective_dynamics.{item}" for item in settings]
    with pytest.raises(UserError, match=words) as caught:
        load("generator/tiny", [*given, "trainer.max_steps=500"])
    assert "\n" not in str(caught.value)


def test_image_scores_need_a_generator() -> None:
    settings = ["callbacks.objective_dynamics.criterion=clip_s", "trainer.max_steps=500"]
    with pytest.raises(UserError, match="a tokenizer run does not have; set it to dvar"):
        load("tokenizer/tiny", settings)


def test_what_decides_may_change_on_resume_and_what_is_evaluated_may_not() -> None:
    group = "callbacks.objective_dynamics."
    assert {name.removeprefix(group) for name in FIXED if name.startswith(group)} == {
        "every",
        "batch",
        "score",
    }


def test_the_rule_follows_the_settings() -> None:
    config = ObjectiveDynamicsConfig(criterion="hall", window=30, threshold=0.5)
    assert build_rule(config) == WindowRule("hall", 30, 0.5)
    assert build_rule(ObjectiveDynamicsConfig(criterion="clip_s", patience=2)).stops(3)


def test_a_module_without_an_objective_is_refused(tmp_path: Path) -> None:
    class Other(LightningModule):
        pass

    with pytest.raises(UserError, match="Other cannot evaluate its loss on a fixed batch"):
        FixedBatchLoss(fixed_batch()).start(Trainer(logger=False), Other())
