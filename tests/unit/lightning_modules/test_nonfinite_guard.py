"""Steps with a loss or gradient that is not finite: skipped, counted, limited; weights and moments stay untouched."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.checkpointing import build_checkpoint_callback, find_resume
from callbacks.config import CallbacksConfig
from callbacks.csv_logger import MetricsCSV
from callbacks.ema import ExponentialMovingAverage
from callbacks.skipped_steps import SkippedSteps
from lightning_modules.nonfinite_guard import NonfiniteGuard
from switti.errors import UserError


class Line(LightningModule):
    """A linear fit by Adam. At `wrong` micro-batches the loss is NaN, or only the gradient is infinite."""

    def __init__(self, wrong: dict[int, str], accumulate: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.ema = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1).requires_grad_(False)
        self.nonfinite_guard = NonfiniteGuard()
        self.wrong, self.accumulate, self.batches = wrong, accumulate, 0
        self.states: list[list[torch.Tensor]] = []

    def ema_pairs(self):
        return [(self.ema, self.layer)]

    def training_step(self, batch, index):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.batches))
        loss = (self.layer(x) - x.sum(1, keepdim=True)).square().mean()
        if self.wrong.get(self.batches) == "loss":
            loss = loss + math.nan  # its gradients are finite: only the loss shows it
        self.batches += 1
        self.nonfinite_guard.watch(loss)
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if self.wrong.get(self.batches - 1) == "gradient":
            self.layer.weight.grad[0, 1] = math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.layer.parameters(), 1.0)
        self.nonfinite_guard.settle(norm, self.layer.parameters())

    def on_train_batch_end(self, outputs, batch, index):
        optimizer = self.trainer.optimizers[0]
        moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
        self.states.append([p.detach().clone() for p in self.parameters()] + moments)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


def train(
    folder: Path, steps: int, wrong: dict[int, str], total: int = 100, in_a_row: int = 5, accumulate: int = 1,
    resume: bool = False,
) -> Line:  # fmt: skip
    checkpoint = build_checkpoint_callback(CallbacksConfig(checkpoint_every=2, keep_last=3), folder)
    callbacks = [SkippedSteps(total, in_a_row), ExponentialMovingAverage(0.9), checkpoint]
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=MetricsCSV(folder), enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    module = Line(wrong, accumulate)
    loader = DataLoader(TensorDataset(torch.zeros(100, 1)))
    trainer.fit(module, loader, ckpt_path=find_resume(folder) if resume else None, weights_only=False)
    return module


def skipped_rows(folder: Path) -> list[tuple[int, float]]:
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return [(int(line[0]), float(line[3])) for line in lines if line[2] == "train/skipped_steps"]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_wrong_step_changes_nothing_but_the_count(tmp_path: Path, how: str) -> None:
    module = train(tmp_path, 6, {2: how, 4: how})
    for step, same in enumerate([False, True, False, True, False], start=1):
        before, after = module.states[step - 1], module.states[step]
        assert all(map(torch.equal, before, after)) == same, step
    assert module.trainer.global_step == 6
    assert skipped_rows(tmp_path) == [(3, 1.0), (5, 2.0)]
    assert all(value.isfinite().all() for value in module.states[-1])


def test_the_rest_is_as_if_the_batch_had_not_been_there(tmp_path: Path) -> None:
    """Adam's own count of steps does not move: the moments after it are corrected as if nothing had happened."""
    module = train(tmp_path / "a", 5, {2: "loss"})
    other = Line({})
    other.batches = 0
    optimizer = other.configure_optimizers()
    for number in (0, 1, 3, 4):
        other.batches = number
        optimizer.zero_grad()
        other.training_step(None, 0).backward()
        torch.nn.utils.clip_grad_norm_(other.layer.parameters(), 1.0)
        optimizer.step()
    assert torch.equal(module.layer.weight, other.layer.weight)


@pytest.mark.parametrize("micro_batch", [2, 3])
def test_one_wrong_micro_batch_skips_the_complete_step(tmp_path: Path, micro_batch: int) -> None:
    module = train(tmp_path, 3, {micro_batch: "loss"}, accumulate=2)
    assert skipped_rows(tmp_path) == [(2, 1.0)]
    assert all(map(torch.equal, module.states[1], module.states[3]))
    assert not all(map(torch.equal, module.states[3], module.states[5]))


def test_too_many_in_a_row_end_the_run_and_leave_a_good_checkpoint(tmp_path: Path) -> None:
    wrong = dict.fromkeys(range(4, 50), "loss")
    with pytest.raises(UserError, match=r"step 7: 3 steps in a row .* callbacks\.max_skipped_in_a_row=2"):
        train(tmp_path, 20, wrong, in_a_row=2)
    state = torch.load(find_resume(tmp_path), weights_only=False)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_the_total_is_counted_over_restarts(tmp_path: Path) -> None:
    train(tmp_path, 4, {1: "loss", 3: "loss"}, total=3)
    with pytest.raises(UserError, match=r"step 7: 4 steps in all .* callbacks\.max_skipped_steps=3"):
        train(tmp_path, 12, {0: "loss", 2: "loss"}, total=3, resume=True)
    assert skipped_rows(tmp_path) == [(2, 1.0), (4, 2.0), (5, 3.0), (7, 4.0)]
