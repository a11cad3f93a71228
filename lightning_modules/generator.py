"""Training of the scale transformer, causal or non-causal (Sections 3 and 4).

Shape suffixes: B images, L tokens of all scales, T caption tokens, C code or caption width, P pooled width.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_modules.config import LossConfig, OptimizerConfig, TrainerConfig
from lightning_modules.latent_cache import LatentCache
from lightning_modules.nonfinite_guard import NonfiniteGuard
from lightning_modules.optimization import build_optimizer
from lightning_modules.strategies.gather_per_step import full_tensor
from lightning_modules.strategies.parallel import ShardedStrategy, shard, unsharded
from lightning_modules.validation_splits import ALL, metric_prefixes, of_batch
from switti.distributed.optimizer_state import local_shard
from switti.errors import UserError
from switti.losses.cross_entropy import HeadLosses, by_scale, head_losses
from switti.metrics.generator_statistics import GeneratorStatistics
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import check_latent, sample_latent
from switti.text.base import TextEmbedding
from switti.tokenizer.rqvae import CODES, RQVAE, check_codes
from switti.weights.fill import build_empty, fill

Batch = dict[str, Any]


class FixedBatch(NamedTuple):
    """Tokens [B, L], teacher-forcing inputs, and text, its mask, pooled text and crop."""

    tokens: Tensor
    inputs: Tensor
    conditions: tuple[Tensor, ...]


def check_text(batch: Batch) -> None:
    """UserError for a batch without text embeddings."""
    if "text" not in batch:
        raise UserError(
            "the batch has no text embeddings: set data.embeddings, or give the data module the text encoder"
        )


class GeneratorModule(LightningModule):
    """Next-scale prediction with a frozen tokenizer and precomputed text embeddings.

    Args:
        tokenizer: frozen; not a registered submodule, so that it is not saved and not sharded, and has no EMA.
        seed: of the initial weights, so that variants of one seed start from the same ones.
        ema: keep an exponential moving average of the transformer (`ema_generator`), which sampling then uses.
        initial_state: weights to start from instead, those of `init_from`.
    """

    generator: ScaleTransformer | None
    ema_generator: ScaleTransformer | None

    def __init__(
        self,
        model: GeneratorConfig,
        tokenizer: RQVAE,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        trainer: TrainerConfig,
        *,
        seed: int,
        ema: bool,
        initial_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model_config = model
        self.optimizer_config = optimizer
        self.loss_config = loss
        self.trainer_config = trainer
        self.seed = seed
        self.ema = ema
        self._initial_state = initial_state
        self.generator = None
        self.ema_generator = None
        self.nonfinite_guard = NonfiniteGuard()
        self._frozen = (tokenizer.eval().requires_grad_(False),)
        self._encode = LatentCache(tokenizer.encode) if trainer.cache_latents else tokenizer.encode
        self._values: dict[str, list[Tensor]] = {}

    @property
    def tokenizer(self) -> RQVAE:
        return self._frozen[0]

    @property
    def _bfloat16(self) -> bool:
        """Whether blocks compute in bfloat16."""
        return self.trainer_config.precision == "bf16-mixed"

    # ---- building and moving ------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.generator is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.generator = ScaleTransformer(self.model_config, self.trainer_config.attention)
        if self._initial_state is not None:
            fill(self.generator, self._initial_state, "init_from")
            self._initial_state = None
        self.generator.checkpointing = self.trainer_config.checkpointing
        if self.trainer_config.strategy == "fsdp":
            # From `build_strategy`.
            assert isinstance(self.trainer.strategy, ShardedStrategy)
            self._shard(self.trainer.strategy)
        elif self.ema:
            self.ema_generator = copy.deepcopy(self.generator).eval().requires_grad_(False)
        if self.trainer_config.compile:
            for block in self.generator.blocks:
                # Hooks around it, those that gather a sharded block among them, are not compiled.
                block.forward = torch.compile(block.forward)

    def _shard(self, strategy: ShardedStrategy) -> None:
        """Every rank has the same unsharded weights and keeps its shard; the EMA begins as a copy of that shard."""
        assert self.generator is not None
        mesh = strategy.build_mesh()
        shard(self.generator, self.generator.blocks, mesh, self._bfloat16)
        if not self.ema:
            return
        self.ema_generator = build_empty(self.model_config).eval().requires_grad_(False)
        shard(self.ema_generator, self.ema_generator.blocks, mesh, self._bfloat16)
        self.ema_generator.to_empty(device=strategy.root_device)
        self.ema_generator.build_tables(strategy.root_device)
        with torch.no_grad():
            parameters = zip(self.ema_generator.parameters(), self.generator.parameters(), strict=True)
            for ema, source in parameters:
                local_shard(ema).copy_(local_shard(source))

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of (EMA copy, live module)."""
        if self.ema_generator is None or self.generator is None:
            return []
        return [(self.ema_generator, self.generator)]

    def on_fit_start(self) -> None:
        self.tokenizer.to(self.device)

    on_validate_start = on_test_start = on_predict_start = on_fit_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CODES] = self.tokenizer.quantize.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_codes(checkpoint, self.tokenizer, "tokenizer_weights")

    def configure_optimizers(self) -> Any:
        # Lightning calls configure_model first.
        assert self.generator is not None
        optimizer, scheduler = build_optimizer(
            self.generator, self.optimizer_config, self.trainer_config.max_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ---- training -----------------------------------------------------------------------------------------------

    def compute_losses(
        self, batch: Batch, model: ScaleTransformer, noise: float, correct: bool
    ) -> tuple[HeadLosses, Tensor]:
        """Cross-entropy with latent noise of strength `noise`, and the tokens [B, L].

        correct: also whether the most probable tokens are the right ones.
        """
        check_text(batch)
        with torch.no_grad():
            latent = self._encode(batch["image"])
            tokens = self.tokenizer.tokenize_latent(latent, noise, batch["seed"])
            inputs = self.tokenizer.teacher_forcing(tokens)
        smoothing = self.loss_config.label_smoothing if self.training else 0.0
        read_out = partial(head_losses, tokens_BL=tokens, label_smoothing=smoothing, correct=correct)
        conditions = (batch[name] for name in ("text", "text_mask", "pooled", "crop"))
        return model(inputs, *conditions, read_out), tokens

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        assert self.generator is not None
        logs = (self.global_step + 1) % self.trainer_config.log_every == 0
        losses, tokens = self.compute_losses(batch, self.generator, self.loss_config.latent_noise, logs)
        self.nonfinite_guard.watch(losses.mean)
        self._collect({"train/loss": losses.mean})
        if losses.correct_BL is not None:
            self._collect_by_scale(losses.tokens_BL, losses.correct_BL, tokens)
        return losses.mean

    def _collect_by_scale(self, losses: Tensor, correct: Tensor, tokens: Tensor) -> None:
        pyramid = self.tokenizer.pyramid
        values: dict[str, Tensor] = {}
        for name, per_scale in (
            ("loss", by_scale(losses, pyramid)),
            ("accuracy", by_scale(correct, pyramid)),
        ):
            values |= {f"train/{name}_by_scale/{k}": value for k, value in enumerate(per_scale)}
        self._collect(values)
        used_V = losses.new_zeros(self.model_config.codebook_size)
        self._collect({"used": used_V.index_fill(0, tokens.flatten(), 1.0)})

    def _collect(self, values: Mapping[str, Tensor]) -> None:
        """Keeps values of a micro-batch until the optimizer step, when their means are logged."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        collected, self._values = self._values, {}
        if "used" in collected:
            # Codebook entries that any rank has seen in any micro-batch.
            used_V = self.trainer.strategy.reduce(
                torch.stack(collected.pop("used")).amax(dim=0), reduce_op="max"
            )
            self.log("train/codebook_use", used_V.mean())
        for name, values in collected.items():
            self.log(name, torch.stack(values).mean(), prog_bar=name == "train/loss", sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the global norm over all ranks and logs the norm before clipping. If it is not finite, the step is
        skipped."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf")))
        self.nonfinite_guard.settle(norm, parameters)
        self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    # ---- the objective on a fixed batch -------------------------------------------------------------------------

    @torch.no_grad()
    def prepare_objective(self, batch: Batch) -> FixedBatch:
        """Tokens with the latent noise of training, drawn from the seeds, and the inputs that follow from them."""
        check_text(batch)
        tokens = self.tokenizer.tokenize(batch["image"], self.loss_config.latent_noise, batch["seed"])
        conditions = tuple(batch[name] for name in ("text", "text_mask", "pooled", "crop"))
        return FixedBatch(tokens, self.tokenizer.teacher_forcing(tokens), conditions)

    @torch.no_grad()
    def objective(self, prepared: FixedBatch) -> dict[str, Tensor]:
        """Cross-entropy without label smoothing, of the live weights: the mean over all tokens, and by scale."""
        assert self.generator is not None
        read_out = partial(head_losses, tokens_BL=prepared.tokens, correct=False)
        losses = self.generator(prepared.inputs, *prepared.conditions, read_out)
        scales = enumerate(by_scale(losses.tokens_BL, self.tokenizer.pyramid))
        return {"loss": losses.mean} | {f"loss_by_scale/{k}": value for k, value in scales}

    # ---- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._prefixes = metric_prefixes(self.trainer)
        # In a dictionary, which nn.Module does not register.
        self._statistics = {
            prefix: GeneratorStatistics(self.tokenizer.pyramid, self.model_config.codebook_size).to(
                self.device
            )
            for prefix in self._prefixes
            if prefix
        }

    def validation_step(self, batch: Batch, batch_index: int, dataloader_idx: int = 0) -> None:
        assert self.generator is not None
        losses, tokens = self.compute_losses(batch, self.generator, 0.0, correct=True)
        assert losses.correct_BL is not None
        for prefix in of_batch(self._prefixes, dataloader_idx):
            self._statistics[prefix].update(tokens, losses.tokens_BL, losses.correct_BL)

    def on_validation_epoch_end(self) -> None:
        for prefix, statistics in self._statistics.items():
            values = statistics.compute()
            self.log(f"{prefix}/loss", values.pop("loss"), prog_bar=prefix == ALL)
            self.log_dict({f"{prefix}/{name}": value for name, value in values.items()})

    # ---- sampling -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        text: TextEmbedding,
        null: TextEmbedding,
        seeds: list[int],
        sampling: SamplingConfig,
    ) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], by the EMA if there is one: one per row of `text` and seed.

        null: the null caption, one row for all or one each.
        """
        model = self.generator if self.ema_generator is None else self.ema_generator
        assert model is not None
        was_training = model.training
        model.eval()
        try:
            with unsharded(model), torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16):
                latent = sample_latent(
                    model,
                    self.tokenizer,
                    text.to(self.device),
                    null.to(self.device),
                    sampling,
                    ImageNoise(seeds, self.device),
                )
                check_latent(latent)
                image = self.tokenizer.decode(latent)
        finally:
            model.train(was_training)
        return (image.float().clamp(-1, 1) + 1) / 2
