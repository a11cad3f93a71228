"""RQ-VAE pretraining (Section 3.1): reconstruction, perceptual and quantisation losses.

Shape suffixes: B batch, C code width, L tokens of all scales, R rows, S scales, V codebook size.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.optimization import build_optimizer
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.metrics.image_quality import psnr, ssim
from switti.models.codebook import draw_rows, entropy, kmeans, token_counts
from switti.models.config import RQVAEConfig
from switti.models.perceptual import build_lpips
from switti.models.rqvae import RQVAE, Reconstruction, save_rqvae
from switti.reconstruction import ReconstructionLosses, reconstruction_losses

WEIGHTS_FILE = "tokenizer.safetensors"


class TokenizerModule(pl.LightningModule):
    """Trains `rqvae`; validation and the exported weights use its average `ema_rqvae` if there is one.

    seed: of the initial weights. averaged: keep `ema_rqvae`.
    Batches need `image` [B, 3, H, W] in [-1, 1] and, for flips, `seed` int64 [B].
    At the end of training the run folder gets `tokenizer.safetensors`, which `tokenizer_weights` accepts.
    """

    window_hits: Tensor
    validation_counts: Tensor

    def __init__(
        self,
        tokenizer: RQVAEConfig,
        optimizer: OptimizerConfig,
        loss: TokenizerLossConfig,
        trainer: TrainerConfig,
        *,
        seed: int,
        averaged: bool,
    ) -> None:
        super().__init__()
        self.loss_config = loss
        self.optimizer_config = optimizer
        self.max_steps = trainer.max_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rqvae = RQVAE(tokenizer)
        self.ema_rqvae = copy.deepcopy(self.rqvae).eval().requires_grad_(False) if averaged else None
        size = tokenizer.codebook_size
        self._cared_at = -1
        self.register_buffer("window_hits", torch.zeros(size))
        counts_SV = torch.zeros(len(tokenizer.scales), size)
        self.register_buffer("validation_counts", counts_SV, persistent=False)
        # In a tuple, where nn.Module does not look: frozen, no part of the saved state.
        self._perceptual = (build_lpips(loss.lpips_net) if loss.lpips > 0 else None,)

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(average, source) of what an average is kept of."""
        return [] if self.ema_rqvae is None else [(self.ema_rqvae, self.rqvae)]

    @property
    def evaluated(self) -> RQVAE:
        """The average if there is one, else what is being trained."""
        return self.rqvae if self.ema_rqvae is None else self.ema_rqvae

    @property
    def perceptual(self) -> nn.Module | None:
        """LPIPS on this module's device, or None if it has no weight."""
        network = self._perceptual[0]
        return None if network is None else network.to(self.device)

    def train(self, mode: bool = True) -> "TokenizerModule":
        """The average stays in evaluation mode."""
        super().train(mode)
        if self.ema_rqvae is not None:
            self.ema_rqvae.eval()
        return self

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer, scheduler = build_optimizer(self.rqvae, self.optimizer_config, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _pictures(self, batch: Mapping[str, Any]) -> Tensor:
        """Training pictures; whether one is mirrored depends on its own seed only."""
        image_B3HW = batch["image"]
        if not self.loss_config.flip:
            return image_B3HW
        mirrored_B = (batch["seed"] >> 17) % 2 == 1
        return torch.where(mirrored_B[:, None, None, None], image_B3HW.flip(-1), image_B3HW)

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """First codes from the first batch; every so many optimiser steps dead codes get a new start.

        Before a step, not after one: checkpoints are written in between, and a resumed run must do the same.
        """
        config, step = self.loss_config, self.trainer.global_step
        if step == self._cared_at:  # gradients are still accumulating
            return
        self._cared_at = step
        if step == 0:
            if config.init_codebook != "random":
                self._initialise_codes(batch)
        elif config.restart_dead_every and step % config.restart_dead_every == 0:
            if step <= config.restart_until * self.max_steps:
                self._restart_dead_codes(batch)
            self.window_hits.zero_()

    def _initialise_codes(self, batch: Mapping[str, Any]) -> None:
        first = kmeans if self.loss_config.init_codebook == "kmeans" else draw_rows
        size = self.rqvae.config.codebook_size
        codes_VC = first(self._residual_rows(batch), size, self._generator())
        self._replace_codes(torch.ones(size, dtype=torch.bool), codes_VC)

    def _restart_dead_codes(self, batch: Mapping[str, Any]) -> None:
        hits_V = self.trainer.strategy.reduce(self.window_hits.clone(), reduce_op="sum")
        dead_V = hits_V == 0
        dead = int(dead_V.sum())
        if dead:
            self._replace_codes(dead_V, draw_rows(self._residual_rows(batch), dead, self._generator()))
        self.log("train/restarted_codes", float(dead))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        image_B3HW = self._pictures(batch)
        output: Reconstruction = self.rqvae(image_B3HW)
        terms = reconstruction_losses(output.image, image_B3HW, self.perceptual)
        loss = self._total(terms, output.vq_loss)
        counts_SV = token_counts(output.tokens, self.rqvae.pyramid, self.rqvae.config.codebook_size)
        self.window_hits += counts_SV.sum(0)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict(self._named("train", terms))
        self.log("train/vq_loss", output.vq_loss)
        self.log("train/codebook_use", (counts_SV.sum(0) > 0).float().mean())
        return loss

    def _total(self, terms: ReconstructionLosses, vq_loss: Tensor) -> Tensor:
        weights = self.loss_config
        loss = weights.l1 * terms.l1 + weights.mse * terms.mse + weights.vq * vq_loss
        return loss + weights.lpips * terms.lpips if weights.lpips > 0 else loss

    def _named(self, stage: str, terms: ReconstructionLosses) -> dict[str, Tensor]:
        """Terms under their names in the log; LPIPS only where it was computed."""
        return {
            f"{stage}/{name}": value
            for name, value in terms._asdict().items()
            if name != "lpips" or self.perceptual is not None
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the trainer's value (0 or None: not at all) and log the norm before it."""
        limit = gradient_clip_val or float("inf")
        self.log("train/gradient_norm", nn.utils.clip_grad_norm_(self.rqvae.parameters(), limit))
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.trainer.global_step)

    @torch.no_grad()
    def _residual_rows(self, batch: Mapping[str, Any]) -> Tensor:
        """Rows of all scales that the codes have to match, [R, C]."""
        return self.rqvae.quantize.residuals(self.rqvae.encode(batch["image"])).flatten(0, 1)

    @torch.no_grad()
    def _replace_codes(self, which_V: Tensor, codes_RC: Tensor) -> None:
        """New values for some codes, rank 0's on all ranks, in the average as well."""
        codes_RC = self.trainer.strategy.broadcast(codes_RC)
        for model in filter(None, (self.rqvae, self.ema_rqvae)):
            weight_VC = model.quantize.embedding.weight
            weight_VC[which_V.to(weight_VC.device)] = codes_RC.to(weight_VC)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        image_B3HW, model = batch["image"], self.evaluated
        tokens_BL = model.tokenize(image_B3HW)
        found_B3HW = model.decode(model.tokens_to_latent(tokens_BL)).float().clamp(-1, 1)
        terms = reconstruction_losses(found_B3HW, image_B3HW, self.perceptual)
        self.validation_counts += token_counts(tokens_BL, model.pyramid, model.config.codebook_size)
        figures = self._named("validation", terms)
        found_01, image_01 = (found_B3HW + 1) / 2, (image_B3HW + 1) / 2
        figures["validation/psnr"] = psnr(found_01, image_01).mean().float()
        figures["validation/ssim"] = ssim(found_01, image_01).mean()
        self.log_dict(figures, batch_size=image_B3HW.shape[0], sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Use of the codebook over the whole split."""
        counts_SV = self.trainer.strategy.reduce(self.validation_counts.clone(), reduce_op="sum")
        self.validation_counts.zero_()
        self.log("validation/codebook_use", (counts_SV.sum(0) > 0).float().mean())
        for scale, (counts_V, nats) in enumerate(zip(counts_SV, entropy(counts_SV), strict=True)):
            self.log(f"validation/codebook_use_by_scale/{scale}", (counts_V > 0).float().mean())
            self.log(f"validation/unigram_entropy_by_scale/{scale}", nats)
            self.log(f"validation/perplexity_by_scale/{scale}", nats.exp())

    def on_train_end(self) -> None:
        """Weights for `tokenizer_weights`; usage counts are a buffer, which is not averaged."""
        self.evaluated.quantize.ema_vocab_hit_SV.copy_(self.rqvae.quantize.ema_vocab_hit_SV)
        if self.trainer.is_global_zero:
            save_rqvae(self.evaluated, Path(self.trainer.default_root_dir) / WEIGHTS_FILE)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hit_updates"] = self.rqvae.quantize.hit_updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rqvae.quantize.hit_updates = checkpoint["hit_updates"]
