"""Base of the autoencoder trainings (tokenizer, its decoder): reconstruction losses, a discriminator, one step count.

Two optimizers mean manual optimization. Lightning counts every step of an optimizer that it has wrapped, so the
discriminator's is stepped unwrapped: `trainer.global_step` is the number of the model's steps, by which max_steps,
checkpoints, the EMA and all other callbacks count. Gradients are accumulated, averaged over ranks and clipped here;
the trainer must be built with accumulate_grad_batches=1 and without gradient_clip_val. Under fsdp the networks and
their EMA are sharded between steps (`strategies.gather_per_step`), so that a step computes the same as under ddp.

Shape suffixes: B batch, H, W rows and columns of images.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.nonfinite_guard import NonfiniteGuard
from lightning_modules.optimization import build_optimizer
from lightning_modules.strategies.gather_per_step import reshard_with_gradients, shard_between_steps, unshard
from lightning_modules.strategies.parallel import ShardedStrategy, unsharded
from lightning_modules.tokenizer_config import ReconstructionLossConfig
from lightning_modules.validation_splits import ALL, metric_prefixes, of_batch
from switti.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, r1_penalty
from switti.losses.perceptual import build_lpips
from switti.losses.reconstruction import ReconstructionLosses, reconstruction_losses
from switti.metrics.image_quality import ReconstructionQuality
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.discriminator import UNetDiscriminator, check_sides
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import fill_tokenizer
from switti.weights.save import save_tokenizer

WEIGHTS_FILE = "tokenizer.safetensors"
Values = dict[str, Tensor]
Trained = TypeVar("Trained", bound=nn.Module)


def to_float32(x: Tensor) -> Tensor:
    """bfloat16 → float32, in which losses are computed; float64 stays."""
    return x.float() if x.dtype.itemsize < 4 else x


def from_state(config: RQVAEConfig, state: Mapping[str, Tensor]) -> RQVAE:
    """An RQ-VAE with copies of these weights, frozen."""
    return fill_tokenizer(config, state, "the trained tokenizer").eval().requires_grad_(False)


class Reconstructed(NamedTuple):
    """A micro-batch's reconstructions and their targets [B, 3, H, W] in [-1, 1]; a loss besides those on images.

    values: further values for the log.
    """

    output: Tensor
    target: Tensor
    extra_loss: Tensor | None = None
    values: Values = {}  # noqa: RUF012 (only read)


class AutoencoderModule(pl.LightningModule, Generic[Trained]):
    """Base of the autoencoder trainings. Subclasses define `trained_module`, `ema_module`, `exported`, `reconstruct`.

    Batches need `image` [B, 3, H, W] in [-1, 1]; with `enlarged` bool [B] the share of images that were smaller than
    the crop, and were enlarged to it, is logged. At the end of training the run folder gets `tokenizer.safetensors`,
    which `tokenizer_weights` accepts. A step with a loss that is not finite is skipped by both optimizers.

    Args:
        sizes: heights, which are also the widths, of the images that will be seen, in px.
        seed: of the discriminator's initial weights.
    """

    def __init__(
        self,
        loss: ReconstructionLossConfig,
        optimizer: OptimizerConfig,
        trainer: TrainerConfig,
        *,
        sizes: Sequence[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss_config, self.optimizer_config, self.trainer_config = loss, optimizer, trainer
        # In a tuple, which nn.Module does not register: frozen, not part of the saved state.
        self._perceptual = (build_lpips(loss.lpips_net) if loss.lpips > 0 else None,)
        self.discriminator = None
        if loss.adversarial > 0:
            for size in sizes:
                check_sides(size, size)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.discriminator = UNetDiscriminator(loss.discriminator_features)
        self.nonfinite_guard = NonfiniteGuard()
        self._micro_batches = 0
        self._values: Values = {}

    # ---- for subclasses -----------------------------------------------------------------------------------------

    @property
    def trained_module(self) -> Trained:
        """The network that the first optimizer trains."""
        raise NotImplementedError

    @property
    def ema_module(self) -> Trained | None:
        """The EMA copy of `trained_module`; None if no EMA is kept."""
        raise NotImplementedError

    def exported(self) -> RQVAE:
        """The tokenizer to be saved at the end, unsharded. Under fsdp every rank must call it."""
        raise NotImplementedError

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstructed:
        """The forward pass of a micro-batch, with gradients."""
        raise NotImplementedError

    def reconstruct_fixed(self, prepared: Any) -> Reconstructed:
        """The same for what `prepare_objective` has made of a fixed batch, by unsharded weights; nothing is drawn."""
        raise NotImplementedError

    def after_step(self, finite: bool) -> None:
        """After each step of the first optimizer; for updates without gradients. finite: it was not skipped."""

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of (EMA copy, live module)."""
        return [] if self.ema_module is None else [(self.ema_module, self.trained_module)]

    @property
    def evaluated(self) -> Trained:
        """The EMA copy if there is one, else the live module."""
        return self.trained_module if self.ema_module is None else self.ema_module

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, by whose gradients the adaptive weight is computed."""
        return self.trained_module.get_parameter("decoder.conv_out.weight")

    # ---- set-up -------------------------------------------------------------------------------------------------

    @property
    def perceptual(self) -> nn.Module | None:
        """LPIPS, or None if its weight is 0."""
        return self._perceptual[0]

    def configure_model(self) -> None:
        """Under fsdp: every rank has initialized the same unsharded weights and keeps its shard."""
        if self.trainer_config.strategy != "fsdp":
            return
        strategy = self.trainer.strategy
        # From `build_strategy`.
        assert isinstance(strategy, ShardedStrategy)
        mesh = strategy.build_mesh()
        for module in (self.trained_module, self.ema_module, self.discriminator):
            if module is not None:
                shard_between_steps(module, mesh)

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
                unshard(module)
        with self._without_gradient_sync():
            result = self.reconstruct(batch)
            values = dict(result.values) | self._train_model(result, critic)
            if critic is not None:
                values |= self._train_discriminator(result.output.detach(), result.target, critic)
        if "enlarged" in batch:
            values["enlarged_share"] = batch["enlarged"].float().mean()
        share = 1 / self.trainer_config.accumulate
        for name, value in values.items():
            self._values[name] = self._values.get(name, 0) + share * value.detach()
        self._micro_batches += 1
        if self._micro_batches == self.trainer_config.accumulate:
            self._step(critic)

    def _without_gradient_sync(self) -> AbstractContextManager[None]:
        """No reduction in the backward passes: DDP's own assumes one of them per step, over all parameters."""
        strategy = self.trainer.strategy
        # Of sharded networks `unshard` has switched it off.
        if self.trainer.world_size == 1 or isinstance(strategy, ShardedStrategy):
            return nullcontext()
        assert isinstance(strategy, DDPStrategy)
        return strategy.block_backward_sync()

    def _backward(self, loss: Tensor) -> None:
        self.manual_backward(loss / self.trainer_config.accumulate)

    def _train_model(self, result: Reconstructed, critic: UNetDiscriminator | None) -> Values:
        weights = self.loss_config
        output_B3HW = to_float32(result.output)
        terms, loss = self._reconstruction_loss(output_B3HW, result.target)
        values = {"l1": terms.l1, "mse": terms.mse}
        if self._active_perceptual is not None:
            values["lpips"] = terms.lpips
        if critic is not None:
            # Trained below, not here.
            critic.requires_grad_(False)
            adversarial = generator_loss(to_float32(critic(output_B3HW)), weights.gan)
            values["adversarial"] = adversarial
            if weights.adaptive:
                factor = adaptive_weight(loss, adversarial, self.last_layer)
                values["adaptive_weight"] = factor
                adversarial = factor * adversarial
            loss = loss + weights.adversarial * adversarial
        if result.extra_loss is not None:
            loss = loss + result.extra_loss
        self._backward(loss)
        if critic is not None:
            critic.requires_grad_(True)
        return values | {"loss": loss}

    @property
    def _active_perceptual(self) -> nn.Module | None:
        """LPIPS once its term has begun."""
        return self.perceptual if self.global_step >= self.loss_config.lpips_start_step else None

    def _reconstruction_loss(
        self, output_B3HW: Tensor, target_B3HW: Tensor
    ) -> tuple[ReconstructionLosses, Tensor]:
        """The terms on images, and their weighted sum."""
        weights = self.loss_config
        network, share = self._active_perceptual, weights.lpips_share
        terms = reconstruction_losses(output_B3HW, target_B3HW, network, share)
        return terms, weights.l1 * terms.l1 + weights.mse * terms.mse + weights.lpips * terms.lpips

    def _train_discriminator(
        self, output_B3HW: Tensor, target_B3HW: Tensor, critic: UNetDiscriminator
    ) -> Values:
        weights = self.loss_config
        real, fake = to_float32(critic(target_B3HW)), to_float32(critic(to_float32(output_B3HW)))
        loss = discriminator_loss(real, fake, weights.gan)
        values = {"discriminator_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if weights.r1 > 0:
            with torch.autocast(self.device.type, enabled=False):
                real_B3HW = target_B3HW.detach().clone().requires_grad_()
                values["r1"] = r1_penalty(critic(real_B3HW), real_B3HW)
            loss = loss + weights.r1 * values["r1"]
        self._backward(loss)
        return values

    def _step(self, critic: UNetDiscriminator | None) -> None:
        """Steps the model and, once its training has begun, the discriminator; then the schedules; then logs."""
        plain: list[torch.optim.Optimizer] = self.trainer.optimizers
        schedulers: Any = self.lr_schedulers()
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        wrapped: Any = self.optimizers()
        counted = wrapped[0] if isinstance(wrapped, list) else wrapped
        self._values["learning_rate"] = torch.tensor(plain[0].param_groups[0]["lr"], device=self.device)
        self._values["gradient_norm"] = self._settle_gradients(self.trained_module)
        if critic is not None:
            self._values["discriminator_gradient_norm"] = self._settle_gradients(critic)
        finite = self._settle_step()
        for optimizer, scheduler in zip([counted, *plain[1:]], schedulers, strict=True):
            if optimizer is counted or critic is not None:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        self.after_step(finite)
        if finite:
            self._log_step()
        self._micro_batches, self._values = 0, {}

    def _settle_gradients(self, module: nn.Module) -> Tensor:
        """Averages the gradients over ranks, clips and reshards them; their norm before clipping."""
        parameters = [p for p in module.parameters() if p.grad is not None]
        if self.trainer.world_size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            flat = self._reduce(flat, "mean")
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = part.view_as(p)
        norm = nn.utils.clip_grad_norm_(parameters, self.trainer_config.gradient_clip or float("inf"))
        reshard_with_gradients(module)
        return norm

    def _settle_step(self) -> bool:
        """Whether both steps may be taken, on all ranks alike; if not, they are skipped."""
        values = torch.stack([value.float() for value in self._values.values()])
        modules = [module for module in (self.trained_module, self.discriminator) if module is not None]
        return self.nonfinite_guard.settle(values, [p for module in modules for p in module.parameters()])

    def _log_step(self) -> None:
        """Straight to the loggers: Lightning's own interval and axis would count micro-batches."""
        self.log("train/loss", self._values["loss"], prog_bar=True, logger=False)
        if self.global_step % self.trainer_config.log_every:
            return
        values = torch.stack([value.float() for value in self._values.values()])
        means = self._reduce(values, "mean").tolist()
        self.log_now({f"train/{name}": mean for name, mean in zip(self._values, means, strict=True)})

    def _reduce(self, values: Tensor, operation: Literal["mean", "sum"]) -> Tensor:
        """Over all ranks."""
        return self.trainer.strategy.reduce(values, reduce_op=operation)

    def log_now(self, values: Mapping[str, float]) -> None:
        """Write values to all loggers at the current step."""
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=self.global_step)

    # ---- the objective on a fixed batch -------------------------------------------------------------------------

    def prepare_objective(self, batch: dict[str, Any]) -> Any:
        """The batch itself; subclasses encode what is frozen."""
        return batch

    @torch.no_grad()
    def objective(self, prepared: Any) -> Values:
        """The loss without the adversarial term, which is measured by a network that changes itself."""
        with unsharded(self.trained_module):
            result = self.reconstruct_fixed(prepared)
        terms, loss = self._reconstruction_loss(to_float32(result.output), result.target)
        if result.extra_loss is not None:
            loss = loss + result.extra_loss
        values = {"loss": loss, "l1": terms.l1, "mse": terms.mse}
        return values if self._active_perceptual is None else values | {"lpips": terms.lpips}

    # ---- validation and the result ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._prefixes = metric_prefixes(self.trainer)
        # In a dictionary, which nn.Module does not register: its perceptual network must not be saved.
        self._quality = {
            prefix: ReconstructionQuality(self.perceptual, "lpips").to(self.device)
            for prefix in self._prefixes
            if prefix
        }

    def validate_images(self, output_B3HW: Tensor, target_B3HW: Tensor, loader: int) -> None:
        """Adds reconstructions to the epoch's quality metrics; images in [-1, 1]."""
        for prefix in of_batch(self._prefixes, loader):
            self._quality[prefix].update((to_float32(output_B3HW) + 1) / 2, (target_B3HW + 1) / 2)

    def on_validation_epoch_end(self) -> None:
        values = {
            f"{prefix}/{name}": float(value)
            for prefix, quality in self._quality.items()
            for name, value in quality.compute().items()
        }
        values |= {f"{ALL}/{name}": value for name, value in self.more_validation().items()}
        self.log_now(values)
        # For callbacks that monitor a value.
        self.log_dict(values, logger=False)

    def more_validation(self) -> dict[str, float]:
        """Values of the split besides the quality of images."""
        return {}

    def on_train_end(self) -> None:
        model = self.exported()
        if self.trainer.is_global_zero:
            save_tokenizer(model, Path(self.trainer.default_root_dir) / WEIGHTS_FILE)
