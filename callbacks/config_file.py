"""Saved settings: config.yaml of the run folder, written when `fit` begins, whoever calls it."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from switti.files import atomic_write, writing
from switti.run_folder import CONFIG


class ConfigFile(Callback):
    """Makes the run folder and writes its settings. To be placed first: the record notes that the folder has them."""

    def __init__(self, run_dir: str | Path, text: str) -> None:
        self.run_dir, self.text = Path(run_dir), text

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run_dir / CONFIG, parents=False) as temporary:
            temporary.write_text(self.text, encoding="utf-8")
