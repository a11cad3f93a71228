"""Pictures of fixed captions under fixed noise, so that one can watch a run learn."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from callbacks.event_log import EventLog
from switti.files import atomic_write, write_json, writing
from switti.run_folder import LATEST_SAMPLES, SAMPLES, SAMPLES_INDEX
from switti.sampling.config import SamplingConfig
from switti.sampling.image_grid import captioned_grid, to_pil
from switti.text.base import TextEmbedding


class SampleGrids(Callback):
    """Every `every` optimiser steps and at the end: a grid with guidance and one without.

    Writes samples/step_<n>_guided.png and _unguided.png, TensorBoard pictures, and samples/latest/ with one file a
    caption and an index.json, which the report pairs with those of other runs.
    """

    def __init__(
        self,
        run_dir: Path,
        every: int,
        prompts: list[str],
        text: TextEmbedding,
        null: TextEmbedding,
        seeds: list[int],
        sampling: SamplingConfig,
    ) -> None:
        self.folder = Path(run_dir) / SAMPLES
        self.every = every
        self.prompts = prompts
        self.text = text
        self.null = null
        self.seeds = seeds
        self.sampling = sampling
        self._done_step = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._done_step or (step % self.every and step != trainer.max_steps):
            return
        self._done_step = step
        self._draw(trainer, pl_module, step)

    def _draw(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        # Every rank takes part, since a sharded model's forward pass is a collective; only rank zero writes.
        kinds = {"guided": self.sampling, "unguided": replace(self.sampling, guidance=0.0)}
        for kind, sampling in kinds.items():
            images = pl_module.generate(self.text, self.null, self.seeds, sampling)
            if not trainer.is_global_zero:
                continue
            pictures = to_pil(images)
            grid = captioned_grid(pictures, self.prompts)
            write_image(self.folder / f"step_{step:06d}_{kind}.png", grid)
            for logger in trainer.loggers:
                if isinstance(logger, EventLog):
                    logger.log_image(f"samples/{kind}", np.asarray(grid), step)
            if kind == "guided":
                self._write_latest(pictures, step)

    def _write_latest(self, pictures: list, step: int) -> None:
        latest = self.folder.parent / LATEST_SAMPLES
        files = [f"{i:02d}.png" for i in range(len(pictures))]
        for name, picture in zip(files, pictures, strict=True):
            write_image(latest / name, picture)
        index = {
            "step": step,
            "sampling": asdict(self.sampling),
            "prompts": self.prompts,
            "seeds": self.seeds,
            "files": files,
        }
        write_json(latest / SAMPLES_INDEX, index, parents=False)


def write_image(path: Path, image: Image.Image) -> None:
    """A PNG file, whole or not at all."""
    with writing(path):
        path.parent.mkdir(exist_ok=True)  # but not the run folder: a removed one stays removed
    with atomic_write(path, parents=False) as temporary:
        image.save(temporary, format="PNG")
