"""The data module inside Lightning's trainer: the position is saved, restored and advanced."""

import pytest
import torch
from data_shards import make_set
from lightning.pytorch import LightningModule, Trainer

from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from switti.errors import UserError


class Recorder(LightningModule):
    """Trains one number and notes the keys that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys: list[str] = []
        self.validated: list[str] = []

    def training_step(self, batch, index):
        self.keys += batch["key"]
        return (self.weight - batch["image"].mean()) ** 2

    def on_train_batch_end(self, outputs, batch, index):
        self.trainer.datamodule.advance()

    def validation_step(self, batch, index):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, steps, checkpoint=None, accumulate=1, workers=0, **settings):
    paths = {"train": f"{folder}/train-*.tar", "validation": f"{folder}/validation-*.tar"}
    config = DataConfig(**(paths | {"batch_size": 4, "workers": workers} | settings))
    data = ShardDataModule(config, seed=0, resolution=8, accumulate=accumulate)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=folder,
        accumulate_grad_batches=accumulate, val_check_interval=2 * accumulate, check_val_every_n_epoch=None,
    )  # fmt: skip
    module = Recorder()
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    return trainer, module, data


@pytest.fixture
def folder(tmp_path):
    make_set(tmp_path, [4, 3, 3])
    make_set(tmp_path, [3], "validation")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_across_an_epoch_border(folder, workers):
    _, whole, data = fit(folder, 6, workers=workers)
    assert data.consumed == 24 and len(whole.keys) == 24 and len(whole.validated) == 9
    trainer, first, _ = fit(folder, 3, workers=workers)
    trainer.save_checkpoint(folder / "stopped.ckpt")
    _, second, data = fit(folder, 6, checkpoint=folder / "stopped.ckpt", workers=workers)
    assert first.keys + second.keys == whole.keys
    assert data.consumed == 24 and data.epoch == 2


def test_accumulated_steps_see_the_same_samples(folder):
    _, plain, _ = fit(folder, 4)
    _, accumulated, data = fit(folder, 4, accumulate=2)
    assert accumulated.keys == plain.keys and data.consumed == 16


def test_error_of_a_worker_reaches_the_user_as_it_is(folder):
    make_set(folder, [4], damaged=("s0n1",))
    with pytest.raises(UserError, match="max_bad_fraction"):
        fit(folder, 20, workers=1, max_bad_fraction=0.0)
