"""Noise schedule of Stable Diffusion, jumps of the consistency function and DDIM steps (Section 2, equation 3).

Shape suffixes: B batch, C channels, H W latent, T training times.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switti.errors import UserError

TIMES = 1000
BETA_START, BETA_END = 0.00085, 0.012

Times = int | Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = α_t·x_0 + σ_t·n with α² = ᾱ and σ² = 1 − ᾱ, tabulated at the training times 0…T−1 in float32."""

    alphas_cumprod_T: Tensor

    @classmethod
    def scaled_linear(
        cls, times: int = TIMES, start: float = BETA_START, end: float = BETA_END
    ) -> "NoiseSchedule":
        """√β linear in t: the schedule of Stable Diffusion 1.5 and XL."""
        betas_T = torch.linspace(start**0.5, end**0.5, times, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas_T, dim=0))

    @property
    def times(self) -> int:
        return len(self.alphas_cumprod_T)

    @property
    def alpha(self) -> Tensor:
        """[T]"""
        return self.alphas_cumprod_T.sqrt()

    @property
    def sigma(self) -> Tensor:
        """[T]"""
        return (1.0 - self.alphas_cumprod_T).sqrt()

    def noised(self, x0_BCHW: Tensor, noise_BCHW: Tensor, time: Times) -> Tensor:
        """x_t of clean latents, in float32 or float64."""
        x0_BCHW = _exact(x0_BCHW)
        alpha, sigma = self._at(time, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def clean(self, x_BCHW: Tensor, epsilon_BCHW: Tensor, time: Times) -> Tensor:
        """x̂0 = (x − σ_t·ε) / α_t."""
        x_BCHW = _exact(x_BCHW)
        alpha, sigma = self._at(time, x_BCHW)
        return (x_BCHW - sigma * epsilon_BCHW) / alpha

    def jump(self, x_BCHW: Tensor, epsilon_BCHW: Tensor, start: Times, end: Times) -> Tensor:
        """J(x, t → s; ε) = α_s·x̂0 + σ_s·ε, where s = 0 means clean: α = 1, σ = 0 (equation 3).

        In float32, or in float64 if x is: at t = 999 the division by α amplifies errors 14.6 times.
        """
        x0_BCHW = self.clean(x_BCHW, epsilon_BCHW, start)
        alpha, sigma = self._at(end, x0_BCHW)
        if isinstance(end, int):
            return x0_BCHW if end == 0 else alpha * x0_BCHW + sigma * epsilon_BCHW
        is_clean = _spread(end.to(x0_BCHW.device) == 0, x0_BCHW)
        alpha, sigma = alpha.masked_fill(is_clean, 1.0), sigma.masked_fill(is_clean, 0.0)
        return alpha * x0_BCHW + sigma * epsilon_BCHW

    def ddim(self, x0_BCHW: Tensor, epsilon_BCHW: Tensor, time: Times) -> Tensor:
        """√ᾱ_t·x̂0 + √(1 − ᾱ_t)·ε in float64, with ᾱ_0 at t = 0: the teacher's step of the losses (Section 3)."""
        cumprod = _spread(self._look_up(self.alphas_cumprod_T, time, x0_BCHW).double(), x0_BCHW)
        return cumprod.sqrt() * x0_BCHW + (1.0 - cumprod).sqrt() * epsilon_BCHW

    def ddim_step(self, x_BCHW: Tensor, epsilon_BCHW: Tensor, start: int, end: int) -> Tensor:
        """One DDIM step of the teacher on a grid of its own, either way; times below 0 mean ᾱ_0."""
        x0_BCHW = self.clean(x_BCHW, epsilon_BCHW, max(start, 0))
        alpha, sigma = self._at(max(end, 0), x0_BCHW)
        return alpha * x0_BCHW + sigma * epsilon_BCHW

    def epsilon_of_velocity(self, x_BCHW: Tensor, velocity_BCHW: Tensor, time: Times) -> Tensor:
        """ε = α_t·v + σ_t·x of a network that predicts v."""
        x_BCHW = _exact(x_BCHW)
        alpha, sigma = self._at(time, x_BCHW)
        return alpha * velocity_BCHW + sigma * x_BCHW

    def _at(self, time: Times, like: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t in the type of `like`, to be multiplied with it."""
        alpha, sigma = (self._look_up(table_T, time, like) for table_T in (self.alpha, self.sigma))
        return _spread(alpha.to(like.dtype), like), _spread(sigma.to(like.dtype), like)

    def _look_up(self, table_T: Tensor, time: Times, like: Tensor) -> Tensor:
        index = torch.as_tensor(time, device=table_T.device)
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < self.times):
            raise UserError(
                f"times {index.tolist()} must lie in [0, {self.times - 1}], the noise schedule's range"
            )
        return table_T[index].to(like.device)


def solver_grid(points: int, times: int = TIMES) -> tuple[int, ...]:
    """The N times t_i = (i + 1)·T/N − 1 between which the teacher's ODE is solved in training: 19, 39, …, 999 at 50."""
    if points < 1 or times % points:
        raise UserError(f"points={points} must divide the {times} training times, e.g. 50 or 25")
    width = times // points
    return tuple((i + 1) * width - 1 for i in range(points))


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1, 1]; a scalar stays."""
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (like.ndim - 1))
