"""Short trainings of a small generator on random images, in the order of their numbers."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from training_samples import random_sample

from callbacks.checkpointing import AtomicCheckpointIO, build_checkpoint_callback
from callbacks.config import CallbacksConfig
from callbacks.csv_logger import MetricsCSV
from callbacks.data_position import DataPosition
from lightning_modules.config import LossConfig, OptimizerConfig, TrainerConfig
from lightning_modules.generator import GeneratorModule
from switti.models.config import GeneratorConfig
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

TOKENIZER = RQVAEConfig(
    scales=[1, 2, 4], codebook_size=32, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
)


class Images(LightningDataModule):
    """Endless random samples; sample i depends on i alone. Position: samples consumed."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.consumed = 0

    def sample(self, index: int) -> dict[str, Any]:
        return random_sample(index, TOKENIZER.resolution)

    def train_dataloader(self) -> Any:
        def batches():
            start = self.consumed
            while True:
                samples = [self.sample(i) for i in range(start, start + self.batch)]
                yield torch.utils.data.default_collate(samples)
                start += self.batch

        return _Stream(batches)

    def val_dataloader(self) -> Any:
        samples = [self.sample(10_000 + i) for i in range(self.batch)]
        return torch.utils.data.DataLoader([torch.utils.data.default_collate(samples)], batch_size=None)

    def advance(self) -> None:
        self.consumed += self.batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.consumed = state_dict["consumed"]


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Any:
        return self.make()


class Watch(Callback):
    """Losses and keys of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.keys: list[list[str]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item())
        self.keys.append(batch["key"])


def module(
    steps: int = 6,
    visibility: str = "non_causal",
    ema: bool = True,
    precision: str = "32-true",
    **trainer: Any,
) -> GeneratorModule:
    torch.manual_seed(11)
    settings = TrainerConfig(max_steps=steps, precision=precision, log_every=1, **trainer)
    model = GeneratorConfig(
        visibility=visibility,
        depth=2,
        width=32,
        heads=2,
        scales=TOKENIZER.scales,
        codebook_size=32,
        code_width=8,
        text_width=12,
        pooled_width=10,
    )
    return GeneratorModule(
        model,
        RQVAE(TOKENIZER),
        OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=2),
        LossConfig(latent_noise=0.1),
        settings,
        seed=3,
        ema=ema,
    )


def fit(
    built: GeneratorModule,
    folder: Path,
    batch: int = 4,
    stop_after: int | None = None,
    resume: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    accelerator: str = "cpu",
) -> Watch:
    """Trains; stop_after ends early as an interruption would, with the schedule of the full run."""
    watch = Watch()
    settings = built.trainer_config
    trainer = Trainer(
        max_steps=stop_after or settings.max_steps,
        max_epochs=-1,
        accelerator=accelerator,
        devices=1,
        precision=settings.precision,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip,
        log_every_n_steps=1,
        logger=[MetricsCSV(folder)],
        callbacks=[
            watch,
            DataPosition(),
            *callbacks,
            build_checkpoint_callback(CallbacksConfig(checkpoint_every=3), folder),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        default_root_dir=str(folder),
    )
    trainer.fit(built, datamodule=Images(batch), ckpt_path=resume, weights_only=False)
    return watch
