"""The base class of callbacks: once per completed optimizer step, also with accumulation, validation and a resume."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks.bad_samples import BadSamples
from callbacks.base import OptimizerStepCallback, log_now


class Line(pl.LightningModule):
    """One weight; notes at each micro-batch how many steps are completed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class TwoOptimizers(Line):
    """Manual optimization of two batches per step, as the tokenizer's training does it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        self.manual_backward(self.layer(batch).sum())
        if index % 2:
            self.optimizers().step()


class Steps(OptimizerStepCallback):
    """Notes its calls, and the micro-batches that Lightning reports."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.batches = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        self.batches += 1
        super().on_train_batch_end(trainer, pl_module, *args)

    def on_optimizer_step_end(self, trainer: pl.Trainer, module: pl.LightningModule, step: int) -> None:
        assert step == trainer.global_step
        self.steps.append(step)
        log_now(trainer, {"step": torch.tensor(step), "square": step**2})


def fit(
    folder: Path, steps: int, accumulate: int = 1, module: Line | None = None, resume: Path | None = None
) -> Steps:
    callback = Steps()
    trainer = pl.Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, callbacks=[callback], accelerator="cpu",
        logger=[CSVLogger(folder, "a"), CSVLogger(folder, "b")], log_every_n_steps=1000, val_check_interval=3,
        check_val_every_n_epoch=None, limit_val_batches=1, num_sanity_val_steps=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.ones(40, 1), batch_size=2)
    trainer.fit(module or Line(), data, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "end.ckpt")
    return callback


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_step_counts_once(tmp_path: Path, accumulate: int) -> None:
    callback = fit(tmp_path, 4, accumulate)
    assert callback.steps == [1, 2, 3, 4]
    assert callback.batches == 4 * accumulate


def test_each_step_of_manual_optimization_counts_once(tmp_path: Path) -> None:
    callback = fit(tmp_path, 3, module=TwoOptimizers())
    assert callback.steps == [1, 2, 3]
    assert callback.batches == 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_does_not_repeat_the_step_of_its_checkpoint(tmp_path: Path, accumulate: int) -> None:
    fit(tmp_path, 2, accumulate)
    assert fit(tmp_path, 5, accumulate, resume=tmp_path / "end.ckpt").steps == [3, 4, 5]


def test_values_are_logged_at_once_by_all_loggers(tmp_path: Path) -> None:
    """The trainer itself logs every 1000 steps only."""
    fit(tmp_path, 3, accumulate=2)
    for name in "ab":
        lines = (tmp_path / name / "version_0" / "metrics.csv").read_text().splitlines()
        rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
        values = [(int(row["step"]), float(row["square"])) for row in rows]
        assert values == [(1, 1.0), (2, 4.0), (3, 9.0)]


def test_counts_of_bad_samples_keep_their_key_in_checkpoints(tmp_path: Path) -> None:
    assert BadSamples(tmp_path).state_key == "DataDamage"
