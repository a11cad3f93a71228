"""A program that every rank runs: trains a tiny network in each of the cases that a JSON file lists.

    torchrun --nproc-per-node=2 tests/distributed/rank_cases.py cases.json OUT

A case: name, task (none: generator) and settings of TrainerConfig and below. For tokenizers and decoders: loss,
their loss's settings; double: in float64, for which Lightning has no precision under fsdp. Rank zero writes
OUT/<name>.pt: the loss and gradient norm of each step, the keys that each rank saw, the whole final weights, and what
the metrics found.
"""

import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, IterableDataset, default_collate
from training_samples import random_sample

from callbacks.checkpointing import RunCheckpoint, find_resume
from callbacks.data_position import DataPosition
from callbacks.ema import ExponentialMovingAverage
from callbacks.objective_dynamics import FixedBatchLoss, ObjectiveDynamics
from callbacks.online_metrics import OnlineMetrics
from callbacks.prompt_set import PromptSet
from callbacks.rng_state import RngState
from lightning_modules.config import LossConfig, OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning import DecoderTuningModule
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from lightning_modules.generator import GeneratorModule
from lightning_modules.strategies.parallel import build_strategy, cluster_environment
from lightning_modules.tokenizer import TokenizerModule
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.distributed.collectives import all_gather_object
from switti.metrics.collection import build_metrics
from switti.metrics.config import MetricsConfig
from switti.models.config import GeneratorConfig
from switti.objective_dynamics import WindowRule
from switti.sampling.config import SamplingConfig
from switti.text.base import TextEmbedding
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

TOKENIZER = RQVAEConfig(
    scales=[1, 2, 3], codebook_size=32, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
)
# For tasks whose discriminator wants sides that are multiples of 8. A micro-batch has 20 rows: no code is drawn twice,
# of which either could be chosen.
LARGER = RQVAEConfig(
    scales=[1, 2], codebook_size=16, code_width=4, channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1
)
BATCH, EPOCH = 8, 36  # an epoch is no multiple of the batch


class Samples(LightningDataModule):
    """Sample i of every epoch depends on i alone; its position is the number of samples consumed by all ranks."""

    def __init__(
        self, accumulate: int, side: int = TOKENIZER.resolution, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.accumulate, self.side, self.dtype, self.consumed = accumulate, side, dtype, 0

    def batches(self) -> Iterator[dict[str, Any]]:
        start, together = self.consumed, BATCH // self.accumulate
        own = together // self.trainer.world_size
        while True:
            first = start + self.trainer.global_rank * own
            yield self.collate([i % EPOCH for i in range(first, first + own)])
            start += together

    def train_dataloader(self) -> Any:
        return DataLoader(_Stream(self.batches), batch_size=None)

    def val_dataloader(self) -> Any:
        own = 4 // self.trainer.world_size
        first = 100 + self.trainer.global_rank * own
        return DataLoader([self.collate(range(first, first + own))], batch_size=None)

    def collate(self, numbers: Iterable[int]) -> dict[str, Any]:
        batch = default_collate([random_sample(number, self.side) for number in numbers])
        return {**batch, "image": batch["image"].to(self.dtype)}

    def advance(self) -> None:
        self.consumed += BATCH // self.accumulate

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.consumed = state_dict["consumed"]


class _Stream(IterableDataset):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.make()


class Watch(Callback, DummyLogger):
    """Everything that was logged, the keys of every batch, and how large this rank's part of the weights is."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[float]] = {}
        self.keys: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(float(value))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.keys += batch["key"]


class Poison(Callback):
    """A picture of the last rank with a hole, before the step after so many."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            batch["image"][0, 0, 0, 0] = float("nan")


def build_tokenizer(case: dict[str, Any], trainer: TrainerConfig) -> LightningModule:
    """Both tasks with their discriminator, which begins at the second step."""
    losses = {"lpips": 0.0, "adversarial": 0.5, "start_step": 1, "discriminator_features": 4, **case["loss"]}
    # Biases in front of a norm have a gradient of zero but for rounding, which a small eps would blow up.
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, eps=1e-4)
    common: dict[str, Any] = {"seed": 3, "ema": True}
    if case["task"] == "tokenizer":
        return TokenizerModule(LARGER, optimizer, TokenizerLossConfig(**losses), trainer, **common)
    torch.manual_seed(5)
    rqvae = RQVAE(LARGER).double() if case.get("double") else RQVAE(LARGER)
    return DecoderTuningModule(rqvae, optimizer, DecoderTuningConfig(**losses), trainer, **common)


def build(case: dict[str, Any]) -> LightningModule:
    trainer = TrainerConfig(
        max_steps=case.get("steps", 20), log_every=1, **{"precision": "32-true", **case.get("trainer", {})}
    )
    if "task" in case:
        return build_tokenizer(case, trainer)
    model = GeneratorConfig(
        visibility=case.get("visibility", "non_causal"), depth=2, width=32, heads=2, scales=TOKENIZER.scales,
        codebook_size=32, code_width=8, text_width=12, pooled_width=10,
    )  # fmt: skip
    torch.manual_seed(5)
    optimizer = OptimizerConfig(learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=2)
    return GeneratorModule(
        model, RQVAE(TOKENIZER), optimizer, LossConfig(latent_noise=0.1), trainer, seed=3, ema=True
    )


def measured(steps: int) -> OnlineMetrics:
    """Scores of 7 pictures, a number that no number of ranks divides, at the end."""
    rows = [random_sample(200 + i, TOKENIZER.resolution) for i in range(7)]
    text = TextEmbedding(
        *(torch.stack([row[name] for row in rows]) for name in ("text", "text_mask", "pooled"))
    )
    real = torch.stack([(row["image"] + 1) / 2 for row in rows])
    config = MetricsConfig(names=["fid_alexnet", "kid_alexnet"], prompts=7)
    prompts = PromptSet(
        [row["key"] for row in rows], text, text[[0]], list(range(7)), SamplingConfig(top_k=8)
    )
    return OnlineMetrics(steps, prompts, real, lambda device: build_metrics(config, device), batch=2)


def train(case: dict[str, Any], out: Path) -> None:
    seed_everything(7, verbose=False)
    dtype = torch.float64 if case.get("double") else torch.float32
    module, watch = build(case).to(dtype), Watch()
    settings = module.trainer_config
    callbacks = [RngState(7, {}), watch, DataPosition(), ExponentialMovingAverage(0.9)]
    manual = "task" in case
    folder = out / case.get("folder", case["name"])
    if case.get("save"):
        callbacks.append(RunCheckpoint(folder / "checkpoints", case["save"], case.get("keep", 2)))
    if "poison" in case:
        callbacks.append(Poison(case["poison"]))
    data = Samples(settings.accumulate, (LARGER if manual else TOKENIZER).resolution, dtype)
    dynamics = None
    if "dynamics" in case:
        rule = WindowRule("dvar", **case["dynamics"])
        dynamics = ObjectiveDynamics(rule, FixedBatchLoss(data.collate(range(50, 53))))
        callbacks.append(dynamics)
    if case.get("metrics"):
        callbacks.append(measured(case["metrics"]))
    stop = case.get("stop_after")
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        max_steps=stop or settings.max_steps, max_epochs=-1, accelerator=case.get("accelerator", "cpu"),
        devices=settings.devices, num_nodes=settings.num_nodes, strategy=build_strategy(settings),
        plugins=[*cluster_environment()],
        precision=settings.precision,
        accumulate_grad_batches=1 if manual else settings.accumulate,
        gradient_clip_val=None if manual else settings.gradient_clip,
        log_every_n_steps=1, logger=watch, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(case.get("save")), num_sanity_val_steps=0,
        val_check_interval=case.get("validate", 10) * settings.accumulate, check_val_every_n_epoch=None,
        use_distributed_sampler=False, default_root_dir=str(folder),
    )  # fmt: skip
    resume = find_resume(folder) if case.get("resume") else None
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=False)
    parameters = module.state_dict()
    local = sum(_local(p).numel() for p in parameters.values())
    content = {
        "logged": watch.logged,
        "keys": all_gather_object(watch.keys),
        "local_parameters": all_gather_object(local),
        "parameters": sum(p.numel() for p in parameters.values()),
        "tokenizer_parameters": 0 if manual else sum(p.numel() for p in module.tokenizer.parameters()),
        "weights": {name: _whole(p) for name, p in parameters.items()},
        "random": all_gather_object(torch.rand(3)),
    }
    if dynamics is not None:
        content["dynamics"] = all_gather_object((dynamics.history, dynamics.stopped, trainer.global_step))
    if trainer.is_global_zero:
        torch.save(content, out / f"{case['name']}.pt")


def _local(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _whole(parameter: Any) -> torch.Tensor:
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().cpu().clone()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        train(entry, Path(sys.argv[2]))
    if dist.is_initialized():
        dist.destroy_process_group()
