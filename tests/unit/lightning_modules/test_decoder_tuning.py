"""Tuning of the decoder: what stays frozen, what a step is, resume, EMA, precision, export, settings."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from callbacks.checkpointing import AtomicCheckpointIO, RunCheckpoint, find_resume
from callbacks.csv_logger import MetricsCSV
from callbacks.data_position import DataPosition
from callbacks.ema import ExponentialMovingAverage
from callbacks.skipped_steps import SkippedSteps
from configs.load_run import load_frozen_tokenizer
from configs.loading import load
from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning import DecoderTuningModule
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from switti.errors import UserError
from switti.scales import PYRAMIDS
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.discriminator import UNetDiscriminator
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_tokenizer
from switti.weights.save import save_tokenizer

SMALL = RQVAEConfig(
    scales=[1, 2], codebook_size=32, code_width=4, channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1
)
FROZEN = ("encoder.", "quantize.", "quant_conv.")


def image_of(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return (
        torch.rand(3, 1, 1, generator=generator) + 0.3 * torch.randn(3, 16, 16, generator=generator)
    ) - 0.5


class Stream(IterableDataset):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        index = self.start
        while True:
            yield {"image": image_of(index).clamp(-1, 1)}
            index += 1


class Images(LightningDataModule):
    """Endless; sample i depends on i alone. batch: samples read at a time."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.consumed = batch, 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Stream(self.consumed), batch_size=self.batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([{"image": image_of(1000 + i).clamp(-1, 1)} for i in range(4)], batch_size=2)

    def advance(self) -> None:
        self.consumed += self.batch

    def state_dict(self) -> dict[str, int]:
        return {"consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.consumed = state_dict["consumed"]


@pytest.fixture
def rqvae() -> RQVAE:
    torch.manual_seed(3)
    return RQVAE(SMALL).eval()


def build(
    rqvae: RQVAE,
    ema: bool = False,
    optimizer: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **decoder: Any,
) -> DecoderTuningModule:
    settings = {"lpips": 0.0, "adversarial": 0.5, "discriminator_features": 2, **decoder}
    rates = {"learning_rate": 1e-3, "final_learning_rate": 1e-4, "weight_decay": 0.0, **(optimizer or {})}
    return DecoderTuningModule(
        copy.deepcopy(rqvae),
        OptimizerConfig(**rates),
        DecoderTuningConfig(**settings),
        TrainerConfig(**{"max_steps": 4, "log_every": 1, "validate_every": 2, **(trainer or {})}),
        seed=0,
        ema=ema,
    )


def fit(
    module: DecoderTuningModule,
    folder: Path,
    *callbacks: Callback,
    batch: int = 2,
    resume: Path | None = None,
    **options: Any,
) -> Trainer:
    """The trainer as configs.build makes it."""
    settings = module.trainer_config
    runner = Trainer(
        **{
            "max_steps": settings.max_steps,
            "max_epochs": -1,
            "accelerator": "cpu",
            "precision": "32-true",
            "val_check_interval": settings.validate_every * settings.accumulate,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "logger": [MetricsCSV(folder)],
            "enable_checkpointing": any(isinstance(c, RunCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [DataPosition(), *callbacks],
            "plugins": [AtomicCheckpointIO()],
            **options,
        }
    )
    runner.fit(module, datamodule=Images(batch), ckpt_path=resume, weights_only=False)
    return runner


def logged(folder: Path, metric: str) -> dict[int, float]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return {int(row[0]): float(row[3]) for row in rows if row[2] == metric}


class Watch(Callback):
    """What other callbacks see."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.critic: list[bool] = []
        self._before: Tensor | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps.append(trainer.global_step)
        weights = torch.cat([p.detach().flatten() for p in pl_module.discriminator.parameters()])  # type: ignore[union-attr]
        self.critic.append(self._before is not None and not torch.equal(weights, self._before))
        self._before = weights.clone()


# ---- what is frozen ---------------------------------------------------------------------------------------------


def test_only_the_decoder_changes_and_tokens_stay(tmp_path: Path, rqvae: RQVAE) -> None:
    module = build(rqvae)
    before = {key: value.clone() for key, value in rqvae.state_dict().items()}
    fit(module, tmp_path)
    tuned = load_tokenizer(tmp_path / "tokenizer.safetensors", config=SMALL)  # a drop-in for the one before
    after = tuned.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value) == key.startswith(FROZEN), key
    images = torch.stack([image_of(i) for i in range(4)])
    tokens = rqvae.tokenize(images)
    assert torch.equal(tuned.tokenize(images), tokens)
    assert not torch.equal(
        tuned.decode(tuned.tokens_to_latent(tokens)), rqvae.decode(rqvae.tokens_to_latent(tokens))
    )


def test_the_frozen_part_is_not_saved_and_gets_no_gradient(rqvae: RQVAE) -> None:
    module = build(rqvae, ema=True)
    assert {key.split(".")[0] for key in module.state_dict()} == {"trained", "ema_trained", "discriminator"}
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert not trained & {id(p) for key, p in module.tokenizer.named_parameters() if key.startswith(FROZEN)}


# ---- what a step is ---------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_decoder(tmp_path: Path, rqvae: RQVAE) -> None:
    """Both optimizers step, one counts: for max_steps, checkpoints, the log, the schedule and validation."""
    watch = Watch()
    checkpoints = RunCheckpoint(tmp_path / "checkpoints", 2, 5)
    module = build(rqvae, trainer={"max_steps": 5, "accumulate": 2})
    runner = fit(module, tmp_path, watch, checkpoints, limit_val_batches=1)
    assert runner.global_step == 5
    assert watch.steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert watch.critic[3::2] == [True] * 4 and not any(watch.critic[2::2])
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*.ckpt"))
    assert names == ["step_000002.ckpt", "step_000004.ckpt", "step_000005.ckpt"]
    rates = logged(tmp_path, "train/learning_rate")
    assert rates == pytest.approx({1 + i: 1e-3 - i / 4 * 9e-4 for i in range(5)})
    assert sorted(logged(tmp_path, "validation/psnr")) == [2, 4]
    content = torch.load(tmp_path / "checkpoints/step_000004.ckpt", weights_only=False)
    assert content["global_step"] == 4 and len(content["optimizer_states"]) == 2
    assert [int(state["state"][0]["step"]) for state in content["optimizer_states"]] == [4, 4]


def test_discriminator_begins_at_its_step(tmp_path: Path, rqvae: RQVAE) -> None:
    watch = Watch()
    module = build(rqvae, start_step=2, optimizer={"warmup_steps": 2})
    fit(module, tmp_path, watch)
    assert watch.critic == [False, False, True, True]
    assert sorted(logged(tmp_path, "train/adversarial")) == [3, 4]
    # its warm-up is its own: two of its steps make it full, while the decoder is at its fifth
    assert module.trainer.optimizers[1].param_groups[0]["lr"] == pytest.approx(1e-3)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_accumulated_batches_are_one_batch(tmp_path: Path, rqvae: RQVAE) -> None:
    """Two batches of two samples give the step of one batch of four; L1 and per-pixel logits are means."""
    full = build(rqvae, trainer={"max_steps": 1})
    parts = build(rqvae, trainer={"max_steps": 1, "accumulate": 2})
    for module in (full, parts):
        module.trained.double(), module.tokenizer.double()
        assert module.discriminator is not None
        module.discriminator.double().eval()  # the power iteration would run twice as often
        module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, assignment, misc]
    fit(full, tmp_path / "a", batch=4, precision="64-true")
    fit(parts, tmp_path / "b", batch=2, precision="64-true")
    for name, value in full.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)


def test_step_against_plain_torch(tmp_path: Path, rqvae: RQVAE) -> None:
    """One clipped step of SGD-like arithmetic is left to torch: the gradients that reach AdamW are the ones."""
    module = build(rqvae, trainer={"max_steps": 1, "gradient_clip": 0.01}, l1=0.7, r1=0.3)
    other = build(rqvae, l1=0.7, r1=0.3)
    assert other.discriminator is not None
    seen: dict[str, list[Tensor]] = {}
    original = module.nonfinite_guard.settle

    def spy(*arguments: Any) -> bool:
        seen["decoder"] = [p.grad.clone() for p in module.trained.parameters() if p.grad is not None]
        seen["critic"] = [p.grad.clone() for p in module.discriminator.parameters() if p.grad is not None]  # type: ignore[union-attr]
        return original(*arguments)

    module.nonfinite_guard.settle = spy  # type: ignore[method-assign]
    fit(module, tmp_path)

    critic, model = other.discriminator, other.tokenizer
    image = torch.stack([image_of(i).clamp(-1, 1) for i in range(2)])
    actual = model.decode(model.tokens_to_latent(model.tokenize(image)))
    judged = critic(actual)
    loss = 0.7 * (actual - image).abs().mean() + 0.5 * -torch.log(torch.sigmoid(judged)).mean()
    expected = torch.autograd.grad(loss, list(other.trained.parameters()))
    check_clipped(seen["decoder"], expected, 0.01)
    real, fake = critic(image), critic(actual.detach())
    loss = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    image.requires_grad_()
    (slope,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    loss = loss + 0.3 * slope.square().sum() / (2 * 16 * 16)
    check_clipped(seen["critic"], torch.autograd.grad(loss, list(critic.parameters())), 0.01)


def check_clipped(actual: list[Tensor], expected: tuple[Tensor, ...], limit: float) -> None:
    norm = torch.cat([e.flatten() for e in expected]).norm()
    factor = min(1.0, limit / norm.item())
    assert factor < 1  # or the test would not see the clipping
    for f, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(f, factor * e, rtol=1e-3, atol=1e-6)


def test_adaptive_weight_pulls_equally(tmp_path: Path, rqvae: RQVAE) -> None:
    module = build(rqvae, adaptive=True, gan="hinge", trainer={"max_steps": 1})
    fit(module, tmp_path)
    assert logged(tmp_path, "train/adaptive_weight")[1] > 0
    total, l1, gan, weight = (
        logged(tmp_path, f"train/{name}")[1] for name in ("loss", "l1", "adversarial", "adaptive_weight")
    )
    assert total == pytest.approx(l1 + 0.5 * weight * gan, rel=1e-5)


# ---- resume, EMA, precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_is_the_same_run(tmp_path: Path, rqvae: RQVAE, accumulate: int) -> None:
    """Decoder, discriminator with its singular vectors, both optimizers, both schedules, the EMA."""
    options: dict[str, Any] = {"ema": True, "start_step": 1, "optimizer": {"warmup_steps": 1}}

    def run(folder: Path, steps: int | None, resume: Path | None) -> DecoderTuningModule:
        module = build(rqvae, trainer={"max_steps": 4, "accumulate": accumulate}, **options)
        callbacks = [ExponentialMovingAverage(0.9), RunCheckpoint(folder / "checkpoints", 1, 5)]
        fit(module, folder, *callbacks, resume=resume, **({"max_steps": steps} if steps else {}))
        return module

    through = run(tmp_path / "through", None, None)
    run(tmp_path / "parts", 2, None)
    second = run(tmp_path / "parts", None, find_resume(tmp_path / "parts"))
    for key, value in through.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key
    for name in ("optimizer_states", "lr_schedulers"):
        ends = [
            torch.load(tmp_path / run / "checkpoints/step_000004.ckpt", weights_only=False)[name]
            for run in ("through", "parts")
        ]
        assert same(*ends), name


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_the_ema_is_exported_and_validated(tmp_path: Path, rqvae: RQVAE) -> None:
    """Nobody updates it here, so that it still holds the weights from before."""
    module = build(rqvae, ema=True, trainer={"max_steps": 2})
    fit(module, tmp_path, limit_val_batches=2)
    exported = load_tokenizer(tmp_path / "tokenizer.safetensors", config=SMALL).state_dict()
    assert all(torch.equal(exported[key], value) for key, value in rqvae.state_dict().items())
    images = torch.stack([image_of(1000 + i).clamp(-1, 1) for i in range(4)])
    actual = rqvae.decode(rqvae.tokens_to_latent(rqvae.tokenize(images))).detach().clamp(-1, 1)
    expected = (10 * torch.log10(4 / (actual - images).square().mean((1, 2, 3)))).mean().item()
    assert logged(tmp_path, "validation/psnr") == pytest.approx({2: expected}, rel=1e-4)


def test_bfloat16(tmp_path: Path, rqvae: RQVAE) -> None:
    """Weights stay in float32; losses are those of float32 up to the precision."""
    full, half = build(rqvae, r1=0.1), build(rqvae, r1=0.1)
    fit(full, tmp_path / "full")
    fit(half, tmp_path / "half", precision="bf16-mixed")
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())
    for name in ("loss", "discriminator_loss", "r1"):
        ours, theirs = (logged(tmp_path / run, f"train/{name}") for run in ("half", "full"))
        assert len(ours) == 4 and ours[1] == pytest.approx(theirs[1], rel=0.05), name


def test_tuning_lowers_the_error(tmp_path: Path, rqvae: RQVAE) -> None:
    rates = {"learning_rate": 3e-3, "final_learning_rate": 3e-3}
    module = build(rqvae, trainer={"max_steps": 25}, optimizer=rates, adversarial=0.01)
    images = torch.stack([image_of(i).clamp(-1, 1) for i in range(500, 532)])

    @torch.no_grad()
    def error(model: RQVAE) -> float:
        return (model.decode(model.tokens_to_latent(model.tokenize(images))) - images).abs().mean().item()

    before = error(rqvae)
    fit(module, tmp_path, batch=4)
    assert error(module.exported()) < 0.92 * before


def test_with_lpips_and_without_a_discriminator(tmp_path: Path) -> None:
    config = replace(SMALL, scales=[1, 4])  # 32 px: the smallest that the trunk takes
    try:
        module = build(RQVAE(config), lpips=1.0, lpips_net="alex", adversarial=0.0, trainer={"max_steps": 1})
    except UserError as error:
        pytest.skip(str(error))
    assert {key.split(".")[0] for key in module.state_dict()} == {"trained"}
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    runner = Trainer(
        accelerator="cpu", max_steps=1, logger=[MetricsCSV(tmp_path)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    runner.fit(module, DataLoader([{"image": image[0]}], batch_size=1))
    assert logged(tmp_path, "train/lpips")[1] > 0 and runner.global_step == 1


# ---- what goes wrong --------------------------------------------------------------------------------------------


class Poison(Callback):
    """An image with a hole before step 3."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int
    ) -> None:
        if trainer.global_step == 2:
            batch["image"][0, 0, 0, 0] = float("nan")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, rqvae: RQVAE) -> None:
    module = build(rqvae)
    with pytest.raises(UserError, match=r"step 3: 1 steps in all had a loss or gradient that is not finite"):
        fit(module, tmp_path, Poison(), SkippedSteps(0, 5), RunCheckpoint(tmp_path / "checkpoints", 1, 5))
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*.ckpt"))
    assert names == ["step_000001.ckpt", "step_000002.ckpt"]
    last = torch.load(tmp_path / "checkpoints/step_000002.ckpt", weights_only=False)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert not (tmp_path / "tokenizer.safetensors").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"adversarial": -1.0}, r"decoder\.adversarial=-1\.0"),
        ({"l1": 0.0, "lpips": 0.0}, "all 0"),
        ({"discriminator_features": 0}, "discriminator_features=0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DecoderTuningConfig(**settings).validate("decoder")


def test_image_sizes_that_the_discriminator_cannot_take() -> None:
    config = replace(SMALL, multipliers=[1, 1])  # 4 px
    with pytest.raises(UserError, match="multiples of 8, got 4 x 4"):
        build(RQVAE(config))


def test_another_pyramid_is_for_tuning_only(tmp_path: Path, rqvae: RQVAE) -> None:
    """The same weights at another resolution: what a generator must not do by accident, tuning may."""
    save_tokenizer(rqvae, tmp_path / "weights.safetensors")
    same_shapes = [f"tokenizer.{name}={getattr(SMALL, name)}" for name in ("codebook_size", "code_width")]
    config = load("tokenizer/tiny", [*same_shapes, f"tokenizer_weights={tmp_path}/weights.safetensors"])
    assert load_frozen_tokenizer(config).config.scales == [1, 2]
    config.tokenizer.scales = [1, 2, 3]
    with pytest.raises(UserError, match=r"tokenizer\.scales=\[1, 2, 3\] \(the weights: \[1, 2\]\)"):
        load_frozen_tokenizer(config)
    wider = load_frozen_tokenizer(config, other_scales=True)
    assert wider.config.resolution == 24
    assert torch.equal(wider.quantize.embedding.weight, rqvae.quantize.embedding.weight)
    config.tokenizer.codebook_size = 64
    with pytest.raises(UserError, match=r"codebook_size=64 \(the weights: 32\)"):
        load_frozen_tokenizer(config, other_scales=True)


@pytest.mark.parametrize(("resolution", "images"), [(512, 8), (1024, 2)])
def test_the_papers_tuning(resolution: int, images: int) -> None:
    """Section 4.3: published weights, 256 images a step, 1e-5 for both networks, VGG16's LPIPS."""
    config = load(f"tokenizer/paper_decoder_{resolution}")
    assert config.task == "decoder" and config.tokenizer_weights == "FoundationVision/var"
    assert config.tokenizer.scales == PYRAMIDS[resolution] and config.tokenizer.resolution == resolution
    assert (config.tokenizer.codebook_size, config.tokenizer.code_width, config.tokenizer.channels) == (
        4096,
        32,
        160,
    )
    assert config.trainer.max_steps == 100_000 and config.optimizer.schedule == "constant"
    assert config.optimizer.learning_rate == 1e-5 and config.decoder.lpips_net == "vgg"
    parts = config.trainer.devices * config.trainer.accumulate
    assert config.data.batch_size == 256 == parts * images
    with torch.device("meta"):
        critic = UNetDiscriminator(config.decoder.discriminator_features)
    assert sum(p.numel() for p in critic.parameters()) == 4_376_897


# ---- several processes ------------------------------------------------------------------------------------------


class SaveState(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


class Halves(Images):
    """Two ranks share what a single process reads."""

    def train_dataloader(self) -> DataLoader:
        rank = self.trainer.global_rank  # type: ignore[union-attr]
        return DataLoader([{"image": image_of(i).clamp(-1, 1)} for i in range(4)][rank::2] * 8, batch_size=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_are_one_process(tmp_path: Path, rqvae: RQVAE) -> None:
    module = build(rqvae, trainer={"max_steps": 2}, adaptive=False)
    runner = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        limit_val_batches=0, default_root_dir=tmp_path, callbacks=[SaveState(tmp_path)],
    )  # fmt: skip
    runner.fit(module, datamodule=Halves(2))
    single = build(rqvae, trainer={"max_steps": 2})
    everything = default_collate([{"image": image_of(i).clamp(-1, 1)} for i in range(4)])
    runner = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path / "one",
    )  # fmt: skip
    runner.fit(single, DataLoader([everything] * 2, batch_size=None))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        torch.testing.assert_close(value, single.state_dict()[key], rtol=0, atol=2e-4, msg=key)


def test_the_objective_of_a_fixed_batch_encodes_once() -> None:
    torch.manual_seed(0)
    rqvae = RQVAE(SMALL)
    losses = DecoderTuningConfig(lpips=0.0, adversarial=0.0)
    module = DecoderTuningModule(rqvae, OptimizerConfig(), losses, TrainerConfig(), seed=0, ema=True).eval()
    image = torch.stack([image_of(i).clamp(-1, 1) for i in range(3)])
    prepared = module.prepare_objective({"image": image})
    with torch.no_grad():
        output = rqvae.decode(rqvae.tokens_to_latent(rqvae.tokenize(image)))
        rqvae.encoder.conv_in.weight.zero_()
    assert float(module.objective(prepared)["loss"]) == pytest.approx(
        float((output - image).abs().mean()), rel=1e-6
    )
