"""Sample grids: images of fixed captions under fixed noise, in which one can watch a run learn."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from callbacks.base import OptimizerStepCallback
from callbacks.event_log import EventLog
from callbacks.prompt_set import PromptSet
from switti.files import atomic_write, write_json, writing
from switti.run_folder import LATEST_SAMPLES, SAMPLES, SAMPLES_INDEX
from switti.sampling.image_grid import captioned_grid, to_pil


class SampleGrids(OptimizerStepCallback):
    """Every `every` optimizer steps and at the end: a grid with guidance and one without.

    Writes samples/step_<n>_guided.png and _unguided.png, TensorBoard images, and samples/latest/ with one file per
    caption and an index.json, by which the report pairs them with those of other runs.
    """

    def __init__(self, run_dir: Path, every: int, prompts: PromptSet) -> None:
        self.folder = Path(run_dir) / SAMPLES
        self.every = every
        self.prompts = prompts

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With accumulation the first micro-batch already draws a grid, of the weights that the run starts from.
        self._completed_step = -1

    def on_optimizer_step_end(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if step % self.every and step != trainer.max_steps and not trainer.should_stop:
            return
        # Every rank takes part, since a sharded model's forward pass is a collective; only rank zero writes.
        guided = self.prompts.sampling
        for kind, sampling in {"guided": guided, "unguided": replace(guided, guidance=0.0)}.items():
            batch = self.prompts.generate(module, sampling=sampling)
            if not trainer.is_global_zero:
                continue
            images = to_pil(batch)
            grid = captioned_grid(images, self.prompts.prompts)
            write_image(self.folder / f"step_{step:06d}_{kind}.png", grid)
            for logger in trainer.loggers:
                if isinstance(logger, EventLog):
                    logger.log_image(f"samples/{kind}", np.asarray(grid), step)
            if kind == "guided":
                self._write_latest(images, step)

    def _write_latest(self, images: list[Image.Image], step: int) -> None:
        latest = self.folder.parent / LATEST_SAMPLES
        files = [f"{i:02d}.png" for i in range(len(images))]
        for name, image in zip(files, images, strict=True):
            write_image(latest / name, image)
        index = {
            "step": step,
            "sampling": asdict(self.prompts.sampling),
            "prompts": self.prompts.prompts,
            "seeds": self.prompts.seeds,
            "files": files,
        }
        write_json(latest / SAMPLES_INDEX, index, parents=False)


def write_image(path: Path, image: Image.Image) -> None:
    """A PNG file, written atomically."""
    with writing(path):
        # But not the run folder: a removed one stays removed.
        path.parent.mkdir(exist_ok=True)
    with atomic_write(path, parents=False) as temporary:
        image.save(temporary, format="PNG")
