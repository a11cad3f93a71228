"""The RQ-VAE: images ↔ token pyramids (Section 3.1). Parameter names are the published ones.

Shape suffixes: B batch, C code width, HH the square latent, L tokens of all scales, M = L − p0² next-scale input rows.
Images (3HW) are in [-1, 1]; their sides are the latent's times config.downsampling.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switti.errors import UserError
from switti.scales import Pyramid
from switti.tokenizer.autoencoder import Decoder, Encoder
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.quantizer import MultiScaleQuantizer, sample_noise

# In a generator's checkpoint: the fingerprint of the codebook with which it was trained.
CODES = "tokenizer_codes"


class Reconstruction(NamedTuple):
    """image: unclamped, [B, 3, H, W]; vq_loss: scalar; tokens: int64 [B, L]; rows: what they quantize, [B, L, C]."""

    image: Tensor
    vq_loss: Tensor
    tokens: Tensor
    rows: Tensor


class RQVAE(nn.Module):
    """Multi-scale residual-quantized autoencoder."""

    def __init__(self, config: RQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.pyramid = Pyramid(tuple(config.scales))
        self.encoder = Encoder(
            channels=config.channels,
            multipliers=config.multipliers,
            residual_blocks=config.residual_blocks,
            code_width=config.code_width,
            patch_size=config.patch_size,
            linear_shortcut=config.linear_shortcut,
        )
        self.decoder = Decoder(
            channels=config.channels,
            multipliers=config.multipliers,
            residual_blocks=config.residual_blocks,
            code_width=config.code_width,
            patch_size=config.patch_size,
            linear_shortcut=config.linear_shortcut,
        )
        self.quantize = MultiScaleQuantizer(
            self.pyramid,
            codebook_size=config.codebook_size,
            code_width=config.code_width,
            phi_count=config.phi_count,
            phi_ratio=config.phi_ratio,
            commitment=config.commitment,
        )
        self.quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)
        if config.linear_shortcut:
            # The latent begins as the cosine coefficients, and what is quantized as these.
            for conv in (self.quant_conv, self.post_quant_conv, *self.quantize.quant_resi.qresi_ls):
                nn.init.dirac_(conv.weight)
                assert conv.bias is not None
                nn.init.zeros_(conv.bias)

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Image → continuous latent f, [B, C, H, H].

        Raises UserError if the image's sides do not fit the pyramid.
        """
        return self._encode(image_B3HW, self.pyramid)

    def _encode(self, image_B3HW: Tensor, pyramid: Pyramid) -> Tensor:
        side = pyramid.latent_side * self.config.downsampling
        if tuple(image_B3HW.shape[-2:]) != (side, side):
            raise UserError(
                f"tokenizer.scales={list(pyramid.sides)} with downsampling {self.config.downsampling} needs "
                f"images of {side} x {side} pixels, got {image_B3HW.shape[-2]} x {image_B3HW.shape[-1]}"
            )
        return self.quant_conv(self.encoder(image_B3HW))

    def decode(self, f_hat_BCHH: Tensor) -> Tensor:
        """Quantized latent → image, unclamped."""
        return self.decoder(self.post_quant_conv(f_hat_BCHH))

    @torch.no_grad()
    def tokenize(
        self,
        image_B3HW: Tensor,
        noise_std: float = 0.0,
        seeds: Tensor | None = None,
        noise_BLC: Tensor | None = None,
    ) -> Tensor:
        """Image → tokens [B, L], int64. The encoder follows the surrounding autocast; the quantizer does not.

        noise_std: n in [0, 1), strength of the noise that the search sees. Its draws are `noise_BLC`, or come from
        `seeds` [B]: a sample's noise depends on its own seed only.
        """
        return self.tokenize_latent(self.encode(image_B3HW), noise_std, seeds, noise_BLC)

    @torch.no_grad()
    def tokenize_latent(
        self,
        f_BCHH: Tensor,
        noise_std: float = 0.0,
        seeds: Tensor | None = None,
        noise_BLC: Tensor | None = None,
    ) -> Tensor:
        """`tokenize` for images that are encoded already."""
        if not 0.0 <= noise_std < 1.0:
            raise UserError(f"noise_std={noise_std} must lie in [0, 1)")
        if noise_std > 0 and noise_BLC is None:
            if seeds is None:
                raise UserError(f"noise_std={noise_std} needs one seed per image")
            shape = self.pyramid.length, self.config.code_width
            noise_BLC = sample_noise(seeds, *shape, device=f_BCHH.device)
        return self.quantize.tokenize(f_BCHH, noise_std, noise_BLC if noise_std else None)

    @torch.no_grad()
    def teacher_forcing(self, tokens_BL: Tensor) -> Tensor:
        """Tokens → inputs for scales 1 … N − 1, [B, M, C]: the averaged f_hat of all coarser scales."""
        last = self.pyramid.count - 1
        rows = [
            self.quantize.next_input(k, f) for k, f in enumerate(self.quantize.latents(tokens_BL)) if k < last
        ]
        if not rows:
            return self.quantize.embedding.weight.new_zeros(tokens_BL.shape[0], 0, self.config.code_width)
        return torch.cat(rows, dim=1)

    def tokens_to_latent(self, tokens_BL: Tensor) -> Tensor:
        """Tokens of all scales → f_hat, [B, C, H, H]."""
        *_, f_hat_BCHH = self.quantize.latents(tokens_BL)
        return f_hat_BCHH

    def forward(self, image_B3HW: Tensor, pyramid: Pyramid | None = None) -> Reconstruction:
        """Training pass with the straight-through latent; pyramid: instead of the tokenizer's own."""
        pyramid = pyramid or self.pyramid
        latent_BCHH, loss, tokens_BL, rows_BLC = self.quantize.on(pyramid)(self._encode(image_B3HW, pyramid))
        return Reconstruction(self.decode(latent_BCHH), loss, tokens_BL, rows_BLC)


def check_codes(checkpoint: Mapping[str, Any], model: RQVAE, source: str) -> None:
    """UserError if a generator was trained with another codebook than the tokenizer's, even of the same shape.

    Checkpoints that do not record theirs pass. source: the setting that names the tokenizer.
    """
    known = checkpoint.get(CODES)
    if known is not None and known != model.quantize.fingerprint():
        raise UserError(
            f"{source}: its codebook is not the one that the generator was trained with; give that tokenizer, or one "
            "whose decoder alone was tuned"
        )
