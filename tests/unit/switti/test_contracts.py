"""Contracts between the layers: modules, data modules and loaders provide what callbacks rely on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data_shards import make_set

from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule
from lightning_modules.config import LossConfig, OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning import DecoderTuningModule
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from lightning_modules.generator import GeneratorModule
from lightning_modules.tokenizer import TokenizerModule
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.contracts import (
    BadSampleReports,
    DescribedData,
    EMAModule,
    GeneratorTraining,
    GuardedModule,
    SamplingModule,
    StepGuard,
    TokenizedModule,
    TrainingData,
    WaitingLoader,
)
from switti.models.config import GeneratorConfig
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

TOKENIZER = RQVAEConfig(
    scales=[1, 2], codebook_size=8, code_width=8, channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1
)
MODEL = GeneratorConfig(
    depth=1, width=16, heads=2, scales=[1, 2], codebook_size=8, code_width=8, text_width=4, pooled_width=4
)


def build(kind: str) -> Any:
    optimizer, trainer = OptimizerConfig(), TrainerConfig()
    common: dict[str, Any] = {"seed": 0, "ema": True}
    if kind == "generator":
        module = GeneratorModule(MODEL, RQVAE(TOKENIZER), optimizer, LossConfig(), trainer, **common)
        module.configure_model()
        return module
    if kind == "tokenizer":
        return TokenizerModule(TOKENIZER, optimizer, TokenizerLossConfig(lpips=0.0), trainer, **common)
    if kind == "decoder":
        tuning = DecoderTuningConfig(lpips=0.0, adversarial=0.0)
        return DecoderTuningModule(RQVAE(TOKENIZER), optimizer, tuning, trainer, **common)
    return ShardDataModule(DataConfig(train="a-*.tar", validation="b-*.tar"), seed=0, resolution=8)


@pytest.mark.parametrize(
    ("kind", "contracts"),
    [
        ("generator", [GuardedModule, EMAModule, TokenizedModule, GeneratorTraining, SamplingModule]),
        ("tokenizer", [GuardedModule, EMAModule]),
        ("decoder", [GuardedModule, EMAModule, TokenizedModule]),
        ("data", [TrainingData, DescribedData]),
    ],
)
def test_what_callbacks_rely_on_is_provided(kind: str, contracts: list[type]) -> None:
    provider = build(kind)
    assert [contract for contract in contracts if not isinstance(provider, contract)] == []


@pytest.mark.parametrize("kind", ["generator", "tokenizer", "decoder"])
def test_the_guard_and_the_pairs_are_those_of_the_contract(kind: str) -> None:
    module = build(kind)
    assert isinstance(module.nonfinite_guard, StepGuard) and module.nonfinite_guard.skipped is False
    ((ema, live),) = module.ema_pairs()
    for copy, trained in zip(ema.parameters(), live.parameters(), strict=True):
        assert copy is not trained and torch.equal(copy, trained) and not copy.requires_grad


def test_the_training_loader_announces_its_batches_and_reports_bad_samples(tmp_path: Path) -> None:
    paths = {split: make_set(tmp_path, [4], split) for split in ("train", "validation")}
    data = ShardDataModule(DataConfig(**paths, batch_size=2, workers=0), seed=0, resolution=8)
    data.setup("fit")
    loader, announced = data.train_dataloader(), []
    assert isinstance(loader, WaitingLoader) and isinstance(data.bad_samples, BadSampleReports)
    loader.waiting = lambda: announced.append(True)
    next(iter(loader))
    assert announced == [True]


def test_a_plain_module_provides_none_of_them() -> None:
    assert not isinstance(torch.nn.Linear(1, 1), GuardedModule | EMAModule | SamplingModule)
