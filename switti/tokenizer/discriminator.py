"""U-Net discriminator with spectral norm and one logit per pixel, for tuning the decoder (Section 4.3).

The architecture is that of Real-ESRGAN (arXiv 2107.10833). Shape suffixes: B batch, C channels, H, W rows and columns.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from switti.errors import UserError

DOWNSAMPLING = 8


def check_sides(height: int, width: int) -> None:
    """UserError if the skip connections of images of this size would not meet."""
    if height % DOWNSAMPLING or width % DOWNSAMPLING:
        raise UserError(
            f"the discriminator needs images with sides that are multiples of {DOWNSAMPLING}, "
            f"got {height} x {width}; change tokenizer.scales or set decoder.adversarial=0"
        )


def normed(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Module:
    """Convolution without bias whose weight has spectral norm 1: one power-iteration step per training pass."""
    return spectral_norm(nn.Conv2d(channels_in, channels_out, kernel, stride, padding=1, bias=False))


def rectify(x_BCHW: Tensor) -> Tensor:
    return F.leaky_relu(x_BCHW, 0.2)


class UNetDiscriminator(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] → logits [B, 1, H, W], high for real ones; 4 376 897 parameters at 64 features.

    features: channels at full resolution; they double with each of the three halvings.
    Raises UserError unless both sides are multiples of 8.
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        widths = [features * 2**level for level in range(4)]
        self.first = nn.Conv2d(3, features, 3, padding=1)
        self.down = nn.ModuleList(normed(widths[i], widths[i + 1], 4, stride=2) for i in range(3))
        self.up = nn.ModuleList(normed(widths[i + 1], widths[i], 3) for i in reversed(range(3)))
        self.extra = nn.ModuleList(normed(features, features, 3) for _ in range(2))
        self.last = nn.Conv2d(features, 1, 3, padding=1)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        check_sides(*image_B3HW.shape[-2:])
        x_BCHW = rectify(self.first(image_B3HW))
        skips = []
        for layer in self.down:
            skips.append(x_BCHW)
            x_BCHW = rectify(layer(x_BCHW))
        for layer in self.up:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)
            x_BCHW = rectify(layer(x_BCHW)) + skips.pop()
        for layer in self.extra:
            x_BCHW = rectify(layer(x_BCHW))
        return self.last(x_BCHW)
