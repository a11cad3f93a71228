"""The callback that ends a run which a search prunes."""

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn, optim, zeros
from torch.utils.data import DataLoader

from callbacks import pruning
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.checkpointing import build_checkpoint_callback
from callbacks.config import CallbacksConfig
from callbacks.preemption import Preemption
from callbacks.pruning import Pruning
from switti.run_folder import PRUNE


class Line(LightningModule):
    """One weight; writes the driver's file after `given_up` steps."""

    def __init__(self, run_dir: Path, given_up: int) -> None:
        super().__init__()
        self.layer, self.run_dir, self.given_up = nn.Linear(1, 1), run_dir, given_up

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index + 1 == self.given_up:
            (self.run_dir / PRUNE).touch()
        return self.layer(batch).sum()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, given_up: int) -> Trainer:
    trainer = Trainer(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            Pruning(folder),
            Preemption(folder, 60.0),
            build_checkpoint_callback(CallbacksConfig(), folder),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(Line(folder, given_up), DataLoader(zeros(6, 1)))
    return trainer


def test_a_run_that_is_given_up_saves_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_SECONDS", 0.0)
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, given_up=3)
    assert caught.value.code == 75
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_000003.ckpt"]


def test_a_run_that_is_not_given_up_goes_to_its_end(tmp_path: Path) -> None:
    assert fit(tmp_path, given_up=0).global_step == 6


def test_only_rank_zero_tells_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_SECONDS", 0.0)
    signals: list[int] = []
    monkeypatch.setattr(pruning.os, "kill", lambda pid, number: signals.append(number))
    (tmp_path / PRUNE).touch()
    for zero in (False, True):
        callback, trainer = Pruning(tmp_path), SimpleNamespace(is_global_zero=zero)
        for _ in range(3):
            callback.on_train_batch_end(trainer, None)
        assert signals == [signal.SIGTERM] * zero
