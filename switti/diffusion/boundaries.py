"""Boundaries of the segments that invertible consistency models jump over, and the jumps of encoding and decoding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switti.diffusion.schedule import TIMES, solver_grid
from switti.errors import UserError

Jump = tuple[int, int]


@dataclass(frozen=True)
class Boundaries:
    """Ends of jumps by direction (Section 3.1). A network is not told where a jump ends: its start alone decides.

    points: N of the solver's grid. reverse: ends of jumps towards the image, 0 (clean) first. forward: ends of jumps
    towards noise, the last time of the grid last. Use `given` or `automatic`, which check them.
    """

    points: int
    reverse: tuple[int, ...]
    forward: tuple[int, ...]

    @classmethod
    def automatic(cls, segments: int, points: int = 50) -> "Boundaries":
        """Segments of ⌈N/m⌉ grid points. Raises UserError where those make another number of segments than asked."""
        grid = solver_grid(points)
        if not 1 <= segments <= points:
            raise UserError(f"segments={segments} must lie in [1, {points}], the number of grid points")
        width = -(-points // segments)
        inner = grid[width - 1 : -1 : width] if width < points else ()
        boundaries = cls(points, (0, *inner), (*inner, grid[-1]))
        if len(boundaries.forward) != segments:
            raise UserError(
                f"segments={segments}: {points} grid points in segments of {width} make "
                f"{len(boundaries.forward)} segments; take that number, or give the boundaries"
            )
        return boundaries

    @classmethod
    def given(
        cls, reverse: Sequence[int], forward: Sequence[int], points: int = 50, *, off_grid: bool = False
    ) -> "Boundaries":
        """off_grid: accept times between grid points, as one of the released models has them (249 of 50 points).

        Raises UserError for boundaries that do not meet, or lie off the grid: no teacher's step ever arrives there,
        so that a network is never anchored at them.
        """
        grid = solver_grid(points)
        boundaries = cls(points, tuple(reverse), tuple(forward))
        for name, values, end, place in (("reverse", reverse, 0, 0), ("forward", forward, grid[-1], -1)):
            shown = f"{name} boundaries {list(values)}"
            if not values or list(values) != sorted(set(values)) or values[place] != end:
                where = "begin with 0" if place == 0 else f"end with {end}"
                raise UserError(f"{shown} must increase and {where}")
            off = [value for value in values if value not in grid and value != values[place]]
            if off and not off_grid:
                nearest = [_nearest(grid, value) for value in off]
                raise UserError(
                    f"{shown}: {off} lie off the grid of {points} points; the nearest are {nearest}"
                )
        jumps = len(reverse) / len(forward)
        if jumps != int(jumps) or any(
            reverse[k * int(jumps)] != forward[k - 1] for k in range(1, len(forward))
        ):
            raise UserError(
                f"reverse boundaries {list(reverse)} and forward boundaries {list(forward)} must meet: "
                "each forward segment holds the same number of reverse ones, e.g. 0 259 519 779 and 259 519 779 999"
            )
        return boundaries

    @property
    def grid(self) -> tuple[int, ...]:
        return solver_grid(self.points)

    @property
    def step(self) -> int:
        """Distance of grid points in training times."""
        return TIMES // self.points

    @property
    def start(self) -> int:
        """First time of the grid: what encoding starts from, and what stands for 0 where an input must be noisy."""
        return self.step - 1

    @property
    def jumps_per_segment(self) -> int:
        """q reverse jumps for each forward one."""
        return len(self.reverse) // len(self.forward)

    @property
    def encode_jumps(self) -> list[Jump]:
        return list(zip((self.start, *self.forward[:-1]), self.forward, strict=True))

    @property
    def decode_jumps(self) -> list[Jump]:
        ends = self.reverse[::-1]
        return list(zip((self.forward[-1], *ends[:-1]), ends, strict=True))

    def segment(self, number: int) -> Jump:
        """(low, high) of a forward segment, 0 replaced by `start`."""
        return self.reverse[number * self.jumps_per_segment] or self.start, self.forward[number]

    def decode_times(self, number: int) -> tuple[int, ...]:
        """Times of the reverse jumps through a forward segment: high, …, low."""
        count, (low, high) = self.jumps_per_segment, self.segment(number)
        inner = self.reverse[number * count + 1 : (number + 1) * count]
        return (high, *inner[::-1], low)

    def previous(self, time_B: Tensor) -> Tensor:
        """t′ of the reverse loss: one grid step towards the image, at least 0."""
        return (time_B - self.step).clamp_min(0)

    def following(self, time_B: Tensor) -> Tensor:
        """t′ of the forward loss: one grid step towards noise."""
        return time_B + self.step

    def reverse_end(self, time_B: Tensor) -> Tensor:
        """The largest reverse boundary that is not above a time."""
        ends_M = torch.tensor(self.reverse, device=time_B.device)
        return ends_M[torch.searchsorted(ends_M, time_B, right=True) - 1]

    def forward_end(self, time_B: Tensor) -> Tensor:
        """The smallest forward boundary that is not below a time."""
        ends_M = torch.tensor(self.forward, device=time_B.device)
        return ends_M[torch.searchsorted(ends_M, time_B)]


def _nearest(grid: Sequence[int], value: int) -> int:
    return min(grid, key=lambda time: abs(time - value))
