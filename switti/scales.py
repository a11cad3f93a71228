"""The scale pyramid: side lengths, token spans and levels of all scales, and the paper's pyramids.

Importing it imports no torch: settings check their scales before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from switti.errors import UserError
from switti.suggestions import shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The scales of the published models by resolution in px (Section 4).
PYRAMIDS = {
    256: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    512: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
    1024: [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
}
MAX_SCALES, MAX_TOKENS = 64, 1 << 18


def check_scales(scales: Sequence[int], name: str = "scales") -> None:
    """UserError that names the setting unless `scales` are positive, strictly increasing, and few enough to build."""
    shown = f"{name}={shortened(list(scales))}"
    if not scales or scales[0] < 1 or any(b <= a for a, b in pairwise(scales)):
        raise UserError(f"{shown} must be positive, strictly increasing side lengths")
    if len(scales) > MAX_SCALES or sum(side * side for side in scales) > MAX_TOKENS:
        raise UserError(f"{shown} must be at most {MAX_SCALES} scales with {MAX_TOKENS:,} tokens together")


@dataclass(frozen=True)
class Pyramid:
    """Square token maps from coarse to fine; tokens are row-major within a scale, scales are concatenated.

    sides: strictly increasing side lengths, e.g. (1, 2, 3, 4, 6, 9, 13, 18, 24, 32).
    """

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(int(side) for side in self.sides))
        check_scales(self.sides)

    @property
    def count(self) -> int:
        """Number of scales N."""
        return len(self.sides)

    @property
    def latent_side(self) -> int:
        """Side of the finest map, which is the latent's."""
        return self.sides[-1]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side * side for side in self.sides)

    @cached_property
    def length(self) -> int:
        """Tokens of all scales, L."""
        return sum(self.sizes)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each scale in the concatenated sequence."""
        stops = [sum(self.sizes[: k + 1]) for k in range(self.count)]
        return tuple((stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True))

    def ratio(self, scale: int) -> float:
        """Progress r = k / (N − 1) in [0, 1]; 0 for a pyramid of one scale."""
        return scale / (self.count - 1) if self.count > 1 else 0.0

    def levels(self, device: torch.device | str | None = None) -> Tensor:
        """Scale number of every position, int64 [L]."""
        import torch

        sizes = torch.tensor(self.sizes, device=device)
        return torch.repeat_interleave(
            torch.arange(self.count, device=device), sizes, output_size=self.length
        )

    def split(self, values_BL: Tensor) -> tuple[Tensor, ...]:
        """Views of each scale along dimension 1, which must have length L."""
        return values_BL.split(self.sizes, dim=1)
