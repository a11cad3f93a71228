"""Latent spaces: a VAE of diffusers, or pixels folded into channels, and checks that latents are of the expected one.

Shape suffixes: B batch, C channels, H W image or latent.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from switti.errors import UserError
from switti.suggestions import printable


@dataclass(frozen=True)
class LatentSpace:
    """What a diffusion model's latents are. codec: kind and digest of what makes them from images."""

    codec: str
    channels: int
    side: int

    def check(self, latents_BCHW: Tensor) -> None:
        """Raises UserError for latents of another shape."""
        wanted = [self.channels, self.side, self.side]
        if latents_BCHW.ndim != 4 or list(latents_BCHW.shape[1:]) != wanted:
            raise UserError(
                f"latents have shape {list(latents_BCHW.shape)}, those of {self.codec} are [batch, "
                f"{', '.join(map(str, wanted))}]; encode the image with this codec"
            )

    def check_same(self, other: "LatentSpace", source: str) -> None:
        """Raises UserError for another codec than the adapters of `source` were trained with."""
        mine, theirs = asdict(self), asdict(other)
        wrong = [
            f"{name}={mine[name]} ({source}: {printable(theirs[name])})"
            for name in mine
            if mine[name] != theirs[name]
        ]
        if wrong:
            raise UserError(f"latents differ from those the adapters were trained on: {', '.join(wrong)}")


class Codec(Protocol):
    """Images [B, 3, H, W] in [−1, 1] ↔ latents."""

    @property
    def space(self) -> LatentSpace: ...
    def encode(self, images_B3HW: Tensor) -> Tensor: ...
    def decode(self, latents_BCHW: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FoldedPixels:
    """Space to depth: blocks of pixels become channels, standardized. Exactly invertible, so nothing to train.

    size: of images. mean_C, deviation_C: of each channel over the training set; without them 0 and 1.
    """

    size: int
    factor: int = 2
    mean_C: tuple[float, ...] = ()
    deviation_C: tuple[float, ...] = ()

    @property
    def space(self) -> LatentSpace:
        return LatentSpace(
            f"pixels folded {self.factor}x{self.factor}", 3 * self.factor**2, self.size // self.factor
        )

    def encode(self, images_B3HW: Tensor) -> Tensor:
        check_images(images_B3HW, self.size)
        mean, deviation = self._statistics(images_B3HW)
        return (F.pixel_unshuffle(images_B3HW, self.factor) - mean) / deviation

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        self.space.check(latents_BCHW)
        mean, deviation = self._statistics(latents_BCHW)
        return F.pixel_shuffle(latents_BCHW * deviation + mean, self.factor)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.space.channels
        mean = torch.tensor(self.mean_C or (0.0,) * channels).to(like)
        deviation = torch.tensor(self.deviation_C or (1.0,) * channels).to(like)
        return mean.reshape(1, -1, 1, 1), deviation.reshape(1, -1, 1, 1)


@dataclass(frozen=True)
class VAELatents:
    """Latents of diffusers' AutoencoderKL: the mean, times the VAE's scaling factor (0.18215, for XL 0.13025).

    digest: of its weights, see `weights_digest`.
    """

    vae: Any
    size: int
    digest: str

    @property
    def space(self) -> LatentSpace:
        config = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        codec = f"AutoencoderKL {self.digest[:12]}, scaled by {config.scaling_factor}"
        return LatentSpace(codec, config.latent_channels, self.size // factor)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        check_images(images_B3HW, self.size)
        mean = self.vae.encode(images_B3HW.to(self.vae.dtype)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        self.space.check(latents_BCHW)
        return self.vae.decode(
            (latents_BCHW / self.vae.config.scaling_factor).to(self.vae.dtype)
        ).sample.float()


def check_images(images_B3HW: Tensor, size: int) -> None:
    """Raises UserError for images of another shape or range."""
    if images_B3HW.ndim != 4 or list(images_B3HW.shape[1:]) != [3, size, size]:
        raise UserError(
            f"images have shape {list(images_B3HW.shape)}, the model takes [batch, 3, {size}, {size}]; "
            "resize the shorter side and crop"
        )
    if images_B3HW.numel() and not -1.01 <= float(images_B3HW.amin()) <= float(images_B3HW.amax()) <= 1.01:
        raise UserError("images must lie in [-1, 1]; take 2 · x − 1 of images in [0, 1]")


def space_from(content: Mapping[str, Any] | None, source: str) -> LatentSpace | None:
    """The latent space that a file's settings name. Raises UserError if they are malformed."""
    if content is None:
        return None
    codec, channels, side = (content.get(name) for name in ("codec", "channels", "side"))
    if not isinstance(codec, str) or type(channels) is not int or type(side) is not int:
        raise UserError(f"{source}: its latents are not described by codec, channels and side; save it again")
    return LatentSpace(codec, channels, side)
