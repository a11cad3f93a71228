"""Numbered work: units that are pure functions of their inputs, done by any number of processes on any machines.

A unit's output is published by rename under its number. An output that carries the digest of the work is the only mark
of completion: processes may die anywhere and be started again in another number, and the bytes are the same. Workers
keep out of each other's way by flock(2) locks, which end with their process; where a file system has none, two of them
may do the same unit, and the last rename wins with equal bytes.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from switti.errors import UserError
from switti.files import atomic_write, kind_of, writing

CLAIMS = ".claims"
# Seconds between two looks at units that others work on.
_POLL = 0.5


@dataclass(frozen=True)
class Work:
    """`units` outputs named <stem>-000000<suffix>, … in `folder`.

    sizes: items (images, rows) of each unit. stamp: reads the digest that an output carries; None if it is not a
    complete output.
    """

    folder: Path
    stem: str
    suffix: str
    sizes: tuple[int, ...]
    digest: str
    stamp: Callable[[Path], str | None]

    def path(self, unit: int) -> Path:
        return self.folder / f"{self.stem}-{unit:06d}{self.suffix}"

    def is_done(self, unit: int) -> bool:
        """Whether the unit's output is there. Raises UserError if it belongs to other work."""
        path = self.path(unit)
        if kind_of(path) is None:
            return False
        found = self.stamp(path)
        if found is not None and found != self.digest:
            raise UserError(f"{path} was made by other work ({found[:12]}); give another folder")
        return found is not None

    def missing(self) -> list[int]:
        return [unit for unit in range(len(self.sizes)) if not self.is_done(unit)]

    def claim_path(self, unit: int) -> Path:
        return self.folder / CLAIMS / self.path(unit).name


@dataclass
class Worker:
    """This process among those that share the work; `of` is the number that was started together, 1 for one alone."""

    number: int = 0
    of: int = 1

    @classmethod
    def from_environment(cls) -> "Worker":
        """RANK and WORLD_SIZE, as torchrun and the launchers set them."""
        try:
            number, of = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        except ValueError:
            raise UserError(
                f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} must be numbers"
            ) from None
        if not 0 <= number < of:
            raise UserError(f"RANK={number} must lie in [0, WORLD_SIZE={of})")
        return cls(number, of)

    def order(self, units: list[int]) -> list[int]:
        """All of `units`, beginning with this worker's share of them, so that workers seldom meet."""
        start = self.number * len(units) // self.of
        return units[start:] + units[:start]


# (unit, file to write, call it with the number of items after each part) → None
Make = Callable[[int, Path, Callable[[int], None]], None]


def do_units(
    work: Work, make: Make, worker: Worker | None = None, progress: "Progress | None" = None
) -> None:
    """Do what is missing, and wait for what others are doing, until every unit is there."""
    worker, progress = worker or Worker(), progress or Progress(work, shown=False)
    with writing(work.folder):
        (work.folder / CLAIMS).mkdir(parents=True, exist_ok=True)
    # Now, so that the rate is that of this call.
    progress.refresh(at_once=True)
    waiting = worker.order(work.missing())
    while waiting:
        left = []
        for unit in waiting:
            with _claim(work, unit) as descriptor:
                if descriptor is None:
                    left.append(unit)
                elif not work.is_done(unit):
                    _do(work, make, unit, descriptor, progress)
        progress.refresh()
        if left:
            time.sleep(_POLL)
        waiting = [unit for unit in left if not work.is_done(unit)]
    progress.refresh(at_once=True)


def _do(work: Work, make: Make, unit: int, descriptor: int, progress: "Progress") -> None:
    target = work.path(unit)
    for leftover in work.folder.glob(f".{target.name}.*.tmp"):
        with suppress(OSError):
            leftover.unlink()
    done = 0

    def advance(items: int) -> None:
        nonlocal done
        done += items
        # Read by the progress bars of other processes.
        with suppress(OSError):
            os.pwrite(descriptor, f"{done:12d}".encode(), 0)
        progress.refresh()

    with atomic_write(target) as temporary:
        make(unit, temporary, advance)


@contextmanager
def _claim(work: Work, unit: int) -> Iterator[int | None]:
    """A descriptor that holds the lock of a unit; None if another process has it."""
    path = work.claim_path(unit)
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError:
            # A file system without locks: the same bytes may be made twice.
            pass
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass
class Progress:
    """A bar over the items of all workers, wherever they run, with their common rate and the time left."""

    work: Work
    unit: str = "image"
    shown: bool = True
    _done: set[int] = field(default_factory=set)
    _bar: "tqdm[None] | None" = None
    _looked: float = 0.0

    def refresh(self, at_once: bool = False) -> None:
        if not self.shown or (not at_once and time.monotonic() - self._looked < _POLL):
            return
        self._looked = time.monotonic()
        count = self._count()
        if self._bar is None:
            # What was there before does not count for the rate.
            self._bar = tqdm(
                total=sum(self.work.sizes),
                initial=count,
                unit=self.unit,
                desc=self.work.stem,
                file=sys.stderr,
                mininterval=0.5 if sys.stderr.isatty() else 10.0,
            )
        self._bar.update(max(0, count - self._bar.n))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _count(self) -> int:
        total = 0
        for unit, size in enumerate(self.work.sizes):
            if unit not in self._done and self.work.path(unit).exists():
                self._done.add(unit)
            total += size if unit in self._done else min(size, self._begun(unit))
        return total

    def _begun(self, unit: int) -> int:
        """Items of a unit that somebody is doing."""
        with suppress(OSError, ValueError):
            return int(self.work.claim_path(unit).read_bytes()[:12] or b"0")
        return 0
