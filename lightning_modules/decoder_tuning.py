"""Tuning of the RQ-VAE's decoder with everything before it frozen (Section 4.3): L1, LPIPS and an adversarial loss.

Shape suffixes: B batch, C code width, HH the square latent, H, W rows and columns of images.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.autoencoder_base import AutoencoderModule, Reconstructed, from_state, to_float32
from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from lightning_modules.strategies.gather_per_step import full_state
from switti.tokenizer.rqvae import RQVAE

PARTS = ("post_quant_conv", "decoder")


def decode(parts: nn.ModuleDict, f_hat_BCHH: Tensor) -> Tensor:
    """Quantized latent → image, unclamped."""
    for name in PARTS:
        f_hat_BCHH = parts[name](f_hat_BCHH)
    return to_float32(f_hat_BCHH)


class DecoderTuningModule(AutoencoderModule[nn.ModuleDict]):
    """Trains the decoder and post_quant_conv of `rqvae`; its encoder, quantizer and codebook keep every bit.

    ema: keep an exponential moving average (`ema_trained`), which validation and the exported weights then use.
    The result makes the same tokens as `rqvae` did and can replace it.
    """

    def __init__(
        self,
        rqvae: RQVAE,
        optimizer: OptimizerConfig,
        decoder: DecoderTuningConfig,
        trainer: TrainerConfig,
        *,
        seed: int,
        ema: bool,
    ) -> None:
        super().__init__(decoder, optimizer, trainer, sizes=[rqvae.config.resolution], seed=seed)
        self.trained = nn.ModuleDict({name: rqvae.get_submodule(name) for name in PARTS})
        # In a tuple, which nn.Module does not register: frozen, not part of the saved state.
        self._frozen = (rqvae.eval().requires_grad_(False),)
        self.trained.train().requires_grad_(True)
        self.ema_trained = copy.deepcopy(self.trained).requires_grad_(False) if ema else None

    @property
    def tokenizer(self) -> RQVAE:
        """The complete RQ-VAE, with the decoder that is being trained."""
        return self._frozen[0]

    @property
    def trained_module(self) -> nn.ModuleDict:
        return self.trained

    @property
    def ema_module(self) -> nn.ModuleDict | None:
        return self.ema_trained

    def exported(self) -> RQVAE:
        """A copy of the RQ-VAE with the EMA of the decoder, or the live one if no EMA is kept."""
        return from_state(self.tokenizer.config, full_state(self.tokenizer) | full_state(self.evaluated))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.tokenizer.to(self.device)

    on_validate_start = on_fit_start

    @torch.no_grad()
    def _latent(self, image_B3HW: Tensor) -> Tensor:
        return self.tokenizer.tokens_to_latent(self.tokenizer.tokenize(image_B3HW))

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstructed:
        return Reconstructed(decode(self.trained, self._latent(batch["image"])), batch["image"])

    def prepare_objective(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The frozen encoder's latent, and the images."""
        return self._latent(batch["image"]), batch["image"]

    def reconstruct_fixed(self, prepared: tuple[Tensor, Tensor]) -> Reconstructed:
        f_hat_BCHH, image_B3HW = prepared
        return Reconstructed(decode(self.trained, f_hat_BCHH), image_B3HW)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        output_B3HW = decode(self.evaluated, self._latent(batch["image"]))
        self.validate_images(output_B3HW, batch["image"], dataloader_idx)
