"""Metrics of generated pictures during training, over fixed captions under fixed noise."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from switti.errors import UserError
from switti.sampling.config import SamplingConfig
from switti.text.base import TextEmbedding


class PictureMetrics(Protocol):
    """What is needed of `switti.metrics.collection.MetricSet`."""

    def update(self, images: Tensor, captions: list[str], /) -> None: ...
    def update_real(self, images: Tensor, /) -> None: ...
    def compute(self) -> dict[str, float]: ...
    def reset(self) -> None: ...


class OnlineMetrics(Callback):
    """Every `every` optimiser steps and at the end of training: generate, measure, log as `metrics/<name>`.

    prompts, embeddings, seeds: one row each; the same at every measurement, so that curves differ by the model alone.
    null: the null caption, one row. real_images: [N, 3, H, W] float in [0, 1] or uint8, the other side of the set
    distances. metrics: builds the metrics on a device. batch: pictures generated at once.

    Each rank takes every world-size-th prompt and real picture. A rank that runs out generates a filler, which is
    not measured: sharded models need all ranks in every forward pass.
    """

    def __init__(
        self,
        every: int,
        prompts: list[str],
        embeddings: TextEmbedding,
        null: TextEmbedding,
        seeds: list[int],
        real_images: Tensor,
        metrics: Callable[[torch.device], PictureMetrics],
        sampling: SamplingConfig,
        batch: int = 16,
    ) -> None:
        if not len(prompts) == len(embeddings) == len(seeds):
            raise UserError(
                f"online metrics need as many captions ({len(prompts)}) as embeddings ({len(embeddings)}) "
                f"and seeds ({len(seeds)})"
            )
        if not prompts:
            raise UserError(
                "online metrics need at least one caption; set callbacks.metrics_every=0 to go without"
            )
        self.every = every
        self.prompts = prompts
        self.embeddings = embeddings
        self.null = null
        self.seeds = seeds
        self.real_images = real_images
        self.build_metrics = metrics
        self.sampling = sampling
        self.batch = batch
        self.metrics: PictureMetrics | None = None
        self._done_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the metrics before the first step, so that a missing network is an error at once."""
        self._done_step = trainer.global_step
        with isolate_rng():
            self.metrics = self.build_metrics(pl_module.device)
            self.metrics.update_real(self.real_images[trainer.global_rank :: trainer.world_size])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if (
            step == self._done_step or step % self.every
        ):  # the counter stands still while gradients accumulate
            return
        for name, value in self._measure(trainer, pl_module).items():
            # for callbacks that monitor a value; the loggers have it already, whatever their interval
            pl_module.log(name, value, on_step=True, on_epoch=False, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._done_step:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        if self.metrics is None:
            raise RuntimeError("measured before on_train_start")
        self._done_step = trainer.global_step
        self.metrics.reset()
        with torch.no_grad(), isolate_rng(), same_modes(pl_module):
            for rows, counted in shares(
                len(self.prompts), trainer.global_rank, trainer.world_size, self.batch
            ):
                seeds = [self.seeds[row] for row in rows]
                images = pl_module.generate(self.embeddings[rows], self.null, seeds, self.sampling)
                if counted:
                    self.metrics.update(images, [self.prompts[row] for row in rows])
            values = {f"metrics/{name}": value for name, value in self.metrics.compute().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        return values


def shares(count: int, rank: int, world_size: int, batch: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches of row numbers, and whether they count; equally many batches on every rank."""
    own = list(range(rank, count, world_size))
    for index in range(math.ceil(math.ceil(count / world_size) / batch)):
        rows = own[index * batch : (index + 1) * batch]
        yield (rows, True) if rows else ([0], False)


@contextmanager
def same_modes(module: torch.nn.Module) -> Iterator[None]:
    """Puts training or evaluation mode of every submodule back, even after an error."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
