"""RQ-VAE pretraining: losses, discriminator, codebook initialization and restarts, several pyramids, EMA, export."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.csv_logger import MetricsCSV
from callbacks.skipped_steps import SkippedSteps
from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.tokenizer import TokenizerModule
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.errors import UserError
from switti.losses.reconstruction import reconstruction_losses
from switti.metrics.image_quality import ssim
from switti.scales import Pyramid
from switti.tokenizer.codebook import CodebookAverage, draw_rows, entropy, kmeans, sums_by_code, token_counts
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_tokenizer

SMALL = RQVAEConfig(
    scales=[1, 2], codebook_size=64, code_width=4, channels=32, multipliers=[1, 1, 1, 1], residual_blocks=1
)


def samples(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    images = (base + 0.2 * torch.randn(count, 3, 16, 16, generator=generator)).clamp(-1, 1)
    return [{"image": image, "seed": torch.tensor(i << 17)} for i, image in enumerate(images)]


def build(
    max_steps: int = 4,
    ema: bool = True,
    accumulate: int = 1,
    tokenizer: RQVAEConfig = SMALL,
    **loss: Any,
) -> TokenizerModule:
    settings = {"lpips": 0.0, "restart_dead_every": 0, "discriminator_features": 2, **loss}
    return TokenizerModule(
        tokenizer,
        OptimizerConfig(learning_rate=1e-3, final_learning_rate=1e-3, weight_decay=0.0),
        TokenizerLossConfig(**settings),
        TrainerConfig(max_steps=max_steps, accumulate=accumulate, log_every=1),
        seed=0,
        ema=ema,
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
    settings.setdefault("max_steps", module.trainer_config.max_steps)
    runner = pl.Trainer(
        max_epochs=-1, accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **settings
    )
    runner.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=False)
    return runner


def logged(folder: Path, metric: str) -> dict[int, float]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    return {int(row[0]): float(row[3]) for row in rows if row[2] == metric}


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
    runner = fit(module, tmp_path, logger=[MetricsCSV(tmp_path)])
    assert distance() < 0.95 * before
    names = set(runner.callback_metrics)
    for name in ("loss", "l1", "vq_loss", "gradient_norm", "learning_rate", "codebook_use"):
        assert sorted(logged(tmp_path, f"train/{name}")) == list(range(1, 21)), name
    assert {"validation/psnr", "validation/ssim", "validation/perplexity_by_scale/1"} <= names
    assert "validation/lpips" not in names
    perplexity = runner.callback_metrics["validation/perplexity_by_scale/1"].item()
    assert 1 <= perplexity <= 32  # 8 images, 4 tokens each


def test_loss_is_the_weighted_sum(tmp_path: Path) -> None:
    module = build(max_steps=1, l1=0.5, mse=2.0, vq=3.0, init_codebook="random")
    image = batch()["image"]
    output = module.rqvae(image)
    expected = (
        0.5 * (output.image - image).abs().mean()
        + 2.0 * ((output.image - image) ** 2).mean()
        + 3.0 * output.vq_loss
    )
    fit(module, tmp_path, batch_size=8, limit_val_batches=0, logger=[MetricsCSV(tmp_path)])
    assert logged(tmp_path, "train/loss") == pytest.approx({1: expected.item()}, rel=1e-5)


def test_perceptual_term_begins_at_its_step_and_sees_a_share(tmp_path: Path) -> None:
    """Half of five images are three; the other terms see all."""
    module = build(max_steps=2, lpips=1.0, lpips_net="vgg", lpips_start_step=1, lpips_share=0.5)
    fit(module, tmp_path, batch_size=8, limit_val_batches=0, logger=[MetricsCSV(tmp_path)])
    assert list(logged(tmp_path, "train/lpips")) == [2]
    generator = torch.Generator().manual_seed(1)
    ours, theirs = torch.rand(2, 5, 3, 32, 32, generator=generator) * 2 - 1
    assert module.perceptual is not None
    expected = module.perceptual(ours[:3], theirs[:3]).mean()
    terms = reconstruction_losses(ours, theirs, module.perceptual, share=0.5)
    torch.testing.assert_close(terms.lpips, expected)
    torch.testing.assert_close(terms.l1, (ours - theirs).abs().mean())


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
    """4 images with 5 tokens cannot use 64 codes; before the second step the others move to rows of its batch."""
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
    assert module.window_hits.sum() == 4 * 5  # counted from zero since


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
    module = build(2, accumulate=2, restart_dead_every=1, restart_until=1.0, init_codebook="random")
    calls: list[int] = []
    monkeypatch.setattr(module, "_replace_codes", lambda which, codes: calls.append(1))
    fit(module, tmp_path, limit_val_batches=0)
    assert len(calls) == 1


def test_ema_is_evaluated_and_exported(tmp_path: Path) -> None:
    module = build(max_steps=2, init_codebook="random")
    (average, source), *_ = module.ema_pairs()
    assert average is module.ema_rqvae and source is module.rqvae
    start = {key: value.clone() for key, value in average.named_parameters()}
    fit(module, tmp_path)
    exported = load_tokenizer(tmp_path / "tokenizer.safetensors", config=SMALL)
    for key, value in exported.named_parameters():
        torch.testing.assert_close(value, start[key], rtol=0, atol=0)
    assert exported.quantize.ema_vocab_hit_SV.sum() > 0
    assert not average.training and not any(p.requires_grad for p in average.parameters())


def test_without_an_ema(tmp_path: Path) -> None:
    module = build(max_steps=1, ema=False)
    assert module.ema_pairs() == [] and module.evaluated is module.rqvae
    fit(module, tmp_path)
    exported = load_tokenizer(tmp_path / "tokenizer.safetensors", config=SMALL)
    torch.testing.assert_close(exported.encoder.conv_in.weight, module.rqvae.encoder.conv_in.weight.detach())


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build()
    torch.manual_seed(2)
    second = build()
    assert torch.equal(first.rqvae.quantize.embedding.weight, second.rqvae.quantize.embedding.weight)


def test_flips_follow_the_seed_of_the_sample() -> None:
    module = build(flip=True)
    actual = module._images(batch(), module.rqvae.pyramid)
    for i, image in enumerate(batch()["image"]):
        assert torch.equal(actual[i], image.flip(-1) if i % 2 else image)


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
    actual = kmeans(rows, 3, generator, iterations=30)
    assert torch.cdist(centres, actual).amin(1).max() < 0.2


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
        ({"lpips_share": 0.0}, "lpips_share=0.0"),
        ({"lpips_start_step": -1}, "lpips_start_step=-1"),
        ({"restart_until": 1.5}, "restart_until=1.5"),
        ({"restart_dead_every": -2}, "restart_dead_every=-2"),
        ({"adversarial": -0.1}, "adversarial=-0.1"),
        ({"codebook_decay": 1.0}, r"codebook_decay=1\.0"),
        ({"init_batches": 0}, "init_batches=0"),
        ({"pyramids": [[1, 2], [2, 1]]}, r"pyramids=\[2, 1\]"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TokenizerLossConfig(**settings).validate("tokenizer_loss")


@pytest.mark.parametrize(
    "loss",
    [
        {"restart_dead_every": 1, "restart_until": 1.0},
        {"adversarial": 0.2, "start_step": 1, "codebook_update": "ema"},
        {"init_codebook": "kmeans", "init_batches": 3, "pyramids": [[1], [2]]},
    ],
    ids=["restarts", "adversarial_ema", "first_batches"],
)
def test_resumed_run_is_the_same_run(tmp_path: Path, loss: dict[str, Any]) -> None:
    """Four steps at once, or two, a checkpoint, and two more: codes, EMA, discriminator, first images."""
    settings: dict[str, Any] = {"limit_val_batches": 0, "batch_size": 8}
    through, first, second = (build(**loss) for _ in range(3))
    fit(through, tmp_path, **settings)
    runner = fit(first, tmp_path, max_steps=2, **settings)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, ckpt_path=tmp_path / "half.ckpt", **settings)
    for key, value in through.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value, rtol=0, atol=0, msg=key)


# ---- the adversarial loss, codes as moving averages, pyramids ----------------------------------------------------


def test_adversarial_part_begins_at_its_step(tmp_path: Path) -> None:
    """The first two steps are those of a run without it, bit for bit; from the third on both networks learn."""
    plain, module = build(max_steps=2), build(max_steps=4, adversarial=0.5, start_step=2)
    judge = {key: value.clone() for key, value in module.discriminator.state_dict().items()}  # type: ignore[union-attr]
    fit(plain, tmp_path / "plain", limit_val_batches=0)

    class Compare(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step == 2:
                for key, value in plain.rqvae.state_dict().items():
                    assert torch.equal(pl_module.rqvae.state_dict()[key], value), key
                assert all(
                    torch.equal(pl_module.discriminator.state_dict()[key], judge[key]) for key in judge
                )

    fit(module, tmp_path, callbacks=[Compare()], limit_val_batches=0, logger=[MetricsCSV(tmp_path)])
    assert sorted(logged(tmp_path, "train/adversarial")) == [3, 4]
    assert sorted(logged(tmp_path, "train/discriminator_loss")) == [3, 4]
    moved = [not torch.equal(module.discriminator.state_dict()[key], judge[key]) for key in judge]  # type: ignore[union-attr]
    assert all(moved)


@pytest.mark.parametrize("adaptive", [False, True])
def test_adversarial_gradient_reaches_encoder_and_decoder(tmp_path: Path, adaptive: bool) -> None:
    """Its weight changes what the encoder learns: it flows through the straight-through latent, not into the codes."""
    ends = []
    for weight in (0.1, 10.0):
        module = build(max_steps=1, ema=False, adversarial=weight, adaptive=adaptive, l1=1e-3, vq=0.0)
        fit(module, tmp_path / str(weight), limit_val_batches=0, precision="bf16-mixed")
        ends.append(module.rqvae)
    assert not torch.equal(ends[0].encoder.conv_in.weight, ends[1].encoder.conv_in.weight)
    assert not torch.equal(ends[0].decoder.conv_out.weight, ends[1].decoder.conv_out.weight)
    assert torch.equal(ends[0].quantize.embedding.weight, ends[1].quantize.embedding.weight)


def test_codes_as_averages_in_closed_form() -> None:
    """Code 0 gets two rows, code 1 none, code 2 one: sums and counts decay alike, by 0.75."""
    codes = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]])
    average = CodebookAverage(codes, decay=0.75)
    counts, sums = sums_by_code(
        torch.tensor([[2.0, 2.0], [4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 2]), 3
    )
    average.update(codes, counts, sums)
    first = [(0.75 * 1 + 0.25 * 6) / (0.75 + 0.5), (0.25 * 2) / (0.75 + 0.5)]
    third = [0.0, (0.75 * 2 + 0.25 * 4) / 1.0]
    torch.testing.assert_close(codes, torch.tensor([first, [5.0, 5.0], third]))
    average.restart(torch.tensor([False, True, False]), torch.tensor([[7.0, 7.0]]))
    average.update(codes, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([[0.0, 0.0], [3.0, 7.0], [0.0, 0.0]]))
    torch.testing.assert_close(codes[1], torch.tensor([6.0, 7.0]))
    torch.testing.assert_close(codes[2], torch.tensor(third))  # not chosen: it stays


@pytest.mark.parametrize("accumulate", [1, 2])
def test_codes_follow_the_rows_of_the_complete_step(tmp_path: Path, accumulate: int) -> None:
    """Whatever the number of micro-batches; neither gradient nor optimizer moves them."""
    module = build(
        1, accumulate=accumulate, codebook_update="ema", codebook_decay=0.5, init_codebook="random"
    )
    codes = module.rqvae.quantize.embedding.weight.detach().clone()
    output = module.rqvae(batch()["image"])
    rows, tokens = output.rows.flatten(0, 1).double(), output.tokens.flatten()
    expected = codes.double().clone()
    for v in tokens.unique():
        chosen = rows[tokens == v]
        expected[v] = (expected[v] + chosen.sum(0)) / (1 + len(chosen))
    assert not module.rqvae.quantize.embedding.weight.requires_grad
    fit(module, tmp_path, batch_size=8 // accumulate, limit_val_batches=0)
    actual = module.rqvae.quantize.embedding.weight
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_codes_start_from_all_first_batches(tmp_path: Path) -> None:
    """Before the second step from the images of both batches, encoded again; the pool is then freed."""
    module = build(max_steps=2, init_codebook="data", init_batches=2)
    module.optimizer_config.learning_rate = module.optimizer_config.final_learning_rate = 1e-12
    coarsest = module.rqvae.encode(batch()["image"]).mean((2, 3)).detach()  # whatever the codes are
    fit(module, tmp_path, limit_val_batches=0)
    codes = module.rqvae.quantize.embedding.weight.detach()
    actual = torch.cdist(coarsest, codes).amin(1) < 1e-5
    assert actual[:4].any() and actual[4:].any()
    assert module._first_images == []


def test_pyramids_are_drawn_by_step_and_all_are_trained(tmp_path: Path) -> None:
    """16 px with scales 1, 2 and 8 px with scale 1: images, tokens and hits fit; validation keeps its own."""
    module = build(max_steps=8, pyramids=[[1]])
    seen: list[tuple[int, int]] = []

    def spy(_: Any, inputs: tuple[Tensor, Any], output: Any) -> None:
        seen.append((inputs[0].shape[-1], output.tokens.shape[1]))

    module.rqvae.register_forward_hook(spy)
    runner = fit(module, tmp_path, limit_val_batches=1)
    assert set(seen) == {(16, 5), (8, 1)} and len(seen) == 8
    draws = [int(torch.randint(2, (), generator=torch.Generator().manual_seed(step))) for step in range(8)]
    assert [side == 8 for side, _ in seen] == [draw == 1 for draw in draws]
    assert module.rqvae.quantize.hit_updates == 2 * draws.count(0)
    assert "validation/codebook_use_by_scale/1" in runner.callback_metrics


def test_smaller_images_for_a_smaller_pyramid() -> None:
    module = build(pyramids=[[1]])
    image = torch.full((2, 3, 16, 16), 0.5)
    assert torch.allclose(module._images({"image": image}, Pyramid((1,))), torch.full((2, 3, 8, 8), 0.5))


def test_a_pyramid_beyond_the_tokenizers_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer_loss\.pyramids: \[1, 3\] must not end beyond"):
        build(pyramids=[[1, 3]])


def test_enlarged_images_are_counted(tmp_path: Path) -> None:
    module = build(max_steps=1)
    marks = [True, False, False, True]
    loader = DataLoader(
        [sample | {"enlarged": torch.tensor(mark)} for sample, mark in zip(samples(4), marks, strict=True)],
        batch_size=4,
    )
    runner = pl.Trainer(
        max_steps=1, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False,
        logger=[MetricsCSV(tmp_path)], enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    runner.fit(module, loader)
    assert logged(tmp_path, "train/enlarged_share") == {1: 0.5}


class Poison(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            batch["image"][0, 0, 0, 0] = float("nan")


def test_a_loss_that_is_no_number_reaches_nothing(tmp_path: Path) -> None:
    """The second step is skipped: weights, codes, their averages; one more than allowed stops the run by name."""
    module, other = (build(max_steps=2, codebook_update="ema") for _ in range(2))
    fit(module, tmp_path, callbacks=[Poison()], limit_val_batches=0)
    fit(other, tmp_path / "one", max_steps=1, limit_val_batches=0)
    assert module.nonfinite_guard.skipped and module.trainer.global_step == 2
    for name in ("rqvae.encoder.conv_in.weight", "rqvae.quantize.embedding.weight", "code_average.sums_VC"):
        assert torch.equal(module.state_dict()[name], other.state_dict()[name]), name
    with pytest.raises(UserError, match=r"step 2: .* not finite"):
        fit(build(max_steps=4), tmp_path, callbacks=[Poison(), SkippedSteps(0, 5)], limit_val_batches=0)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_keep_one_codebook(tmp_path: Path) -> None:
    """Two ranks with different images: first codes and restarts are rank 0's, dead is what no rank used."""
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


class SaveState(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")


class Halves(pl.LightningDataModule):
    """Two ranks share what a single process reads."""

    def train_dataloader(self) -> DataLoader:
        rank, count = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        return DataLoader(samples()[rank::count] * 4, batch_size=8 // count)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_two_ranks_are_one_process(tmp_path: Path, update: str) -> None:
    """Losses, discriminator, codes and counts of two ranks are those of one with all images.

    In float64: gradients that are zero but for rounding (biases before a norm) would be blown up by Adam.
    """
    loss: dict[str, Any] = {
        "adversarial": 0.1,
        "start_step": 1,
        "codebook_update": update,
        "l1": 0.0,
        "mse": 1.0,
    }
    states = []
    for name, devices in (("one", 1), ("two", 2)):
        module = build(max_steps=3, init_codebook="random", **loss)
        folder = tmp_path / name
        folder.mkdir()
        runner = pl.Trainer(
            accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_steps=3,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, limit_val_batches=0, default_root_dir=folder, precision="64-true",
            callbacks=[SaveState(folder)],
        )  # fmt: skip
        runner.fit(module, datamodule=Halves())
        states.append([torch.load(folder / f"{rank}.pt") for rank in range(devices)])
    (one,), (first, second) = states
    assert one["window_hits"].sum() == 3 * 8 * 5
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-5, msg=key)


class SaveCodes(pl.Callback):
    """What each rank ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.rqvae
        assert isinstance(model, RQVAE)
        actual = {
            "codes": model.quantize.embedding.weight.detach(),
            "hits": model.quantize.ema_vocab_hit_SV[1],
        }
        torch.save(actual, self.folder / f"{trainer.global_rank}.pt")


def test_the_objective_is_the_loss_of_a_training_step_without_the_discriminator(tmp_path: Path) -> None:
    """On the fixed batch, mirrored by its seeds; nothing of the module changes."""
    module = build(1, adversarial=0.5, vq=0.7, mse=0.3, flip=True)
    batch = torch.utils.data.default_collate(samples(4))
    module.eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    values = module.objective(module.prepare_objective(batch))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    mirrored = batch["image"].clone()
    mirrored[1::2] = mirrored[1::2].flip(-1)
    output = module.rqvae(mirrored)
    error = (output.image - mirrored).detach()
    expected = error.abs().mean() + 0.3 * error.square().mean() + 0.7 * output.vq_loss.detach()
    assert float(values["loss"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(values["mse"]) == pytest.approx(float(error.square().mean()), rel=1e-6)
