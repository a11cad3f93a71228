"""When a study will be done, from what its runs have taken so far. Not a command itself."""

from collections.abc import Sequence


class Pace:
    """Seconds that a planned step takes, start-up and validation included, averaged over the runs that have ended.

    A trial that was pruned counts with all the steps that it was planned for: the next ones may be pruned, too.
    """

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def ended(self, steps: int, seconds: float) -> None:
        """A run that was planned to take so many steps took so long."""
        self._steps += steps
        self._seconds += seconds

    def seconds_a_step(self, rates: Sequence[float | None]) -> float | None:
        """rates: steps a second of runs in progress, which count while none has ended."""
        if self._steps:
            return self._seconds / self._steps
        known = [rate for rate in rates if rate]
        return len(known) / sum(known) if known else None

    def left(
        self,
        running: Sequence[tuple[int, float | None]],
        waiting: Sequence[int],
        places: int,
        pace: float | None,
    ) -> float | None:
        """Seconds until all are done, or None if nothing is known yet.

        running: (steps to go, seconds to go if the run itself can tell). waiting: steps of those that have not begun.
        places: runs at a time. pace: seconds a step. Whatever waits begins where a place becomes free first.
        """
        if pace is None and (waiting or any(seconds is None for _, seconds in running)):
            return None
        ends = sorted(seconds if seconds is not None else steps * (pace or 0.0) for steps, seconds in running)
        free = [0.0] * (min(places, len(ends) + len(waiting)) - len(ends)) + ends
        for steps in waiting:
            free.sort()
            free[0] += steps * (pace or 0.0)
        return max(free, default=None)
