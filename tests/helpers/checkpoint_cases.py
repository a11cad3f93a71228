"""Short trainings that write checkpoints, stop and go on."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.checkpointing import AtomicCheckpointIO, build_checkpoint_callback, find_resume
from callbacks.config import CallbacksConfig
from callbacks.preemption import Preemption


class Line(LightningModule):
    """A linear fit by Adam, whose state makes a resume that is not exact visible.

    The data depend on the step alone, as the real data module's do, so that losses can be compared one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.global_step))
        loss = (self.layer(x) - x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class At(Callback):
    """Does something once, at the start of the batch that follows `step` optimiser steps."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.action()


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(8, 1)))


def train(
    run_dir: Path,
    steps: int,
    *callbacks: Callback,
    every: int = 3,
    accumulate: int = 1,
    resume: bool = False,
    grace: float = 60.0,
) -> Line:
    config = CallbacksConfig(checkpoint_every=every, keep_last=2)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*callbacks, Preemption(run_dir, grace), build_checkpoint_callback(config, run_dir)],
        plugins=[AtomicCheckpointIO()],
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    module = Line()
    trainer.fit(module, data(), ckpt_path=find_resume(run_dir) if resume else None)
    return module


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=False)["global_step"]
