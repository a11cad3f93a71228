"""Tuning of the RQ-VAE's decoder with everything before it frozen (Section 4.3): L1, LPIPS and an adversarial loss.

Two optimisers mean manual optimisation. Lightning counts every step of an optimiser that it has wrapped, so the
discriminator's is stepped unwrapped: `trainer.global_step` is the number of decoder steps, which is what max_steps,
checkpoints, averages and all other callbacks go by. Gradients are accumulated, averaged over ranks and clipped here;
the trainer must be built with accumulate_grad_batches=1 and without gradient_clip_val.

Shape suffixes: B batch, C code width, HH the square latent.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from lightning_modules.optimization import build_optimizer
from lightning_modules.tokenizer import WEIGHTS_FILE
from switti.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty
from switti.errors import UserError
from switti.metrics.image_quality import ReconstructionQuality
from switti.models.discriminator import UNetDiscriminator, check_sides
from switti.models.perceptual import build_lpips
from switti.models.rqvae import RQVAE, save_rqvae
from switti.reconstruction import reconstruction_losses

Figures = dict[str, Tensor]
PARTS = ("post_quant_conv", "decoder")


def single(x: Tensor) -> Tensor:
    """Half precision → float32, in which losses are computed."""
    return x.float() if x.dtype.itemsize < 4 else x


def decode(parts: nn.ModuleDict, f_hat_BCHH: Tensor) -> Tensor:
    """Quantised latent → picture, unclamped."""
    for name in PARTS:
        f_hat_BCHH = parts[name](f_hat_BCHH)
    return single(f_hat_BCHH)


class DecoderTuningModule(pl.LightningModule):
    """Trains the decoder and post_quant_conv of `rqvae`; its encoder, quantiser and codebook keep every bit.

    seed: of the discriminator's initial weights. averaged: keep an exponential moving average (`ema_trained`), which
    validation and the exported weights then use.
    Batches need `image` [B, 3, H, W] in [-1, 1]. At the end of training the run folder gets `tokenizer.safetensors`,
    which makes the same tokens as `rqvae` did and can take its place. A loss that is no number stops the run with a
    UserError before it reaches the weights; no checkpoint is written then.
    """

    def __init__(
        self,
        rqvae: RQVAE,
        optimizer: OptimizerConfig,
        decoder: DecoderTuningConfig,
        trainer: TrainerConfig,
        *,
        seed: int,
        averaged: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optimizer_config, self.config, self.trainer_config = optimizer, decoder, trainer
        self.trained = nn.ModuleDict({name: rqvae.get_submodule(name) for name in PARTS})
        # In tuples, where nn.Module does not look: frozen, no part of the saved state.
        self._frozen = (rqvae.eval().requires_grad_(False),)
        self._perceptual = (build_lpips(decoder.lpips_net) if decoder.lpips > 0 else None,)
        self.trained.train().requires_grad_(True)
        self.ema_trained = copy.deepcopy(self.trained).requires_grad_(False) if averaged else None
        self.discriminator = None
        if decoder.adversarial > 0:
            check_sides(rqvae.config.resolution, rqvae.config.resolution)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = UNetDiscriminator(decoder.discriminator_features)
        self._micro_batches = 0
        self._figures: Figures = {}

    @property
    def tokenizer(self) -> RQVAE:
        """The whole RQ-VAE with the decoder as it is trained."""
        return self._frozen[0]

    @property
    def perceptual(self) -> nn.Module | None:
        return self._perceptual[0]

    def averaged_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(average, source) of what an average is kept of."""
        return [] if self.ema_trained is None else [(self.ema_trained, self.trained)]

    def tuned(self) -> RQVAE:
        """A copy of the RQ-VAE with the averaged decoder, or the trained one if no average is kept."""
        model = copy.deepcopy(self.tokenizer).eval().requires_grad_(False)
        for name in PARTS:
            part = (self.trained if self.ema_trained is None else self.ema_trained)[name]
            model.get_submodule(name).load_state_dict(part.state_dict())
        return model

    def on_fit_start(self) -> None:
        for network in (self.tokenizer, self.perceptual):
            if network is not None:
                network.to(self.device)

    def configure_optimizers(self) -> Any:
        """The discriminator's schedule, warm-up included, begins with its own first step."""
        steps, first = self.trainer_config.max_steps, self.config.start_step
        pairs = [build_optimizer(self.trained, self.optimizer_config, steps)]
        if self.discriminator is not None:
            pairs.append(build_optimizer(self.discriminator, self.optimizer_config, max(1, steps - first)))
        return [optimizer for optimizer, _ in pairs], [scheduler for _, scheduler in pairs]

    # ---- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        image_B3HW = batch["image"]
        critic = self.discriminator if self.global_step >= self.config.start_step else None
        with self._unsynchronised():
            found_B3HW = decode(self.trained, self._latent(image_B3HW))
            figures = self._train_decoder(found_B3HW, image_B3HW, critic)
            if critic is not None:
                figures |= self._train_discriminator(found_B3HW.detach(), image_B3HW, critic)
        share = 1 / self.trainer_config.accumulate
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0) + share * value.detach()
        self._micro_batches += 1
        if self._micro_batches == self.trainer_config.accumulate:
            self._step(critic)

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """No exchange in the backward passes: DDP's own supposes one of them per step, over all parameters."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext()

    @torch.no_grad()
    def _latent(self, image_B3HW: Tensor) -> Tensor:
        return self.tokenizer.tokens_to_latent(self.tokenizer.tokenize(image_B3HW))

    def _backward(self, loss: Tensor) -> None:
        self.manual_backward(loss / self.trainer_config.accumulate)

    def _train_decoder(
        self, found_B3HW: Tensor, image_B3HW: Tensor, critic: UNetDiscriminator | None
    ) -> Figures:
        weights = self.config
        terms = reconstruction_losses(found_B3HW, image_B3HW, self.perceptual)
        loss = weights.l1 * terms.l1 + weights.lpips * terms.lpips
        figures = {"l1": terms.l1} | ({"lpips": terms.lpips} if self.perceptual is not None else {})
        if critic is not None:
            critic.requires_grad_(False)  # it judges here and learns below
            adversarial = generator_loss(single(critic(found_B3HW)), weights.gan)
            figures["adversarial"] = adversarial
            if weights.adaptive:
                last_layer = self.tokenizer.decoder.conv_out.weight
                factor = adaptive_weight(loss, adversarial, last_layer)
                figures["adaptive_weight"] = factor
                adversarial = factor * adversarial
            loss = loss + weights.adversarial * adversarial
        self._backward(loss)
        if critic is not None:
            critic.requires_grad_(True)
        return figures | {"loss": loss}

    def _train_discriminator(
        self, found_B3HW: Tensor, image_B3HW: Tensor, critic: UNetDiscriminator
    ) -> Figures:
        weights = self.config
        real, fake = single(critic(image_B3HW)), single(critic(found_B3HW))
        loss = discriminator_loss(real, fake, weights.gan)
        figures = {"discriminator_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if weights.r1 > 0:
            with torch.autocast(self.device.type, enabled=False):
                real_B3HW = image_B3HW.detach().clone().requires_grad_()
                figures["r1"] = r1_penalty(critic(real_B3HW), real_B3HW)
            loss = loss + weights.r1 * figures["r1"]
        self._backward(loss)
        return figures

    def _step(self, critic: UNetDiscriminator | None) -> None:
        """One step of the decoder and, once it has begun, of the discriminator; then the schedules and the log."""
        schedulers = self.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        wrapped, plain = self.optimizers(), self.trainer.optimizers
        counted = wrapped[0] if isinstance(wrapped, list) else wrapped
        self._figures["learning_rate"] = torch.tensor(plain[0].param_groups[0]["lr"], device=self.device)
        self._figures["gradient_norm"] = self._settle_gradients(self.trained)
        if critic is not None:
            self._figures["discriminator_gradient_norm"] = self._settle_gradients(critic)
        self._refuse_non_finite()
        for optimizer, scheduler in zip([counted, *plain[1:]], schedulers, strict=True):
            if optimizer is counted or critic is not None:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        self._log_step()
        self._micro_batches, self._figures = 0, {}

    def _settle_gradients(self, module: nn.Module) -> Tensor:
        """Averages the gradients over ranks and clips them; their norm before clipping."""
        parameters = [p for p in module.parameters() if p.grad is not None]
        if self.trainer.world_size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            flat = self.trainer.strategy.reduce(flat, reduce_op="mean")
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        return nn.utils.clip_grad_norm_(parameters, self.trainer_config.gradient_clip or float("inf"))

    def _refuse_non_finite(self) -> None:
        """Before the step, so that the weights, and with them the last checkpoint, stay good."""
        names = list(self._figures)
        finite = torch.stack([self._figures[name].float() for name in names]).isfinite().tolist()
        wrong = [name for name, good in zip(names, finite, strict=True) if not good]
        if wrong:
            raise UserError(
                f"step {self.global_step + 1}: {', '.join(wrong)} is not finite; the checkpoints before it are good. "
                "Lower optimizer.learning_rate or decoder.adversarial, or set trainer.precision=32-true"
            )

    def _log_step(self) -> None:
        """Straight to the loggers: Lightning's own interval and axis would count accumulated batches."""
        self.log("train/loss", self._figures["loss"], prog_bar=True, logger=False)
        if self.global_step % self.trainer_config.log_every:
            return
        values = torch.stack([value.float() for value in self._figures.values()])
        values = self.trainer.strategy.reduce(values, reduce_op="mean").tolist()
        named = {f"train/{name}": value for name, value in zip(self._figures, values, strict=True)}
        for logger in self.loggers:
            logger.log_metrics(named, step=self.global_step)

    # ---- validation and the result ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        # in a tuple: its perceptual network must not be saved
        self._quality = (ReconstructionQuality(self.perceptual, "lpips").to(self.device),)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        parts = self.trained if self.ema_trained is None else self.ema_trained
        found_B3HW = decode(parts, self._latent(batch["image"]))
        self._quality[0].update((found_B3HW + 1) / 2, (batch["image"] + 1) / 2)

    def on_validation_epoch_end(self) -> None:
        values = {f"validation/{name}": value for name, value in self._quality[0].compute().items()}
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step)
        self.log_dict(values, logger=False)  # for callbacks that monitor a value

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            save_rqvae(self.tuned(), Path(self.trainer.default_root_dir) / WEIGHTS_FILE)
