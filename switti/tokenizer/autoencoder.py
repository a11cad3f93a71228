"""Convolutional encoder and decoder of the RQ-VAE (Section 3.1, after the VQGAN).

Module and parameter names are the published ones, so that released weights load key for key.
Shape suffixes: B batch, C channels, H height, W width, N = H * W positions.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two normalized 3 × 3 convolutions around a shortcut; `nin_shortcut` exists where the channel number changes."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return self.nin_shortcut(x_BCHW) + h_BCHW


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        qkv_BNE = self.qkv(self.norm(x_BCHW)).flatten(2).transpose(1, 2)
        q_B1NC, k_B1NC, v_B1NC = qkv_BNE.unsqueeze(1).chunk(3, dim=-1)
        h_BNC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC).squeeze(1)
        return x_BCHW + self.proj_out(h_BNC.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halves both sides; the input gains one zero column on the right and one zero row at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbor, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    """Residual, attention, residual at the latent resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for, then the change of resolution.

    The resizing layer's name differs between encoder and decoder, as published: `downsample`, `upsample`, or none.
    """

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, *, attention: bool, resize: nn.Module | None
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(channels_out) for _ in range(blocks if attention else 0))
        self.resize = ""
        if resize is not None:
            self.resize = type(resize).__name__.lower()
            self.add_module(self.resize, resize)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return self.get_submodule(self.resize)(x_BCHW) if self.resize else x_BCHW


# Luminance and two differences of colors, orthonormal rows over red, green and blue; and how much they vary, roughly.
_COLOR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
_COLOR_WEIGHTS = (1.0, 0.4, 0.3)


def cosine_patches(side: int, count: int) -> Tensor:
    """The `count` cosine patterns of a side × side patch that vary most in usual images, [count, 3, side, side].

    They are orthonormal: the two-dimensional discrete cosine transform of luminance and color differences, from low to
    high frequencies. Rows beyond the 3 · side² that there are, are zero.
    """
    axes_33 = F.normalize(torch.tensor(_COLOR_AXES, dtype=torch.float64), dim=1)
    position_S = (torch.arange(side, dtype=torch.float64) + 0.5) * math.pi / side
    waves_SS = F.normalize(torch.cos(torch.arange(side)[:, None] * position_S), dim=1)
    order = sorted(
        ((c, u, v) for c in range(3) for u in range(side) for v in range(side)),
        key=lambda cuv: (-_COLOR_WEIGHTS[cuv[0]] / (1 + cuv[1] + cuv[2]), cuv),
    )
    patches = torch.zeros(count, 3, side, side, dtype=torch.float64)
    for row, (c, u, v) in enumerate(order[:count]):
        patches[row] = torch.einsum("c,h,w->chw", axes_33[c], waves_SS[u], waves_SS[v])
    return patches.float()


class PatchAnalysis(nn.Conv2d):
    """Linear map from image patches to the latent; first the cosine coefficients, divided by the patch's side."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__(3, width, side, stride=side, bias=False)
        with torch.no_grad():
            self.weight.copy_(cosine_patches(side, width) / side)


class PatchSynthesis(nn.ConvTranspose2d):
    """Linear map from the latent to image patches; first the inverse of `PatchAnalysis`."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__(width, 3, side, stride=side, bias=False)
        with torch.no_grad():
            self.weight.copy_(cosine_patches(side, width) * side)


def zero(conv: nn.Conv2d) -> None:
    """A convolution that adds nothing at first."""
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


class Encoder(nn.Module):
    """Image [B, 3, H, W] → features [B, code_width, H/f, W/f] with f = patch_size · 2 ** (len(multipliers) − 1)."""

    def __init__(
        self,
        *,
        channels: int,
        multipliers: list[int],
        residual_blocks: int,
        code_width: int,
        patch_size: int = 1,
        linear_shortcut: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        last = len(widths) - 1
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(3 * patch_size**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else channels
            resize = Downsample(width) if i < last else None
            self.down.append(Level(before, width, residual_blocks, attention=i == last, resize=resize))
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], code_width, 3, padding=1)
        self.shortcut = PatchAnalysis(patch_size * 2**last, code_width) if linear_shortcut else None
        if self.shortcut is not None:
            zero(self.conv_out)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(F.pixel_unshuffle(image_B3HW, self.patch_size))
        for level in self.down:
            x_BCHW = level(x_BCHW)
        features_BCHW = self.conv_out(F.silu(self.norm_out(self.mid(x_BCHW))))
        return features_BCHW if self.shortcut is None else features_BCHW + self.shortcut(image_B3HW)


class Decoder(nn.Module):
    """Mirror of the encoder with one more residual block per level. `up[0]` is the finest level, as published."""

    def __init__(
        self,
        *,
        channels: int,
        multipliers: list[int],
        residual_blocks: int,
        code_width: int,
        patch_size: int = 1,
        linear_shortcut: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(code_width, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[min(i + 1, last)]
            resize = Upsample(width) if i else None
            self.up.append(Level(before, width, residual_blocks + 1, attention=i == last, resize=resize))
        self.norm_out = group_norm(widths[0])
        self.patch_size = patch_size
        self.conv_out = nn.Conv2d(widths[0], 3 * patch_size**2, 3, padding=1)
        self.shortcut = PatchSynthesis(patch_size * 2**last, code_width) if linear_shortcut else None
        if self.shortcut is not None:
            zero(self.conv_out)

    def forward(self, f_hat_BCHH: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(f_hat_BCHH))
        for level in self.up[::-1]:
            x_BCHW = level(x_BCHW)
        image_B3HW = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x_BCHW))), self.patch_size)
        return image_B3HW if self.shortcut is None else image_B3HW + self.shortcut(f_hat_BCHH)
