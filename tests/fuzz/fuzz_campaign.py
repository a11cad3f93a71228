"""Mutated inputs in worker processes: tracebacks, hangs, crashes, executed code and silent acceptances are failures.

A case is (seed, target, number): its input follows from these alone. A worker imports the product once, builds a valid
input a target, and then mutates, reads and judges one case after another. A worker that says nothing for too long is
killed and replaced, as is one that dies; the case it was at is the failure.
"""

import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CANARY = "executed"
BATCH = 25
SETUP_SECONDS = 180.0
MEMORY = 3 << 30  # bytes that a worker may take beyond what it holds after its first imports


class Target:
    """One kind of input.

    name: as reports and --only say it. refusals: exceptions that are a right answer. slowness: how much longer than
    others a case may take before it counts as hanging.
    """

    name = ""
    refusals: tuple[type[Exception], ...] = ()
    slowness = 1.0

    def build(self, home: Path) -> None:
        """Make a valid input in the empty folder `home`, once a worker."""

    def mutate(self, chance: random.Random, folder: Path) -> None:
        """Write a mutated input into the empty folder."""
        raise NotImplementedError

    def read(self, folder: Path) -> None:
        """Read it as the product does. Raises SilentError where something wrong was taken for right."""
        raise NotImplementedError


class SilentError(Exception):
    """Data that differs from what its manifest, digest or an independent reader says was accepted."""


@dataclass
class Failure:
    """kind: traceback, hang, crash, executed code, silent acceptance; of the target itself: setup, faulty mutation."""

    target: str
    number: int
    seed: int
    kind: str
    detail: str
    kept: str = ""

    @property
    def signature(self) -> str:
        """Failures with one signature are one fault."""
        if self.kind == "silent acceptance":
            return f"{self.target} {self.kind} {re.split(r'[0-9]|: ', self.detail)[0]}"
        lines = [line for line in self.detail.strip().splitlines() if line.strip()]
        places = [line.strip() for line in lines if line.strip().startswith("File ")]
        last = lines[-1].split(":")[0] if lines else ""
        return f"{self.target} {self.kind} {last} {places[-1] if places else ''}"


@dataclass
class Summary:
    cases: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.cases.values())


# ---- one case -----------------------------------------------------------------------------------------------------


def make_case(target: Target, seed: int, number: int, folder: Path) -> None:
    """The mutated input of a case in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.mutate(random.Random(f"{seed}/{target.name}/{number}"), folder)


def judge(target: Target, folder: Path, canary: Path) -> tuple[str, str]:
    """("accepted" or "refused", "") or (kind of failure, detail)."""
    try:
        target.read(folder)
        outcome, detail = "accepted", ""
    except SilentError as error:
        outcome, detail = "silent acceptance", str(error)
    except target.refusals as error:
        outcome, detail = (
            ("refused", "") if _is_one_line(error) else ("traceback", f"more than a line: {error}")
        )
    except (Exception, SystemExit):
        outcome, detail = "traceback", traceback.format_exc()
    if canary.exists():
        canary.unlink()
        return "executed code", detail
    return outcome, detail


def _is_one_line(error: Exception) -> bool:
    return "\n" not in str(error).strip() and "Traceback" not in str(error)


# ---- workers ------------------------------------------------------------------------------------------------------


def work(connection: Connection, home: Path, module: str, seed: int) -> None:
    """Take (target, numbers) until None comes; before each case say which it is, after it how it ended."""
    os.chdir(home)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    known: dict[str, type[Target]] = importlib.import_module(module).TARGETS
    targets: dict[str, Target] = {}
    canary, limited = home / CANARY, False
    while (task := connection.recv()) is not None:
        name, numbers = task
        if name not in targets:
            connection.send(("building", name, 0, ""))
            target = known[name]()
            (home / name).mkdir()
            try:
                target.build(home / name)
            except Exception:
                connection.send(("setup", name, 0, traceback.format_exc()))
                return
            targets[name] = target
        if not limited:
            _limit_memory()
            limited = True
        target = targets[name]
        for number in numbers:
            connection.send(("case", name, number, str(target.slowness)))
            try:
                make_case(target, seed, number, home / "case")
            except Exception:
                outcome, detail = "faulty mutation", traceback.format_exc()
            else:
                outcome, detail = judge(target, home / "case", canary)
            if outcome not in ("accepted", "refused"):
                connection.send(("failed", name, number, json.dumps([outcome, detail])))
                connection.recv()  # the input has been copied
            else:
                connection.send((outcome, name, number, ""))
        connection.send(("done", name, 0, ""))


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Worker:
    """A process and what it is at."""

    def __init__(self, module: str, seed: int) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="fuzz-"))
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.home, module, seed), daemon=True)
        self.process.start()
        other.close()
        self.task: tuple[str, list[int]] | None = None
        self.current: tuple[str, int] | None = None
        self.since, self.slowness = time.monotonic(), 1.0

    def give(self, task: tuple[str, list[int]]) -> None:
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.home, ignore_errors=True)


# ---- the campaign -------------------------------------------------------------------------------------------------


def run_campaign(
    names: Sequence[str],
    seed: int,
    keep: Path,
    seconds: float = 60.0,
    count: int | None = None,
    workers: int = 2,
    patience: float = 10.0,
    progress: bool = False,
    module: str = "fuzz_targets",
) -> Summary:
    """Cases of all targets in turn until the time is over or `count` are done. Failing inputs are copied to `keep`.

    module: where the workers find TARGETS.
    """
    summary, start = Summary(), time.monotonic()
    broken: set[str] = set()
    batches = _batches(names, count, broken)
    pool = [Worker(module, seed) for _ in range(min(workers, max(1, (count or 10**9) // BATCH + 1)))]
    try:
        for worker in pool:
            worker.give(next(batches))
        while any(worker.task for worker in pool):
            ready = wait([worker.connection for worker in pool if worker.task], timeout=0.5)
            for number, worker in enumerate(pool):
                if worker.task is None:
                    continue
                if worker.connection in ready:
                    ended = _listen(worker, summary, seed, keep)
                else:
                    ended = _watch(worker, summary, seed, keep, patience)
                over = time.monotonic() - start > seconds
                if ended:
                    rest = _rest_of(worker)
                    broken |= {failure.target for failure in summary.failures if failure.kind == "setup"}
                    worker.end()
                    pool[number] = worker = Worker(module, seed)
                    if rest and not over:
                        worker.give(rest)
                        continue
                if worker.current is None and worker.task is None and not over:
                    task = next(batches, None)
                    if task is not None:
                        worker.give(task)
            if progress:
                _show(summary, time.monotonic() - start)
    finally:
        for worker in pool:
            worker.end()
    summary.seconds = time.monotonic() - start
    return summary


def _batches(names: Sequence[str], count: int | None, broken: set[str]) -> Iterator[tuple[str, list[int]]]:
    """Numbers of cases, for one target after the other; few of each if there are few in all."""
    most = BATCH if count is None else max(1, min(BATCH, -(-count // len(names))))
    start, given = 0, 0
    while set(names) - broken:
        for name in (name for name in names if name not in broken):
            size = most if count is None else min(most, count - given)
            if size <= 0:
                return
            given += size
            yield name, list(range(start, start + size))
        start += most


def _listen(worker: Worker, summary: Summary, seed: int, keep: Path) -> bool:
    """Take one message. True if the worker must be replaced."""
    try:
        kind, name, number, detail = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        _note(worker, summary, seed, keep, "crash", f"the process ended with code {worker.process.exitcode}")
        return True
    worker.since = time.monotonic()
    if kind == "case":
        worker.current, worker.slowness = (name, number), float(detail)
    elif kind == "done":
        worker.current = worker.task = None
    elif kind == "setup":
        _note(worker, summary, seed, keep, "setup", detail)
        worker.task = None
        return True
    elif kind == "failed":
        outcome, text = json.loads(detail)
        summary.cases[name] += 1
        _note(worker, summary, seed, keep, outcome, text)
        worker.connection.send("go on")
    elif kind in ("accepted", "refused"):
        summary.cases[name] += 1
        summary.refused[name] += kind == "refused"
    return False


def _watch(worker: Worker, summary: Summary, seed: int, keep: Path, patience: float) -> bool:
    silent = time.monotonic() - worker.since
    if silent < (patience * worker.slowness if worker.current else SETUP_SECONDS):
        return False
    _note(worker, summary, seed, keep, "hang", f"nothing for {silent:.0f} s")
    return True


def _rest_of(worker: Worker) -> tuple[str, list[int]] | None:
    """What the worker that ended had still to do after the case it was at."""
    if worker.task is None or worker.current is None:
        return None
    name, numbers = worker.task
    rest = [number for number in numbers if number > worker.current[1]]
    return (name, rest) if rest else None


def _note(worker: Worker, summary: Summary, seed: int, keep: Path, kind: str, detail: str) -> None:
    name, number = worker.current or (worker.task[0] if worker.task else "", -1)
    failure = Failure(name, number, seed, kind, detail)
    known = sum(other.signature == failure.signature for other in summary.failures)
    case = worker.home / "case"
    if known < 3 and worker.current is not None and case.is_dir():
        folder = keep / f"{name}-{seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case, folder / "input", symlinks=True)
        failure.kept = str(folder)
        (folder / "failure.json").write_text(json.dumps(asdict(failure), indent=2) + "\n")
    summary.failures.append(failure)


def _show(summary: Summary, seconds: float) -> None:
    text = f"\r{seconds:5.0f} s  {summary.total} mutations  {len(summary.failures)} failures "
    print(text, end="", file=sys.stderr, flush=True)


def describe(summary: Summary) -> list[str]:
    """A table a target, then the failures, each signature once."""
    lines = [f"{'target':18} {'mutations':>9} {'refused':>8} {'failures':>8}"]
    failed = Counter(failure.target for failure in summary.failures)
    for name in sorted({*summary.cases, *failed}):
        lines.append(f"{name:18} {summary.cases[name]:9} {summary.refused[name]:8} {failed[name]:8}")
    shown: dict[str, list[Failure]] = {}
    for failure in summary.failures:
        shown.setdefault(failure.signature, []).append(failure)
    for group in shown.values():
        first: Any = group[0]
        lines.append(
            f"\n{first.kind} in {first.target}, {len(group)} times; first: seed {first.seed}, case {first.number}"
        )
        lines.append(f"kept in {first.kept or 'no folder'}")
        lines.append("\n".join(first.detail.strip().splitlines()[-12:]))
    failures = f"{len(summary.failures)} failures of {len(shown)} kinds"
    return [*lines, f"\n{summary.total} mutations in {summary.seconds:.0f} s, {failures}"]
