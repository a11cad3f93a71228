"""Multi-scale residual quantization (Section 3.1).

All arithmetic on the running latent f_hat and the nearest-code search run in the codebook's own precision (float32),
whatever autocast is active around them.

Shape suffixes: B batch, C code width, V codebook size, S scales, HH the square latent, P = p² positions of one scale,
L positions of all scales, R rows of any number of images.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from switti.scales import Pyramid
from switti.tokenizer.codebook import token_counts

# Distances held at a time by the search; 2**26 float32 are 256 MiB.
SEARCH_ELEMENTS = 2**26


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Autocast off on the device of `like`."""
    with torch.autocast(like.device.type, enabled=False):
        yield


def phi_ticks(count: int) -> np.ndarray:
    """Positions in [0, 1] of the shared convolutions. Four of them keep their published, wider spacing."""
    margin = 1 / (3 * count) if count == 4 else 1 / (2 * count)
    return np.linspace(margin, 1 - margin, count)


def phi_indices(pyramid: Pyramid, count: int) -> list[int]:
    """Which convolution serves each scale: the tick nearest to the scale's ratio, the first one on ties."""
    ticks = phi_ticks(count)
    return [int(np.abs(ticks - pyramid.ratio(k)).argmin()) for k in range(pyramid.count)]


def sample_noise(seeds_B: Tensor, length: int, width: int, device: torch.device) -> Tensor:
    """Standard normal [B, length, width]; row b depends on seeds_B[b] alone, not on its place in the batch."""
    rows = []
    for seed in seeds_B.tolist():
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randn(length, width, generator=generator))
    return torch.stack(rows).to(device, non_blocking=True)


class Phi(nn.Conv2d):
    """Residual 3×3 convolution after upsampling (φ in the paper): (1 − ratio) · h + ratio · conv3x3(h)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__(width, width, 3, padding=1)
        self.ratio = ratio

    def forward(self, h_BCHH: Tensor) -> Tensor:
        return h_BCHH.lerp(super().forward(h_BCHH), self.ratio)


class SharedPhi(nn.Module):
    """Holder whose attribute gives the published key `quant_resi.qresi_ls.j`."""

    def __init__(self, width: int, count: int, ratio: float) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(width, ratio) for _ in range(count))


class Step(NamedTuple):
    """One scale of the quantization: residual rows [B, P, C] and the codes chosen for them [B, P]."""

    rows: Tensor
    tokens: Tensor


class Quantized(NamedTuple):
    """latent: straight-through, [B, C, H, H]; loss: scalar; tokens: int64 [B, L], scales from coarse to fine.

    rows: residuals that the codes approximate, [B, L, C], without gradient.
    """

    latent: Tensor
    loss: Tensor
    tokens: Tensor
    rows: Tensor


class MultiScaleQuantizer(nn.Module):
    """Quantizes a latent as a sum of upsampled token maps, coarse to fine."""

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        pyramid: Pyramid,
        *,
        codebook_size: int,
        code_width: int,
        phi_count: int,
        phi_ratio: float,
        commitment: float,
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.commitment = commitment
        self.phi_index = phi_indices(pyramid, phi_count)
        self.hit_updates = 0
        self.counts_hits = True
        self.quant_resi = SharedPhi(code_width, phi_count, phi_ratio)
        self.train_phi([pyramid])
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(pyramid.count, codebook_size))
        self.embedding = nn.Embedding(codebook_size, code_width)

    def on(self, pyramid: Pyramid) -> Self:
        """The same weights on another pyramid, sharing all memory; made for one call. It does not count hits."""
        if pyramid == self.pyramid:
            return self
        other = copy.copy(self)
        other.pyramid = pyramid
        other.phi_index = phi_indices(pyramid, len(self.quant_resi.qresi_ls))
        other.counts_hits = False
        return other

    def train_phi(self, pyramids: Sequence[Pyramid]) -> None:
        """Trains only the convolutions that one of these pyramids uses: data-parallel training refuses idle ones."""
        count = len(self.quant_resi.qresi_ls)
        used = {j for pyramid in pyramids for j in phi_indices(pyramid, count)}
        for j, phi in enumerate(self.quant_resi.qresi_ls):
            phi.requires_grad_(j in used)

    def fingerprint(self) -> str:
        """SHA-256 of the codes and convolutions in float32: what tokens mean. Tuning the decoder does not change it."""
        digest = hashlib.sha256()
        for value in (self.embedding.weight, *self.quant_resi.parameters()):
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def phi(self, scale: int) -> nn.Module:
        """Convolution of a scale."""
        return self.quant_resi.qresi_ls[self.phi_index[scale]]

    def embed(self, tokens: Tensor) -> Tensor:
        """Codes of tokens: […] → […, C]."""
        return self.embedding(tokens)

    @torch.no_grad()
    def nearest(self, z_RC: Tensor) -> Tensor:
        """Index of the nearest code (squared Euclidean distance, the lowest index on ties): int64 [R]."""
        codes_VC = self.embedding.weight
        z_RC = z_RC.to(codes_VC.dtype)
        with full_precision(z_RC):
            norms_V = codes_VC.square().sum(1)
            rows = max(1, SEARCH_ELEMENTS // codes_VC.shape[0])
            # Without |z|², which is the same for every code.
            nearest = [torch.addmm(norms_V, z, codes_VC.T, alpha=-2).argmin(1) for z in z_RC.split(rows)]
        return torch.cat(nearest)

    def _rise(self, scale: int, h_BPC: Tensor) -> Tensor:
        """Code rows of a scale → their share of the latent, [B, C, H, H]."""
        side, latent = self.pyramid.sides[scale], self.pyramid.latent_side
        h_BCHH = h_BPC.transpose(1, 2).unflatten(2, (side, side))
        if side != latent:
            h_BCHH = F.interpolate(h_BCHH, size=(latent, latent), mode="bicubic")
        return self.phi(scale)(h_BCHH.contiguous())

    def _rows(self, scale: int, f_BCHH: Tensor) -> Tensor:
        """Exact box average to the scale's side, as token rows [B, P, C]."""
        side = self.pyramid.sides[scale]
        if side != f_BCHH.shape[-1]:
            f_BCHH = F.interpolate(f_BCHH, size=(side, side), mode="area")
        return f_BCHH.flatten(2).transpose(1, 2)

    def empty_latent(self, batch: int) -> Tensor:
        """Zero f_hat [B, C, H, H] to begin with."""
        side, weight = self.pyramid.latent_side, self.embedding.weight
        return weight.new_zeros(batch, weight.shape[1], side, side)

    def accumulate(self, scale: int, f_hat_BCHH: Tensor, h_BPC: Tensor) -> Tensor:
        """f_hat with the codes of one more scale (hard rows E[k] or a soft mixture of codes)."""
        with full_precision(f_hat_BCHH):
            return f_hat_BCHH + self._rise(scale, h_BPC.to(f_hat_BCHH.dtype))

    def next_input(self, scale: int, f_hat_BCHH: Tensor) -> Tensor:
        """The generator's input for scale + 1: f_hat averaged to that side, rows [B, P, C]."""
        with full_precision(f_hat_BCHH):
            return self._rows(scale + 1, f_hat_BCHH)

    def _descend(self, f_BCHH: Tensor, noises: Sequence[Tensor] | None, noise_std: float) -> Iterator[Step]:
        """The greedy quantization, scale by scale."""
        rest_BCHH = f_BCHH.to(self.embedding.weight.dtype)
        for scale in range(self.pyramid.count):
            z_BPC = seen_BPC = self._rows(scale, rest_BCHH)
            if noises is not None:
                seen_BPC = (1 - noise_std**2) ** 0.5 * z_BPC + noise_std * noises[scale]
            tokens_BP = self.nearest(seen_BPC.flatten(0, 1)).view(z_BPC.shape[:2])
            rest_BCHH = rest_BCHH - self._rise(scale, self.embed(tokens_BP))
            yield Step(z_BPC, tokens_BP)

    @torch.no_grad()
    def tokenize(self, f_BCHH: Tensor, noise_std: float = 0.0, noise_BLC: Tensor | None = None) -> Tensor:
        """Latent → tokens [B, L].

        noise_BLC: standard normal rows of all scales. The search (only) sees sqrt(1 − n²) · z + n · noise with
        n = noise_std, which makes the generator robust against its own errors.
        """
        noises = None if noise_BLC is None else self.pyramid.split(noise_BLC)
        with full_precision(f_BCHH):
            steps = self._descend(f_BCHH, noises, noise_std)
            return torch.cat([step.tokens for step in steps], dim=1)

    @torch.no_grad()
    def residuals(self, f_BCHH: Tensor) -> Tensor:
        """The residual rows that the codes approximate, all scales: [B, L, C]."""
        with full_precision(f_BCHH):
            return torch.cat([step.rows for step in self._descend(f_BCHH, None, 0.0)], dim=1)

    def latents(self, tokens_BL: Tensor) -> Iterator[Tensor]:
        """f_hat after each scale."""
        f_hat_BCHH = self.empty_latent(tokens_BL.shape[0])
        for scale, tokens_BP in enumerate(self.pyramid.split(tokens_BL)):
            f_hat_BCHH = self.accumulate(scale, f_hat_BCHH, self.embed(tokens_BP))
            yield f_hat_BCHH

    def forward(self, f_BCHH: Tensor) -> Quantized:
        """Training pass: tokens, loss and the straight-through latent f + stopgrad(f_hat − f).

        Loss: mean over scales of commitment · MSE(stopgrad(f_hat_s), f) + MSE(f_hat_s, stopgrad(f)).
        """
        f_BCHH = f_BCHH.to(self.embedding.weight.dtype)
        loss, f_hat_BCHH = f_BCHH.new_zeros(()), f_BCHH
        with full_precision(f_BCHH):
            with torch.no_grad():
                steps = list(self._descend(f_BCHH, None, 0.0))
            tokens_BL = torch.cat([step.tokens for step in steps], dim=1)
            for f_hat_BCHH in self.latents(tokens_BL):
                loss = loss + self.commitment * F.mse_loss(f_BCHH, f_hat_BCHH.detach())
                loss = loss + F.mse_loss(f_hat_BCHH, f_BCHH.detach())
        if self.training and self.counts_hits:
            self.count_hits(tokens_BL)
        latent_BCHH = f_BCHH + (f_hat_BCHH - f_BCHH).detach()
        rows_BLC = torch.cat([step.rows for step in steps], dim=1)
        return Quantized(latent_BCHH, loss / self.pyramid.count, tokens_BL, rows_BLC)

    @torch.no_grad()
    def count_hits(self, tokens_BL: Tensor) -> None:
        """Exponential average of how often each code is chosen at each scale, over all ranks.

        As published, the counter behind the decay counts scales, not forward passes: the first scale is copied, the
        others start from zero with decay 0.9, and 0.99 after 100 scales.
        """
        hits_SV = token_counts(tokens_BL, self.pyramid, self.embedding.num_embeddings).to(
            self.ema_vocab_hit_SV
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(hits_SV)
        for ema_V, hits_V in zip(self.ema_vocab_hit_SV, hits_SV, strict=True):
            decay = 0.0 if self.hit_updates == 0 else 0.9 if self.hit_updates < 100 else 0.99
            ema_V.mul_(decay).add_(hits_V, alpha=1 - decay)
            self.hit_updates += 1

    def usage_percent(self, batch: int) -> list[float]:
        """Share of codes in use per scale, in percent, for a global batch of `batch` images.

        A code is in use if its average count reaches 8 % of an even share of the finest map's positions.
        """
        threshold = 0.08 * batch * self.pyramid.sizes[-1] / self.embedding.num_embeddings
        return (100 * (self.ema_vocab_hit_SV >= threshold).float().mean(1)).tolist()
