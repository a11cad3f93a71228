"""RQ-VAE pretraining: losses, codebook care, averages, export."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.tokenizer import TokenizerModule
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.errors import UserError
from switti.metrics.image_quality import ssim
from switti.models.codebook import draw_rows, entropy, kmeans, token_counts
from switti.models.config import RQVAEConfig
from switti.models.rqvae import RQVAE, load_rqvae
from switti.reconstruction import reconstruction_losses
from switti.scales import Pyramid

SMALL = RQVAEConfig(
    scales=[1, 2], codebook_size=64, code_width=4, channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1
)


def samples(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    images = (base + 0.2 * torch.randn(count, 3, 16, 16, generator=generator)).clamp(-1, 1)
    return [{"image": image, "seed": torch.tensor(i << 17)} for i, image in enumerate(images)]


def build(max_steps: int = 4, averaged: bool = True, **loss: Any) -> TokenizerModule:
    settings = TokenizerLossConfig(**{"lpips": 0.0, "restart_dead_every": 0, **loss})
    return TokenizerModule(
        SMALL,
        OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3, weight_decay=0.0),
        settings,
        TrainerConfig(max_steps=max_steps),
        seed=0,
        averaged=averaged,
    )


def fit(
    module: TokenizerModule,
    folder: Path,
    ckpt_path: Path | None = None,
    batch_size: int = 4,
    **trainer: Any,
) -> pl.Trainer:
    loader = DataLoader(samples(), batch_size=batch_size)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **trainer}
    settings.setdefault("max_steps", module.max_steps)
    runner = pl.Trainer(
        max_epochs=-1, accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **settings
    )
    runner.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=False)
    return runner


def batch() -> dict[str, Tensor]:
    return {key: torch.stack([sample[key] for sample in samples()]) for key in ("image", "seed")}


def farthest(points: Tensor, rows: Tensor) -> float:
    """Largest distance of a point to its nearest row."""
    return (points[:, None] - rows[None]).norm(dim=-1).amin(1).max().item()


def test_training_lowers_the_loss_and_logs(tmp_path: Path) -> None:
    module = build(max_steps=20)
    module.optimizer_config.learning_rate = 3e-3

    @torch.no_grad()
    def distance() -> float:
        return reconstruction_losses(module.rqvae(batch()["image"]).image, batch()["image"]).l1.item()

    before = distance()
    runner = fit(module, tmp_path, gradient_clip_val=1.0)
    assert distance() < 0.95 * before
    names = set(runner.callback_metrics)
    assert {"train/loss", "train/vq_loss", "train/gradient_norm", "train/learning_rate"} <= names
    assert {"validation/psnr", "validation/ssim", "validation/perplexity_by_scale/1"} <= names
    assert "validation/lpips" not in names
    perplexity = runner.callback_metrics["validation/perplexity_by_scale/1"].item()
    assert 1 <= perplexity <= 32  # 8 pictures, 4 tokens each


def test_loss_is_the_weighted_sum() -> None:
    module = build(l1=0.5, mse=2.0, vq=3.0)
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    image = batch()["image"]
    loss = module.training_step(batch(), 0)
    output = module.rqvae(image)
    expected = (
        0.5 * (output.image - image).abs().mean()
        + 2.0 * ((output.image - image) ** 2).mean()
        + 3.0 * output.vq_loss
    )
    torch.testing.assert_close(loss, expected)


def test_perceptual_network_is_no_part_of_the_module() -> None:
    pytest.importorskip("lpips")
    try:
        module = build(lpips=1.0)
    except UserError as error:
        pytest.skip(str(error))
    assert module.perceptual is not None
    assert {key.split(".")[0] for key in module.state_dict()} == {"rqvae", "ema_rqvae", "window_hits"}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reconstruction_losses(image, image.detach().flip(-1), module.perceptual).lpips.backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


def test_first_codes_come_from_the_first_batch(tmp_path: Path) -> None:
    module = build(max_steps=1)
    module.optimizer_config.learning_rate = module.optimizer_config.final_learning_rate = 1e-12
    rows = module.rqvae.quantize.residuals(module.rqvae.encode(batch()["image"][:4])).flatten(0, 1).detach()
    fit(module, tmp_path, limit_val_batches=0)
    for model in (module.rqvae, module.ema_rqvae):
        assert model is not None
        assert farthest(model.quantize.embedding.weight.detach(), rows) < 1e-5


def test_dead_codes_restart_and_live_ones_stay(tmp_path: Path) -> None:
    """4 pictures with 5 tokens cannot use 64 codes; before the second step the others move to rows of its batch."""
    module = build(max_steps=2, restart_dead_every=1, restart_until=1.0, init_codebook="random")
    module.optimizer_config.learning_rate = module.optimizer_config.final_learning_rate = 1e-12
    before = module.rqvae.quantize.embedding.weight.detach().clone()
    used = set(module.rqvae.tokenize(batch()["image"][:4]).flatten().tolist())
    rows = module.rqvae.quantize.residuals(module.rqvae.encode(batch()["image"][4:])).flatten(0, 1).detach()
    fit(module, tmp_path, limit_val_batches=0)
    after = module.rqvae.quantize.embedding.weight.detach()
    moved = {v for v in range(64) if (after[v] - before[v]).abs().max() > 1e-6}
    assert moved == set(range(64)) - used
    assert farthest(after[sorted(moved)], rows) < 1e-5
    assert module.window_hits.sum() == 4 * 5  # counted anew since


@pytest.mark.parametrize("until, restarts", [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_restarts_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: float, restarts: int) -> None:
    module = build(max_steps=5, restart_dead_every=2, restart_until=until, init_codebook="random")
    calls: list[int] = []
    monkeypatch.setattr(module, "_replace_codes", lambda which, codes: calls.append(int(which.sum())))
    fit(module, tmp_path, limit_val_batches=0)
    assert len(calls) == restarts


def test_restart_once_a_step_while_gradients_accumulate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(max_steps=2, restart_dead_every=1, restart_until=1.0, init_codebook="random")
    calls: list[int] = []
    monkeypatch.setattr(module, "_replace_codes", lambda which, codes: calls.append(1))
    fit(module, tmp_path, limit_val_batches=0, accumulate_grad_batches=2)
    assert len(calls) == 1


def test_average_is_evaluated_and_exported(tmp_path: Path) -> None:
    module = build(max_steps=2, init_codebook="random")
    (average, source), *_ = module.averaged_pairs()
    assert average is module.ema_rqvae and source is module.rqvae
    start = {key: value.clone() for key, value in average.named_parameters()}
    fit(module, tmp_path)
    exported = load_rqvae(SMALL, tmp_path / "tokenizer.safetensors")
    for key, value in exported.named_parameters():
        torch.testing.assert_close(value, start[key], rtol=0, atol=0)
    assert exported.quantize.ema_vocab_hit_SV.sum() > 0
    assert not average.training and not any(p.requires_grad for p in average.parameters())


def test_without_an_average(tmp_path: Path) -> None:
    module = build(max_steps=1, averaged=False)
    assert module.averaged_pairs() == [] and module.evaluated is module.rqvae
    fit(module, tmp_path)
    exported = load_rqvae(SMALL, tmp_path / "tokenizer.safetensors")
    torch.testing.assert_close(exported.encoder.conv_in.weight, module.rqvae.encoder.conv_in.weight.detach())


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build()
    torch.manual_seed(2)
    second = build()
    assert torch.equal(first.rqvae.quantize.embedding.weight, second.rqvae.quantize.embedding.weight)


def test_flips_follow_the_seed_of_the_sample() -> None:
    module = build(flip=True)
    found = module._pictures(batch())
    for i, image in enumerate(batch()["image"]):
        assert torch.equal(found[i], image.flip(-1) if i % 2 else image)


def test_ssim_ignores_autocast() -> None:
    image = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.7
    target = image + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    expected = ssim(image, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(image, target), expected)


def test_entropy_in_closed_form() -> None:
    counts = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 5.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0] * 4])
    expected = [np.log(4), 0.0, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), 0.0]
    assert entropy(counts).tolist() == pytest.approx(expected, abs=1e-6)


def test_token_counts_by_scale() -> None:
    tokens = torch.tensor([[0, 1, 1, 2, 3], [0, 3, 3, 3, 3]])
    counts = token_counts(tokens, Pyramid((1, 2)), 5)
    assert counts.tolist() == [[2, 0, 0, 0, 0], [0, 2, 1, 5, 0]]


def test_kmeans_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = (centres[:, None] + 0.1 * torch.randn(3, 40, 2, generator=generator)).flatten(0, 1)
    found = kmeans(rows, 3, generator, iterations=30)
    assert torch.cdist(centres, found).amin(1).max() < 0.2


def test_rows_are_drawn_without_repetition_if_possible() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(6.0)[:, None]
    assert sorted(draw_rows(rows, 6, generator).flatten().tolist()) == [0, 1, 2, 3, 4, 5]
    assert draw_rows(rows, 9, generator).shape == (9, 1)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"vq": -1.0}, "vq=-1.0"),
        ({"l1": 0.0, "lpips": 0.0}, "all 0"),
        ({"restart_until": 1.5}, "restart_until=1.5"),
        ({"restart_dead_every": -2}, "restart_dead_every=-2"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TokenizerLossConfig(**settings).validate("tokenizer_loss")


def test_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Four steps at once, or two, a checkpoint, and two more: restarts, counters and codes included."""
    settings: dict[str, Any] = {"limit_val_batches": 0, "batch_size": 8}
    through, first, second = (build(restart_dead_every=1, restart_until=1.0) for _ in range(3))
    fit(through, tmp_path, **settings)
    runner = fit(first, tmp_path, max_steps=2, **settings)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, ckpt_path=tmp_path / "half.ckpt", **settings)
    for key, value in through.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_keep_one_codebook(tmp_path: Path) -> None:
    """Two ranks with different pictures: first codes and restarts are rank 0's, dead is what no rank used."""
    module = build(max_steps=3, restart_dead_every=1, restart_until=1.0)
    fit(
        module,
        tmp_path,
        limit_val_batches=0,
        devices=2,
        strategy="ddp_spawn",
        callbacks=[SaveCodes(tmp_path)],
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert not torch.equal(first["hits"], torch.zeros(64))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=key)


class SaveCodes(pl.Callback):
    """What each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.rqvae
        assert isinstance(model, RQVAE)
        found = {
            "codes": model.quantize.embedding.weight.detach(),
            "hits": model.quantize.ema_vocab_hit_SV[1],
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")
