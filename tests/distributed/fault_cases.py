"""A program that every rank runs: one fault after another, each of which rank 1 alone meets.

    torchrun --nproc-per-node=2 tests/distributed/fault_cases.py OUT CASE …

Rank zero writes OUT/<case>.json; the cases `signal`, `hang` and `too_much` end the program.
"""

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rank_cases import Samples, Watch, _local, build

from callbacks.bad_samples import BadSamples
from callbacks.checkpointing import RunCheckpoint, find_resume
from callbacks.data_position import DataPosition
from callbacks.ema import ExponentialMovingAverage
from callbacks.heartbeat import Heartbeat
from callbacks.preemption import Preemption
from callbacks.skipped_steps import SkippedSteps
from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from lightning_modules.strategies.parallel import build_strategy, cluster_environment
from switti.distributed.collectives import all_gather_object


class On(Callback):
    """Does something on rank 1 at the start of the batch that follows `step` steps."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            self.action(batch)


class States(Callback):
    """Of each step: whether it was skipped, and this rank's weights, averages and moments."""

    def __init__(self) -> None:
        self.skipped: list[bool] = []
        self.values: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        moments = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        self.skipped.append(pl_module.nonfinite_guard.skipped)
        self.values.append([_local(v).detach().clone() for v in [*pl_module.state_dict().values(), *moments]])


def fit(
    module: LightningModule, data: Any, steps: int, callbacks: list[Callback], resume: Any = None
) -> Trainer:
    settings = getattr(module, "trainer_config", None)
    strategy = "ddp" if settings is None else build_strategy(settings)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=2, strategy=strategy,
        plugins=[*cluster_environment()], log_every_n_steps=1, gradient_clip_val=1.0, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False,
        logger=[c for c in callbacks if isinstance(c, Watch)], callbacks=callbacks,
        enable_checkpointing=any(isinstance(c, RunCheckpoint) for c in callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    return trainer


def poisoned(strategy: str) -> dict[str, Any]:
    """Rank 1's third batch makes the loss NaN there."""
    module = build({"steps": 5, "trainer": {"strategy": strategy, "devices": 2}})
    states, watch = States(), Watch()
    poison = On(2, lambda batch: batch["pooled"].fill_(float("inf")))
    callbacks = [watch, poison, DataPosition(), SkippedSteps(9, 9), ExponentialMovingAverage(0.9), states]
    fit(module, Samples(1), 5, callbacks)
    same = [all(map(torch.equal, a, b)) for a, b in zip(states.values, states.values[1:], strict=False)]
    finite = all(bool(value.isfinite().all()) for value in states.values[-1])
    return {
        "skipped": all_gather_object(states.skipped),
        "same": all_gather_object(same),
        "finite": all_gather_object(finite),
        "counted": watch.logged["train/skipped_steps"],
    }


class Number(LightningModule):
    """Trains one number on pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return (self.weight - batch["image"].mean()) ** 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def damaged(out: Path, limit: float) -> dict[str, Any]:
    """12 samples of which 3 are damaged, two epochs of batches of 4."""
    paths = {split: f"{out}/{split}-*.tar" for split in ("train", "validation")}
    config = DataConfig(**paths, batch_size=4, workers=1, max_bad_fraction=limit)
    data = ShardDataModule(config, seed=0, resolution=8)
    watch, count = Watch(), BadSamples(out)
    fit(Number(), data, 6, [watch, DataPosition(), count])
    bad = {name: values for name, values in watch.logged.items() if name.startswith("data/bad/")}
    return {
        "logged": bad,
        "totals": all_gather_object(count.totals),
        "read": count.read,
        "keys": all_gather_object(watch.keys),
    }


def stopped(out: Path) -> None:
    """Rank 1 alone is told to stop; the first time."""
    folder, resume = out / "signal", find_resume(out / "signal")
    module = build({"steps": 8, "trainer": {"strategy": "ddp", "devices": 2}})
    tell = On(3 if resume is None else -1, lambda batch: os.kill(os.getpid(), signal.SIGUSR1))
    watch = Watch()
    callbacks = [
        watch,
        tell,
        DataPosition(),
        Preemption(folder, 60),
        RunCheckpoint(folder / "checkpoints", 100, 2),
    ]
    trainer = fit(module, Samples(1), 8, callbacks, resume)
    if trainer.is_global_zero:
        content = {"losses": watch.logged["train/loss"], "from": str(resume)}
        (out / "signal.json").write_text(json.dumps(content))


def hung(out: Path) -> None:
    module = build({"steps": 8, "trainer": {"strategy": "ddp", "devices": 2}})
    fit(
        module,
        Samples(1),
        8,
        [Heartbeat(out, 0.5, 8.0), On(3, lambda batch: time.sleep(600)), DataPosition()],
    )


def write(folder: Path, case: str, content: dict[str, Any]) -> None:
    if os.environ["RANK"] == "0":
        (folder / f"{case}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    for case in sys.argv[2:]:
        if case == "signal":
            stopped(folder)
        elif case == "hang":
            hung(folder)
        elif case in ("ddp", "fsdp"):
            write(folder, case, poisoned(case))
        else:
            write(folder, case, damaged(folder, 1.0 if case == "damage" else 0.0))
