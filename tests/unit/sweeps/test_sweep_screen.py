"""What a sweep shows: plain lines for files, a live line a run for terminals, and when the study will be done."""

import io
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from sweeps import screen
from sweeps.launchers.jobs import Job, Outcome, count, describe, why
from sweeps.screen import LiveScreen, PlainScreen, last_state, screen_for
from sweeps.time_left import Pace


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A run in progress: 40 of 100 steps, 2 a second."""
    folder = tmp_path / "seed=0"
    folder.mkdir()
    record = {"format": 1, "status": "running", "step": 40, "max_steps": 100, "pid": os.getpid()}
    record |= {"host": socket.gethostname(), "updated": datetime.now(UTC).isoformat()}
    (folder / "record.json").write_text(json.dumps(record))
    rows = [f"{step},0,train/loss,5.5,{step / 2}\n" for step in range(10, 41, 10)]
    (folder / "metrics.csv").write_text("".join(rows))
    return Job("seed=0", [], folder, 1, 1, "cpu", -1, "run 1 of 3", 100)


def live(places: int) -> tuple[LiveScreen, Console]:
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None, highlight=False)
    return LiveScreen("seeds", places, console), console


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_live_line_says_how_far_each_run_is_and_when_the_study_ends(job: Job) -> None:
    shown, console = live(2)
    with shown:
        shown.show([job], lambda: [100], 3, Pace())
    text = text_of(console)
    # 60 steps are left at 2 a second, and 100 wait for the second place.
    assert "study seeds: 1 running, 1 to go, 1 of 3 done, about 50 s left" in text
    line = next(line for line in text.splitlines() if line.startswith("seed=0"))
    assert line.split() == ["seed=0", "running", "40/100", "2/s", "30s", "5.5000", "0s"]


def test_a_run_that_starts_says_what_it_is_doing(tmp_path: Path) -> None:
    job = Job("seed=0", [], tmp_path / "seed=0", 1, 1, "cpu", -1)
    shown, console = live(1)
    with shown:
        shown.output(job, f"{job.folder}: importing torch and lightning\n".encode(), False)
        (tmp_path / "seed=0").mkdir()
        (tmp_path / ".locks").mkdir()
        shown.show([job], list, 1, Pace())
    assert "importing torch" not in text_of(console)  # the table says it


def test_bars_are_replaced_and_warnings_stay(job: Job) -> None:
    content = (
        b"\rEpoch 0:  40%|####      | 40/100 [00:20<00:30]\rEpoch 0:  50%|#####     | 50/100 [00:25<00:25]"
    )
    plain, console = live(2)
    with plain:
        plain.output(job, content, False)
        plain.output(job, b"\nUserWarning: slow [red]data\nEpoch 0: |     | 60/? [00:12<?]\n", False)
    text = text_of(console)
    assert "Epoch" not in text and "[seed=0] UserWarning: slow [red]data" in text


@pytest.mark.parametrize(("places", "mark"), [(1, ""), (2, "[seed=0] ")])
def test_elsewhere_lines_are_plain(job: Job, capsys: pytest.CaptureFixture, places: int, mark: str) -> None:
    shown = PlainScreen("seeds", places)
    with shown:
        shown.output(job, b"first\nsec", False)
        shown.output(job, b"ond\n\r 10%|# | 1/10 [0:01]\r 20%|# | 2/10 [0:01]\nlast", True)
    assert capsys.readouterr().out == f"{mark}first\n{mark}second\n{mark}last\n"


def test_a_bar_of_hours_is_not_kept(job: Job) -> None:
    lines = screen._Lines()
    for step in range(1000):
        assert lines.split(job, b"\rEpoch 0: %d" % step, False) == []
    assert len(lines._rest[job.name]) < 100
    assert lines.split(job, b"\n", False) == ["Epoch 0: 999"]
    assert last_state(b"a\rb\r") == "b"


def test_plain_lines_come_now_and_then(
    job: Job, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(screen.time, "monotonic", lambda: now)
    shown = PlainScreen("seeds", 1)
    printed = []
    for now in range(0, 1200, 10):  # noqa: B007 (read by the clock above)
        shown.show([job], lambda: [100], 3, Pace())
        printed.append(capsys.readouterr().out)
    assert printed[3] == (
        "seed=0: step 40 of 100, 2/s, 30 s left, train loss 5.5000\nstudy seeds: about 1 min 20 s left\n"
    )
    times = [10 * i for i, text in enumerate(printed) if text]
    assert times[:3] == [30, 60, 90] and times[-1] - times[-2] == 300


def test_the_screen_is_chosen_by_where_the_output_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(screen_for("seeds", 1), PlainScreen)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(screen_for("seeds", 1), LiveScreen)


@pytest.mark.parametrize(
    ("running", "waiting", "places", "seconds"),
    [
        ([], [], 1, None),
        ([(60, 30.0)], [], 1, 30.0),
        ([(60, None)], [], 1, 120.0),  # at the pace of those before
        ([(60, 30.0)], [100, 100], 1, 430.0),
        ([(60, 30.0), (50, 100.0)], [100], 2, 230.0),  # begins when the first one ends
        ([(60, 30.0)], [100, 10], 3, 200.0),
        ([(60, 30.0)], [100] * 5, sys.maxsize, 200.0),
    ],
)
def test_a_study_ends_when_its_last_place_becomes_free(
    running: list, waiting: list[int], places: int, seconds: float | None
) -> None:
    assert Pace().left(running, waiting, places, 2.0) == seconds


def test_the_pace_is_that_of_the_runs_that_have_ended() -> None:
    pace = Pace()
    assert pace.seconds_a_step([None]) is None
    assert pace.left([(60, None)], [], 1, None) is None
    assert pace.seconds_a_step([4.0, None]) == 0.25
    pace.ended(100, 300.0)
    pace.ended(100, 100.0)  # pruned, and planned for as many
    assert pace.seconds_a_step([4.0]) == 2.0


def test_how_a_run_has_ended_is_said_in_a_line(job: Job) -> None:
    assert describe(Outcome(job, 0, [], "finished", 65)) == (
        "run 1 of 3: seed=0 finished: 40 steps, 1 min 05 s, train loss 5.5000"
    )
    assert describe(Outcome(job, 75, [], "interrupted")) == "run 1 of 3: seed=0 was interrupted at step 40"
    failed = Outcome(job, 2, ["warning", "error: data.train: no shard"], "failed")
    assert describe(failed) == "run 1 of 3: seed=0 failed: data.train: no shard"
    assert why(Outcome(job, -9, [], "failed")) == "killed by SIGKILL; memory may have run out"
    assert why(Outcome(job, 3, [], "failed")) == "exit code 3"
    assert count(["a", "b", "a"]) == "2 a, 1 b"
