"""What pretraining of a tokenizer and tuning of its decoder share: losses on pictures, a discriminator, one step count.

Two optimisers mean manual optimisation. Lightning counts every step of an optimiser that it has wrapped, so the
discriminator's is stepped unwrapped: `trainer.global_step` is the number of the model's steps, which is what max_steps,
checkpoints, averages and all other callbacks go by. Gradients are accumulated, averaged over ranks and clipped here;
the trainer must be built with accumulate_grad_batches=1 and without gradient_clip_val. Under fsdp the networks and
their averages are divided between steps (`whole_steps`), so that a step computes what it does under ddp.

Shape suffixes: B batch, H, W rows and columns of pictures.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.nonfinite_guard import NonfiniteGuard
from lightning_modules.optimization import build_optimizer
from lightning_modules.strategies.gather_per_step import divide_step, divide_weights, hold_whole
from lightning_modules.strategies.parallel import ShardedStrategy
from lightning_modules.tokenizer_config import ReconstructionLossConfig
from switti.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty
from switti.losses.perceptual import build_lpips
from switti.losses.reconstruction import reconstruction_losses
from switti.metrics.image_quality import ReconstructionQuality
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.discriminator import UNetDiscriminator, check_sides
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import fill_tokenizer
from switti.weights.save import save_tokenizer

WEIGHTS_FILE = "tokenizer.safetensors"
Figures = dict[str, Tensor]


def single(x: Tensor) -> Tensor:
    """Half precision → float32, in which losses are computed."""
    return x.float() if x.dtype.itemsize < 4 else x


def from_state(config: RQVAEConfig, state: Mapping[str, Tensor]) -> RQVAE:
    """An RQ-VAE with copies of these weights, frozen."""
    return fill_tokenizer(config, state, "the trained tokenizer").eval().requires_grad_(False)


class Reconstructed(NamedTuple):
    """One training pass: reconstructions and their pictures [B, 3, H, W] in [-1, 1]; a loss besides those on pictures.

    figures: what the pass adds to the log.
    """

    found: Tensor
    target: Tensor
    extra_loss: Tensor | None = None
    figures: Figures = {}  # noqa: RUF012 (only read)


class ReconstructionModule(pl.LightningModule):
    """Base of the tokenizer's trainings. Subclasses give `trained_module`, `last_layer`, `exported`, `reconstruct`.

    sides: of the square pictures in px that will be seen. seed: of the discriminator's initial weights.
    Batches need `image` [B, 3, H, W] in [-1, 1]; with `enlarged` bool [B] the share of pictures that were smaller than
    the crop, and were enlarged to it, is logged. At the end of training the run folder gets `tokenizer.safetensors`,
    which `tokenizer_weights` accepts. A step with a loss that is no finite number is left out by both optimisers.
    """

    def __init__(
        self,
        loss: ReconstructionLossConfig,
        optimizer: OptimizerConfig,
        trainer: TrainerConfig,
        *,
        sides: Sequence[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss_config, self.optimizer_config, self.trainer_config = loss, optimizer, trainer
        # In a tuple, where nn.Module does not look: frozen, no part of the saved state.
        self._perceptual = (build_lpips(loss.lpips_net) if loss.lpips > 0 else None,)
        self.discriminator = None
        if loss.adversarial > 0:
            for side in sides:
                check_sides(side, side)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = UNetDiscriminator(loss.discriminator_features)
        self.nonfinite_guard = NonfiniteGuard()
        self._micro_batches = 0
        self._figures: Figures = {}

    # ---- what subclasses give -----------------------------------------------------------------------------------

    @property
    def trained_module(self) -> nn.Module:
        """What the first optimiser trains."""
        raise NotImplementedError

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, on which the adaptive weight is judged."""
        raise NotImplementedError

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(average, source) of what an average is kept of."""
        raise NotImplementedError

    def exported(self) -> RQVAE:
        """The tokenizer to be saved at the end, whole. Under fsdp every rank must ask for it."""
        raise NotImplementedError

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstructed:
        """The training pass, with gradients."""
        raise NotImplementedError

    def after_step(self, finite: bool) -> None:
        """After each step of the first optimiser; for what is not trained by gradients. finite: it was not left out."""

    # ---- set-up -------------------------------------------------------------------------------------------------

    @property
    def perceptual(self) -> nn.Module | None:
        """LPIPS, or None if it has no weight."""
        return self._perceptual[0]

    def configure_model(self) -> None:
        """Under fsdp: every rank has made the same whole weights and keeps its part."""
        if self.trainer_config.strategy != "fsdp":
            return
        strategy = self.trainer.strategy
        assert isinstance(strategy, ShardedStrategy)  # `build_strategy` has made it
        mesh = strategy.build_mesh()
        averages = [average for average, _ in self.ema_pairs()]
        for module in (self.trained_module, *averages, self.discriminator):
            if module is not None:
                divide_weights(module, mesh)

    def on_fit_start(self) -> None:
        if self.perceptual is not None:
            self.perceptual.to(self.device)

    on_validate_start = on_fit_start

    def configure_optimizers(self) -> Any:
        """The discriminator's schedule, warm-up included, begins with its own first step."""
        steps, first = self.trainer_config.max_steps, self.loss_config.start_step
        pairs = [build_optimizer(self.trained_module, self.optimizer_config, steps)]
        if self.discriminator is not None:
            pairs.append(build_optimizer(self.discriminator, self.optimizer_config, max(1, steps - first)))
        return [optimizer for optimizer, _ in pairs], [scheduler for _, scheduler in pairs]

    # ---- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        critic = self.discriminator if self.global_step >= self.loss_config.start_step else None
        for module in (self.trained_module, critic):
            if module is not None:
                hold_whole(module)
        with self._unsynchronised():
            done = self.reconstruct(batch)
            figures = dict(done.figures) | self._train_model(done, critic)
            if critic is not None:
                figures |= self._train_discriminator(done.found.detach(), done.target, critic)
        if "enlarged" in batch:
            figures["enlarged_share"] = batch["enlarged"].float().mean()
        share = 1 / self.trainer_config.accumulate
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0) + share * value.detach()
        self._micro_batches += 1
        if self._micro_batches == self.trainer_config.accumulate:
            self._step(critic)

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """No exchange in the backward passes: DDP's own supposes one of them per step, over all parameters."""
        strategy = self.trainer.strategy
        if self.trainer.world_size == 1 or isinstance(strategy, ShardedStrategy):  # `hold_whole` sees to it
            return nullcontext()
        return strategy.block_backward_sync()

    def _backward(self, loss: Tensor) -> None:
        self.manual_backward(loss / self.trainer_config.accumulate)

    def _train_model(self, done: Reconstructed, critic: UNetDiscriminator | None) -> Figures:
        weights = self.loss_config
        found_B3HW = single(done.found)
        terms = reconstruction_losses(found_B3HW, done.target, self.perceptual)
        loss = weights.l1 * terms.l1 + weights.mse * terms.mse + weights.lpips * terms.lpips
        figures = {"l1": terms.l1, "mse": terms.mse}
        if self.perceptual is not None:
            figures["lpips"] = terms.lpips
        if critic is not None:
            critic.requires_grad_(False)  # it judges here and learns below
            adversarial = generator_loss(single(critic(found_B3HW)), weights.gan)
            figures["adversarial"] = adversarial
            if weights.adaptive:
                factor = adaptive_weight(loss, adversarial, self.last_layer)
                figures["adaptive_weight"] = factor
                adversarial = factor * adversarial
            loss = loss + weights.adversarial * adversarial
        if done.extra_loss is not None:
            loss = loss + done.extra_loss
        self._backward(loss)
        if critic is not None:
            critic.requires_grad_(True)
        return figures | {"loss": loss}

    def _train_discriminator(
        self, found_B3HW: Tensor, target_B3HW: Tensor, critic: UNetDiscriminator
    ) -> Figures:
        weights = self.loss_config
        real, fake = single(critic(target_B3HW)), single(critic(single(found_B3HW)))
        loss = discriminator_loss(real, fake, weights.gan)
        figures = {"discriminator_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if weights.r1 > 0:
            with torch.autocast(self.device.type, enabled=False):
                real_B3HW = target_B3HW.detach().clone().requires_grad_()
                figures["r1"] = r1_penalty(critic(real_B3HW), real_B3HW)
            loss = loss + weights.r1 * figures["r1"]
        self._backward(loss)
        return figures

    def _step(self, critic: UNetDiscriminator | None) -> None:
        """One step of the model and, once it has begun, of the discriminator; then the schedules and the log."""
        schedulers = self.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        wrapped, plain = self.optimizers(), self.trainer.optimizers
        counted = wrapped[0] if isinstance(wrapped, list) else wrapped
        self._figures["learning_rate"] = torch.tensor(plain[0].param_groups[0]["lr"], device=self.device)
        self._figures["gradient_norm"] = self._settle_gradients(self.trained_module)
        if critic is not None:
            self._figures["discriminator_gradient_norm"] = self._settle_gradients(critic)
        finite = self._settle_step()
        for optimizer, scheduler in zip([counted, *plain[1:]], schedulers, strict=True):
            if optimizer is counted or critic is not None:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        self.after_step(finite)
        if finite:
            self._log_step()
        self._micro_batches, self._figures = 0, {}

    def _settle_gradients(self, module: nn.Module) -> Tensor:
        """Averages the gradients over ranks, clips and divides them; their norm before clipping."""
        parameters = [p for p in module.parameters() if p.grad is not None]
        if self.trainer.world_size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            flat = self.trainer.strategy.reduce(flat, reduce_op="mean")
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        norm = nn.utils.clip_grad_norm_(parameters, self.trainer_config.gradient_clip or float("inf"))
        divide_step(module)
        return norm

    def _settle_step(self) -> bool:
        """Whether both steps may be taken, on all ranks alike; if not, they are left out."""
        figures = torch.stack([value.float() for value in self._figures.values()])
        modules = [module for module in (self.trained_module, self.discriminator) if module is not None]
        return self.nonfinite_guard.settle(figures, [p for module in modules for p in module.parameters()])

    def _log_step(self) -> None:
        """Straight to the loggers: Lightning's own interval and axis would count accumulated batches."""
        self.log("train/loss", self._figures["loss"], prog_bar=True, logger=False)
        if self.global_step % self.trainer_config.log_every:
            return
        values = torch.stack([value.float() for value in self._figures.values()])
        values = self.trainer.strategy.reduce(values, reduce_op="mean").tolist()
        self.write_log({f"train/{name}": value for name, value in zip(self._figures, values, strict=True)})

    def write_log(self, values: Mapping[str, float]) -> None:
        """Now, at the present step."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.global_step)

    # ---- validation and the result ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        # in a tuple: its perceptual network must not be saved
        self._quality = (ReconstructionQuality(self.perceptual, "lpips").to(self.device),)

    def validate_pictures(self, found_B3HW: Tensor, target_B3HW: Tensor) -> None:
        """Adds reconstructions to the epoch's figures; pictures in [-1, 1]."""
        self._quality[0].update((single(found_B3HW) + 1) / 2, (target_B3HW + 1) / 2)

    def on_validation_epoch_end(self) -> None:
        values = {name: float(value) for name, value in self._quality[0].compute().items()}
        values = {f"validation/{name}": value for name, value in (values | self.more_validation()).items()}
        self.write_log(values)
        self.log_dict(values, logger=False)  # for callbacks that monitor a value

    def more_validation(self) -> dict[str, float]:
        """Figures of the split besides those on pictures."""
        return {}

    def on_train_end(self) -> None:
        model = self.exported()
        if self.trainer.is_global_zero:
            save_tokenizer(model, Path(self.trainer.default_root_dir) / WEIGHTS_FILE)
