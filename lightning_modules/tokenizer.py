"""RQ-VAE pretraining (Section 3.1): reconstruction losses, optionally an adversarial one, and the quantizer's loss.

Shape suffixes: B batch, C code width, L tokens of all scales, R token vectors, S scales, V codebook size, H, W rows and
columns of images.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.autoencoder_base import AutoencoderModule, Reconstructed, from_state
from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.strategies.gather_per_step import assign, full_state, full_tensor
from lightning_modules.strategies.parallel import unsharded
from lightning_modules.tokenizer_config import TokenizerLossConfig
from switti.distributed.collectives import all_gather_object
from switti.errors import UserError
from switti.scales import Pyramid
from switti.tokenizer.codebook import CodebookAverage, draw_rows, entropy, kmeans, sums_by_code, token_counts
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE, Reconstruction


class TokenizerModule(AutoencoderModule[RQVAE]):
    """Trains `rqvae`; validation and the exported weights use its EMA `ema_rqvae` if there is one.

    seed: of the initial weights. ema: keep `ema_rqvae`. Batches need, for flips, `seed` int64 [B].
    """

    window_hits: Tensor
    validation_counts: Tensor
    _step_counts_V: Tensor
    _step_sums_VC: Tensor

    def __init__(
        self,
        tokenizer: RQVAEConfig,
        optimizer: OptimizerConfig,
        loss: TokenizerLossConfig,
        trainer: TrainerConfig,
        *,
        seed: int,
        ema: bool,
    ) -> None:
        pyramids = [Pyramid(tuple(scales)) for scales in (tokenizer.scales, *loss.pyramids)]
        for pyramid in pyramids:
            if pyramid.latent_side > tokenizer.scales[-1]:
                raise UserError(
                    f"tokenizer_loss.pyramids: {list(pyramid.sides)} must not end beyond the last of "
                    f"tokenizer.scales={tokenizer.scales}: images are made smaller for it, never larger"
                )
        sizes = [pyramid.latent_side * tokenizer.downsampling for pyramid in pyramids]
        super().__init__(loss, optimizer, trainer, sizes=sizes, seed=seed)
        self.pyramids = pyramids
        # The same object as loss_config, under its own type.
        self.settings = loss
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rqvae = RQVAE(tokenizer)
        self.rqvae.quantize.train_phi(pyramids)
        size, codes_VC = tokenizer.codebook_size, self.rqvae.quantize.embedding.weight
        self.code_average = None
        if loss.codebook_update == "ema":
            codes_VC.requires_grad_(False)
            self.code_average = CodebookAverage(codes_VC, loss.codebook_decay)
        self.ema_rqvae = copy.deepcopy(self.rqvae).eval().requires_grad_(False) if ema else None
        self._codes_updated_at = -1
        self._first_images: list[Tensor] = []
        self.register_buffer("window_hits", torch.zeros(size))
        # Of the current step, on this rank: how often each code was chosen, and the sum of the vectors that chose it.
        self.register_buffer("_step_counts_V", torch.zeros(size), persistent=False)
        self.register_buffer("_step_sums_VC", torch.zeros(codes_VC.shape), persistent=False)
        counts_SV = torch.zeros(len(tokenizer.scales), size)
        self.register_buffer("validation_counts", counts_SV, persistent=False)

    @property
    def trained_module(self) -> RQVAE:
        return self.rqvae

    @property
    def ema_module(self) -> RQVAE | None:
        return self.ema_rqvae

    def exported(self) -> RQVAE:
        """With the live usage counts: they are a buffer, of which no EMA is kept."""
        model = from_state(self.rqvae.config, full_state(self.evaluated))
        model.quantize.ema_vocab_hit_SV.copy_(self.rqvae.quantize.ema_vocab_hit_SV)
        return model

    def train(self, mode: bool = True) -> "TokenizerModule":
        """The EMA copy stays in evaluation mode."""
        super().train(mode)
        if self.ema_rqvae is not None:
            self.ema_rqvae.eval()
        return self

    # ---- training -----------------------------------------------------------------------------------------------

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstructed:
        pyramid = self._pyramid_of_step()
        image_B3HW = self._images(batch, pyramid)
        output: Reconstruction = self.rqvae(image_B3HW, pyramid)
        counts_V, sums_VC = sums_by_code(
            output.rows.flatten(0, 1), output.tokens.flatten(), self.rqvae.config.codebook_size
        )
        self._step_counts_V += counts_V
        self._step_sums_VC += sums_VC
        values = {"vq_loss": output.vq_loss, "codebook_use": (counts_V > 0).float().mean()}
        return Reconstructed(output.image, image_B3HW, self.settings.vq * output.vq_loss, values)

    def reconstruct_fixed(self, prepared: Any) -> Reconstructed:
        """On the tokenizer's own pyramid, mirrored by the seeds as in training."""
        image_B3HW = self._images(prepared, self.rqvae.pyramid)
        output: Reconstruction = self.rqvae(image_B3HW)
        return Reconstructed(output.image, image_B3HW, self.settings.vq * output.vq_loss)

    def _pyramid_of_step(self) -> Pyramid:
        """One of the pyramids, drawn by the step's number alone: the same on all ranks and after a resume."""
        pick = torch.randint(len(self.pyramids), (), generator=self._generator())
        return self.pyramids[int(pick)]

    def _images(self, batch: Mapping[str, Any], pyramid: Pyramid) -> Tensor:
        """Training images at the pyramid's size; whether one is mirrored depends on its own seed only."""
        image_B3HW = batch["image"]
        size = pyramid.latent_side * self.rqvae.config.downsampling
        if size < image_B3HW.shape[-1]:
            image_B3HW = F.interpolate(image_B3HW, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        if not self.settings.flip:
            return image_B3HW
        mirrored_B = ((batch["seed"] >> 17) % 2 == 1).to(image_B3HW.device, non_blocking=True)
        return torch.where(mirrored_B[:, None, None, None], image_B3HW.flip(-1), image_B3HW)

    def after_step(self, finite: bool) -> None:
        """Updates usage counts and, if they get no gradients, the codebook entries, over all ranks."""
        if finite:
            self._count_codes()
        self._step_counts_V.zero_()
        self._step_sums_VC.zero_()

    def _count_codes(self) -> None:
        counts_V, sums_VC = (self._over_ranks(x) for x in (self._step_counts_V, self._step_sums_VC))
        self.window_hits += counts_V
        if self.code_average is not None:
            codes_VC = full_tensor(self.rqvae.quantize.embedding.weight).clone()
            self.code_average.update(codes_VC, counts_V, sums_VC)
            assign(self.rqvae.quantize.embedding.weight, codes_VC)

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self._reduce(values.clone(), "sum")

    # ---- initialization and restarts of codebook entries --------------------------------------------------------

    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Initializes the codebook from the first batches, and restarts dead entries at regular steps.

        Before a step, not after one: checkpoints are written in between, and a resumed run must do the same.
        """
        config, step = self.settings, self.trainer.global_step
        if step == self._codes_updated_at:
            # Gradients are still accumulating.
            return
        self._codes_updated_at = step
        if step < config.init_batches and config.init_codebook != "random":
            self._initialize_codes(batch)
        elif step and config.restart_dead_every and step % config.restart_dead_every == 0:
            if step <= config.restart_until * self.trainer_config.max_steps:
                self._restart_dead_codes(batch)
            self.window_hits.zero_()

    def _initialize_codes(self, batch: Mapping[str, Any]) -> None:
        self._first_images.append(batch["image"].cpu())
        rows_RC = torch.cat([self._residual_rows(image.to(self.device)) for image in self._first_images])
        first = kmeans if self.settings.init_codebook == "kmeans" else draw_rows
        size = self.rqvae.config.codebook_size
        codes_VC = first(rows_RC, size, self._generator())
        self._replace_codes(torch.ones(size, dtype=torch.bool), codes_VC)
        if self.trainer.global_step + 1 == self.settings.init_batches:
            self._first_images = []

    def _restart_dead_codes(self, batch: Mapping[str, Any]) -> None:
        dead_V = self.window_hits == 0
        dead = int(dead_V.sum())
        if dead:
            rows_RC = self._residual_rows(batch["image"])
            self._replace_codes(dead_V, draw_rows(rows_RC, dead, self._generator()))
        self.log_now({"train/restarted_codes": float(dead)})

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.trainer.global_step)

    @torch.no_grad()
    def _residual_rows(self, image_B3HW: Tensor) -> Tensor:
        """Vectors that the codebook has to match: residuals of all scales, of the images of all ranks, [R, C]."""
        with unsharded(self.rqvae):
            rows_RC = self.rqvae.quantize.residuals(self.rqvae.encode(image_B3HW)).flatten(0, 1)
        if self.trainer.world_size == 1:
            return rows_RC
        gathered = self.all_gather(rows_RC)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)

    @torch.no_grad()
    def _replace_codes(self, which_V: Tensor, codes_RC: Tensor) -> None:
        """New values for some codebook entries, rank 0's on all ranks, in the EMA as well."""
        codes_RC = self.trainer.strategy.broadcast(codes_RC)
        for model in filter(None, (self.rqvae, self.ema_rqvae)):
            weight_VC = full_tensor(model.quantize.embedding.weight).clone()
            weight_VC[which_V.to(weight_VC.device)] = codes_RC.to(weight_VC)
            assign(model.quantize.embedding.weight, weight_VC)
        if self.code_average is not None:
            self.code_average.restart(which_V.to(self.device), codes_RC.to(self.device))

    # ---- validation and checkpoints -----------------------------------------------------------------------------

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        model = self.evaluated
        with unsharded(model):
            tokens_BL = model.tokenize(batch["image"])
            output_B3HW = model.decode(model.tokens_to_latent(tokens_BL))
        self.validation_counts += token_counts(tokens_BL, model.pyramid, model.config.codebook_size)
        self.validate_images(output_B3HW, batch["image"], dataloader_idx)

    def more_validation(self) -> dict[str, float]:
        """Codebook use over the split."""
        counts_SV = self._over_ranks(self.validation_counts)
        self.validation_counts.zero_()
        values = {"codebook_use": (counts_SV.sum(0) > 0).float().mean()}
        for scale, (counts_V, nats) in enumerate(zip(counts_SV, entropy(counts_SV), strict=True)):
            values[f"codebook_use_by_scale/{scale}"] = (counts_V > 0).float().mean()
            values[f"unigram_entropy_by_scale/{scale}"] = nats
            values[f"perplexity_by_scale/{scale}"] = nats.exp()
        return {name: float(value) for name, value in values.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hit_updates"] = self.rqvae.quantize.hit_updates
        of_ranks = all_gather_object(self._first_images)
        checkpoint["first_pictures"] = [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rqvae.quantize.hit_updates = checkpoint["hit_updates"]
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        of_all_ranks = checkpoint.get("first_pictures", [])
        self._first_images = [image_B3HW.tensor_split(world_size)[rank] for image_B3HW in of_all_ranks]
