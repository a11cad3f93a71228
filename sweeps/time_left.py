"""Estimate of a study's remaining time from the pace of its runs so far."""

from collections.abc import Sequence


class Pace:
    """Seconds a step, start-up and validation included, averaged over the runs that have ended.

    A trial that was pruned counts with all the steps of its settings: the next ones may be pruned, too.
    """

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def ended(self, steps: int, seconds: float) -> None:
        """Count a run whose settings ask for `steps` and that took `seconds`."""
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

        Args:
            running: (steps to go, seconds to go if the run itself knows) of each run in progress.
            waiting: steps of each run that has not begun; it begins where a place becomes free first.
            places: runs at a time.
            pace: seconds a step.
        """
        if pace is None and (waiting or any(seconds is None for _, seconds in running)):
            return None
        ends = sorted(seconds if seconds is not None else steps * (pace or 0.0) for steps, seconds in running)
        free = [0.0] * (min(places, len(ends) + len(waiting)) - len(ends)) + ends
        for steps in waiting:
            free.sort()
            free[0] += steps * (pace or 0.0)
        return max(free, default=None)
