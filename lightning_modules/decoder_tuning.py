"""Tuning of the RQ-VAE's decoder with everything before it frozen (Section 4.3): L1, LPIPS and an adversarial loss.

Shape suffixes: B batch, C code width, HH the square latent, H, W rows and columns of pictures.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.autoencoder_base import Reconstructed, ReconstructionModule, from_state, single
from lightning_modules.config import OptimizerConfig, TrainerConfig
from lightning_modules.decoder_tuning_config import DecoderTuningConfig
from lightning_modules.strategies.gather_per_step import whole_state
from switti.tokenizer.rqvae import RQVAE

PARTS = ("post_quant_conv", "decoder")


def decode(parts: nn.ModuleDict, f_hat_BCHH: Tensor) -> Tensor:
    """Quantised latent → picture, unclamped."""
    for name in PARTS:
        f_hat_BCHH = parts[name](f_hat_BCHH)
    return single(f_hat_BCHH)


class DecoderTuningModule(ReconstructionModule):
    """Trains the decoder and post_quant_conv of `rqvae`; its encoder, quantiser and codebook keep every bit.

    averaged: keep an exponential moving average (`ema_trained`), which validation and the exported weights then use.
    The result makes the same tokens as `rqvae` did and can take its place.
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
        sides = [rqvae.config.resolution]
        super().__init__(decoder, optimizer, trainer, sides=sides, seed=seed)
        self.trained = nn.ModuleDict({name: rqvae.get_submodule(name) for name in PARTS})
        # In a tuple, where nn.Module does not look: frozen, no part of the saved state.
        self._frozen = (rqvae.eval().requires_grad_(False),)
        self.trained.train().requires_grad_(True)
        self.ema_trained = copy.deepcopy(self.trained).requires_grad_(False) if averaged else None

    @property
    def tokenizer(self) -> RQVAE:
        """The whole RQ-VAE with the decoder as it is trained."""
        return self._frozen[0]

    @property
    def trained_module(self) -> nn.Module:
        return self.trained

    @property
    def last_layer(self) -> Tensor:
        return self.tokenizer.decoder.conv_out.weight

    def ema_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(average, source) of what an average is kept of."""
        return [] if self.ema_trained is None else [(self.ema_trained, self.trained)]

    @property
    def evaluated(self) -> nn.ModuleDict:
        """The averaged parts if there are any, else what is being trained."""
        return self.trained if self.ema_trained is None else self.ema_trained

    def exported(self) -> RQVAE:
        """A copy of the RQ-VAE with the averaged decoder, or the trained one if no average is kept."""
        return from_state(self.tokenizer.config, whole_state(self.tokenizer) | whole_state(self.evaluated))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.tokenizer.to(self.device)

    on_validate_start = on_fit_start

    @torch.no_grad()
    def _latent(self, image_B3HW: Tensor) -> Tensor:
        return self.tokenizer.tokens_to_latent(self.tokenizer.tokenize(image_B3HW))

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstructed:
        return Reconstructed(decode(self.trained, self._latent(batch["image"])), batch["image"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.validate_pictures(decode(self.evaluated, self._latent(batch["image"])), batch["image"])
