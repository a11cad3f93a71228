"""Retention of checkpoints: the newest, those of every n-th step, the best validation; and after which events."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.checkpointing import RunCheckpoint, find_resume
from switti.errors import UserError
from switti.files import read_json


class Scripted(LightningModule):
    """Logs the next of given values at each validation."""

    def __init__(self, values: dict[int, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.values = torch.nn.Linear(1, 1), values

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation/loss", self.values[self.global_step])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


VALUES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 2.0, 10: 6.0, 12: 2.5}


def train(folder: Path, steps: int, resume: bool = False, **options: Any) -> RunCheckpoint:
    settings = {"every": 5, "keep_last": 1, "best_metric": "validation/loss", **options}
    callback = RunCheckpoint(folder / "checkpoints", **settings)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], val_check_interval=2, num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.ones(64, 1)))
    path = find_resume(folder) if resume else None
    trainer.fit(Scripted(VALUES), data, DataLoader(TensorDataset(torch.ones(1, 1))), ckpt_path=path)
    return callback


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def best(folder: Path) -> str:
    return (folder / "checkpoints/best.ckpt").resolve().name


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    train(tmp_path, 7)
    assert names(tmp_path) == ["step_000004.ckpt", "step_000007.ckpt"]
    assert best(tmp_path) == "step_000004.ckpt"
    assert read_json(tmp_path / "checkpoints/best.json")["value"] == 3.0


def test_a_better_one_takes_its_place_also_after_a_resume(tmp_path: Path) -> None:
    train(tmp_path, 7)
    train(tmp_path, 12, resume=True)
    assert names(tmp_path) == ["step_000008.ckpt", "step_000012.ckpt"]
    assert best(tmp_path) == "step_000008.ckpt"


def test_a_worse_one_after_a_resume_does_not(tmp_path: Path) -> None:
    train(tmp_path, 9)
    train(tmp_path, 12, resume=True)
    assert best(tmp_path) == "step_000008.ckpt"


def test_the_largest_value_can_be_the_best(tmp_path: Path) -> None:
    train(tmp_path, 12, best_mode="max")
    assert best(tmp_path) == "step_000010.ckpt"


def test_every_so_many_stay_for_good(tmp_path: Path) -> None:
    train(tmp_path, 11, every=1, keep_last=2, keep_every=4, best_metric=None)
    assert names(tmp_path) == [f"step_{n:06d}.ckpt" for n in (4, 8, 10, 11)]


def test_a_metric_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks.best_metric=validation/los .*validation/loss"):
        train(tmp_path, 4, best_metric="validation/los")


def test_later_ones_that_were_passed_over_do_not_push_good_ones_out(tmp_path: Path) -> None:
    train(tmp_path, 10, best_metric=None, keep_last=2)
    newest = tmp_path / "checkpoints/step_000010.ckpt"
    newest.write_bytes(newest.read_bytes()[:-50])
    train(tmp_path, 7, resume=True, best_metric=None)  # resumes from step 5
    assert names(tmp_path) == ["step_000007.ckpt"]
    assert find_resume(tmp_path) == tmp_path / "checkpoints/step_000007.ckpt"


def test_a_best_json_of_another_run_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "best.json").write_text(
        json.dumps({"step": 900, "metric": "validation/loss", "mode": "min", "value": 0.0})
    )
    train(tmp_path, 4)
    assert best(tmp_path) == "step_000004.ckpt"
