"""Online metrics: scores of images generated during training, over fixed captions under fixed noise."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from callbacks.base import OptimizerStepCallback, log_now
from callbacks.prompt_set import PromptSet
from switti.errors import UserError


class ImageMetrics(Protocol):
    """The part of `switti.metrics.collection.MetricSet` that is used here."""

    def set_candidates(self, captions: list[str], /) -> None: ...
    def update(self, images: Tensor, captions: list[str], /) -> None: ...
    def update_real(self, images: Tensor, /) -> None: ...
    def compute(self) -> dict[str, float]: ...
    def reset(self) -> None: ...


class OnlineMetrics(OptimizerStepCallback):
    """Every `every` optimizer steps and at the end of training: generate, measure, log as `metrics/<name>`.

    Each rank takes every world-size-th prompt and real image. A rank that runs out generates a filler, which is not
    measured: sharded models need all ranks in every forward pass.

    Args:
        real_images: [N, 3, H, W] float in [0, 1] or uint8, the other side of the set distances.
        metrics: builds the metrics on a device.
        candidates: captions among which metrics look for an image's own one; None: those of the prompts.
        batch: images generated at once.
    """

    def __init__(
        self,
        every: int,
        prompts: PromptSet,
        real_images: Tensor,
        metrics: Callable[[torch.device], ImageMetrics],
        batch: int = 16,
        candidates: list[str] | None = None,
    ) -> None:
        if not len(prompts):
            raise UserError(
                "online metrics need at least one caption; set callbacks.metrics_every=0 to go without"
            )
        self.every = every
        self.prompts = prompts
        self.real_images = real_images
        self.build_metrics = metrics
        self.batch = batch
        self.candidates = prompts.prompts if candidates is None else candidates
        self.metrics: ImageMetrics | None = None
        self._measured_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the metrics before the first step, so that a missing network is an error at once."""
        super().on_train_start(trainer, pl_module)
        self._measured_step = trainer.global_step
        with isolate_rng():
            self.metrics = self.build_metrics(pl_module.device)
            self.metrics.set_candidates(self.candidates)
            self.metrics.update_real(self.real_images[trainer.global_rank :: trainer.world_size])

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if step % self.every:
            return
        for name, value in self._measure(trainer, module).items():
            # For callbacks that monitor a value; the loggers have it already, whatever their interval.
            module.log(name, value, on_step=True, on_epoch=False, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._measured_step:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        if self.metrics is None:
            raise RuntimeError("measured before on_train_start")
        self._measured_step = trainer.global_step
        with torch.no_grad(), isolate_rng(), same_modes(module):
            measured = measure_images(trainer, module, self.prompts, self.metrics, self.batch)
        values = {f"metrics/{name}": value for name, value in measured.items()}
        log_now(trainer, values)
        return values


def measure_images(
    trainer: Trainer, module: LightningModule, prompts: PromptSet, metrics: ImageMetrics, batch: int
) -> dict[str, float]:
    """Metrics of one image for each prompt, `batch` at once, shared among the ranks."""
    metrics.reset()
    captions = prompts.prompts
    for rows, counted in shares(len(captions), trainer.global_rank, trainer.world_size, batch):
        images = prompts.generate(module, rows)
        if counted:
            metrics.update(images, [captions[row] for row in rows])
    return metrics.compute()


def shares(count: int, rank: int, world_size: int, batch: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches of row numbers, and whether they count; equally many batches on every rank."""
    own = list(range(rank, count, world_size))
    for index in range(math.ceil(math.ceil(count / world_size) / batch)):
        rows = own[index * batch : (index + 1) * batch]
        yield (rows, True) if rows else ([0], False)


@contextmanager
def same_modes(module: torch.nn.Module) -> Iterator[None]:
    """Restores training or evaluation mode of every submodule, even after an error."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
