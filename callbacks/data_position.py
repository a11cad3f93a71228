"""Tells the datamodule that a batch has been trained on: its position is its whole state."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class DataPosition(Callback):
    """Advances the datamodule at the end of each training batch, before checkpoint callbacks save its state."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.datamodule.advance()  # type: ignore[attr-defined]
