"""Advance of the data module's position, which is its whole state, after each batch trained on."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.base import data_module


class DataPosition(Callback):
    """Advances the data module at the end of each training batch, before checkpoint callbacks save its state."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        data_module(trainer).advance()
