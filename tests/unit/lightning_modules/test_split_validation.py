"""Metrics of several validation splits, apart and together."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from generator_cases import Images, module
from training_samples import random_sample

from callbacks.csv_logger import MetricsCSV
from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.tokenizer import TokenizerModule
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.tokenizer.config import RQVAEConfig

PAIRS, CONCEPTS = range(100, 104), range(200, 206)
SMALL = RQVAEConfig(
    scales=[1, 2, 4], codebook_size=32, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
)


class SplitImages(Images):
    """Two validation splits, of four and of six images."""

    validation_splits = ("concepts", "pairs")

    def loader(self, numbers: range) -> Any:
        batches = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
        collate = torch.utils.data.default_collate
        return torch.utils.data.DataLoader(
            [collate([random_sample(i, SMALL.resolution) for i in batch]) for batch in batches],
            batch_size=None,
        )

    def val_dataloader(self) -> Any:
        return [self.loader(CONCEPTS), self.loader(PAIRS)]


def run(built: pl.LightningModule, data: pl.LightningDataModule, folder: Path) -> dict[str, float]:
    trainer = pl.Trainer(
        max_steps=1, max_epochs=-1, accelerator="cpu", logger=[MetricsCSV(folder)], log_every_n_steps=1,
        val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip
    trainer.fit(built, datamodule=data)
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    values = {row[2]: float(row[3]) for row in rows if row[2].startswith("validation/")}
    # What monitors of checkpoints and pruning read.
    assert (
        values.items()
        <= {k: pytest.approx(float(v), rel=1e-5) for k, v in trainer.callback_metrics.items()}.items()
    )
    return values


def mean_loss(built: Any, numbers: list[int]) -> float:
    batch = torch.utils.data.default_collate([random_sample(i, SMALL.resolution) for i in numbers])
    with torch.no_grad():
        losses, _ = built.eval().compute_losses(batch, built.generator, 0.0, correct=False)
    return losses.tokens_BL.double().mean().item()


def test_losses_of_each_split_and_of_all_images_together(tmp_path: Path) -> None:
    built = module(steps=1, ema=False)
    values = run(built, SplitImages(4), tmp_path)
    expected = {
        "validation/pairs/loss": mean_loss(built, list(PAIRS)),
        "validation/concepts/loss": mean_loss(built, list(CONCEPTS)),
        "validation/loss": mean_loss(built, [*PAIRS, *CONCEPTS]),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert abs(expected["validation/pairs/loss"] - expected["validation/concepts/loss"]) > 1e-3
    names = {name.removeprefix("validation/pairs/") for name in values if "/pairs/" in name}
    assert names == {name.removeprefix("validation/") for name in values if not is_split(name)}


def is_split(name: str) -> bool:
    return name.startswith(("validation/pairs/", "validation/concepts/"))


def test_one_split_without_a_name_is_logged_as_before(tmp_path: Path) -> None:
    values = run(module(steps=1, ema=False), Images(4), tmp_path)
    assert "validation/loss" in values and not any(is_split(name) for name in values)


def test_quality_of_reconstructions_by_split(tmp_path: Path) -> None:
    built = TokenizerModule(
        SMALL,
        OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3),
        TokenizerLossConfig(lpips=0.0, restart_dead_every=0, discriminator_features=2),
        TrainerConfig(max_steps=1, log_every=1),
        seed=0,
        ema=False,
    )
    values = run(built, SplitImages(4), tmp_path)
    for name in ("psnr", "ssim"):
        together = (4 * values[f"validation/pairs/{name}"] + 6 * values[f"validation/concepts/{name}"]) / 10
        assert values[f"validation/{name}"] == pytest.approx(together, rel=1e-6)
    assert values["validation/pairs/psnr"] != values["validation/concepts/psnr"]
    assert "validation/codebook_use" in values and "validation/pairs/codebook_use" not in values
