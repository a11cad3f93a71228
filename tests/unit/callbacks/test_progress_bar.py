"""The bar of a run: steps of all steps, from where it resumed."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.checkpointing import RunCheckpoint, find_resume
from callbacks.progress import StepProgress


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        if self.global_step == 7:
            raise ValueError("seven")
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def bar(folder: Path, steps: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the bar shows in turn of a run with two micro-batches a step and five in an epoch; resumed if it can be."""
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, accumulate_grad_batches=2,
        callbacks=[StepProgress(1), RunCheckpoint(folder, 3, 1)], enable_model_summary=False,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.ones(10, 3)), batch_size=2)
    try:
        trainer.fit(Module(), data, ckpt_path=find_resume(folder.parent))
    finally:
        shown = capsys.readouterr().out
    return re.findall(r"(\d+/\S+) ", shown)


def test_the_bar_counts_the_steps_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    first = list(dict.fromkeys(bar(folder, 3, capsys)))
    assert first == ["0/3", "1/3", "2/3", "3/3"]
    second = list(dict.fromkeys(bar(folder, 6, capsys)))
    assert second == ["3/6", "4/6", "5/6", "6/6"]


def test_an_error_begins_a_new_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = StepProgress(1)
    trainer = Trainer(
        accelerator="cpu", max_steps=9, max_epochs=-1, logger=False, callbacks=[callback],
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="seven"):
        trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(20, 3)), batch_size=2))
    assert capsys.readouterr().out.endswith("\n")


def test_the_rate_is_that_of_this_attempt(tmp_path: Path) -> None:
    callback = StepProgress(1)
    callback._trainer = Trainer(max_steps=100, accelerator="cpu", logger=False, enable_checkpointing=False)
    train_bar = callback.init_train_tqdm()
    train_bar.initial = train_bar.n = 60  # as after a resume
    train_bar.n = 70
    shown = train_bar.format_meter(**{**train_bar.format_dict, "elapsed": 5.0})
    assert "70/100" in shown and "2.00step/s" in shown
