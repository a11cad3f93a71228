"""The table of a study's runs: what it says of each, and that it fits the width that there is."""

import io
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from experiments import status
from sweeps.progress import Progress, read_progress
from sweeps.status_table import folded, runs_table, screen
from switti.durations import duration, short_duration, short_rate
from switti.errors import UserError

NOW = datetime.now(UTC).isoformat()


def add_run(name: str, rows: list[tuple[int, str, float, float]] = (), **record: object) -> Path:
    """A run below runs/seeds. rows: step, metric, value, time."""
    folder = Path("runs/seeds") / name
    folder.mkdir(parents=True)
    content = {
        "format": 1,
        "status": "finished",
        "step": 60,
        "max_steps": 60,
        "train_seconds": 30.0,
        "updated": NOW,
    }
    content |= {"pid": os.getpid(), "host": socket.gethostname()}
    (folder / "record.json").write_text(json.dumps(content | record))
    lines = [
        "step,epoch,metric,value,time",
        *(f"{step},0,{metric},{value},{at}" for step, metric, value, at in rows),
    ]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def beat(folder: Path, rank: int = 0, **state: object) -> None:
    (folder / "heartbeat").mkdir(exist_ok=True)
    content = {"rank": rank, "status": "running", "time": time.time()} | state
    (folder / "heartbeat" / f"rank_{rank}.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / "runs" / "seeds"
    folder.mkdir(parents=True)
    return folder


def shown(width: int, folder: Path = Path("runs/seeds")) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(screen(folder, width))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_each_run_has_its_state_and_last_losses(runs: Path) -> None:
    add_run(
        "seed=0", [(1, "train/loss", 4.5, 0), (5, "train/loss", 4.25, 1), (5, "validation/loss", 4.75, 1)]
    )
    add_run("seed=1", status="failed", error="ValueError: loss is not finite", step=7)
    (runs / "study.json").write_text(json.dumps({"runs": [{"name": f"seed={seed}"} for seed in range(3)]}))
    head, first, second, third, _, counts, error = shown(100)
    assert head.split() == ["run", "state", "step", "rate", "left", "train", "loss", "valid.", "loss", "seen"]
    assert first.split()[:7] == ["seed=0", "finished", "60/60", "2/s", "–", "4.2500", "4.7500"]
    assert second.split()[:3] == ["seed=1", "failed", "7/60"]
    assert third.split()[:4] == ["seed=2", "not", "started", "–"]
    assert counts == "1 finished, 1 failed, 1 not started"
    assert error == "seed=1: ValueError: loss is not finite"


def test_a_run_in_progress_tells_its_speed_of_late_and_the_most_silent_rank(runs: Path) -> None:
    rows = [(step, "train/loss", 1.0, 1000 + step / 4) for step in range(10, 101, 10)]
    folder = add_run("seed=0", rows, status="running", step=90, max_steps=500, resumed=[30])
    beat(folder, 0, phase="validation", time=time.time() - 5)
    beat(folder, 1, phase="validation", time=time.time() - 70)
    cells = shown(100)[1].split()
    assert cells[:5] == ["seed=0", "validating", "100/500", "4/s", "1m40s"]  # 400 steps left at 4 a second
    assert cells[-1] == "1m10s"


def test_tokenizers_show_their_psnr(runs: Path) -> None:
    rows = [
        (60, f"validation/{name}", value, 1)
        for name, value in {"psnr": 21.5, "lpips": 0.31, "ssim": 0.8}.items()
    ]
    add_run("l1", [(60, "train/loss", 0.2, 1), *rows])
    lines = shown(80)
    assert "PSNR, dB" in lines[0] and "21.5000" in lines[1]


@pytest.mark.parametrize(
    ("heartbeat", "step", "phase"),
    [
        ({"phase": "starting", "step": 0}, 0, "starting"),
        ({"phase": "starting", "step": 0}, 10, ""),  # the file is older than the metrics
        ({"phase": "starting", "step": 40}, 40, "starting"),  # resumed there
        ({"phase": "forward", "step": 3, "since": -1}, 3, ""),
        ({"phase": "validation", "step": 3, "since": -1}, 3, "validating"),
        ({"phase": "checkpoint", "step": 3, "since": -1}, 3, "saving"),
        ({"phase": "data", "step": 3, "since": -125}, 3, "data for 2 min 05 s"),
        (
            {"status": "interrupted", "pid": 2**22 + 1, "host": "elsewhere"},
            3,
            "starting",
        ),  # of the attempt before
        ({"status": "interrupted", "pid": os.getpid(), "host": socket.gethostname()}, 3, "ending"),
    ],
)
def test_what_a_run_is_doing(runs: Path, heartbeat: dict, step: int, phase: str) -> None:
    if "since" in heartbeat:
        heartbeat = heartbeat | {"since": time.time() + heartbeat["since"]}
    rows = [(step, "train/loss", 1.0, 1.0)] if step else []
    beat(folder := add_run("a", rows, status="running", step=0, max_steps=500), **heartbeat)
    assert read_progress(folder).phase == phase


WIDE = {
    "fid_alexnet": 12.5,
    "kid_alexnet": 0.1,
    "mini_clip_score": 0.2,
    "clip_score": 0.3,
    "pick_score": 20.1,
}


def test_the_table_fits_80_columns_and_uses_200(runs: Path) -> None:
    for seed in range(2):
        for visibility in ("causal", "non_causal"):
            losses = [
                (60, name, 5.5, 1) for name in ("train/loss", "validation/loss", "validation/codebook_use")
            ]
            name = f"visibility={visibility},learning_rate=0.0015,seed={seed}"
            add_run(name, [*losses, *((60, f"metrics/{metric}", value, 1) for metric, value in WIDE.items())])
    narrow, wide = shown(80), shown(200)
    assert max(map(len, narrow)) <= 80 and max(map(len, wide)) <= 200
    for word in ("state", "step", "train loss", "valid. loss"):
        assert word in narrow[0]
    assert "not shown in 80 columns: rate," in " ".join(narrow)
    for word in ("rate", "left", "seen", "codebook use", *WIDE):
        assert word in wide[0]
    assert not any("not shown" in line for line in wide)
    text = "".join(line.split("  ")[0] for line in narrow)
    assert "visibility=causal,learning_rate=0.0015,seed=0" in text  # folded, never cut


def test_losses_of_validation_splits_have_columns(runs: Path) -> None:
    losses = {"validation/loss": 5.5, "validation/pairs/loss": 5.25, "validation/concepts/loss": 6.25}
    add_run("seed=0", [(60, name, value, 1) for name, value in losses.items()])
    head, line = (row.replace("valid. loss", "loss") for row in shown(200)[:2])
    assert head.index("loss ") < head.index("loss, concepts") < head.index("loss, pairs")
    assert line.index("5.5000") < line.index("6.2500") < line.index("5.2500")


def test_elsewhere_than_on_a_terminal_it_is_printed_once_in_80_columns(
    runs: Path, capsys, monkeypatch
) -> None:
    add_run("seed=0", [(60, f"metrics/{metric}", value, 1) for metric, value in WIDE.items()])
    assert status.main(["seeds"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    assert status.main(["runs/seeds"]) == 0
    assert "pick_score" in capsys.readouterr().out.splitlines()[0]
    for every in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="must be positive"):
            status.main(["seeds", "--every", every])
    with pytest.raises(
        UserError, match="no study 'sedes', neither as a path nor below runs/; did you mean 'seeds'"
    ):
        status.main(["sedes"])


def test_the_others_are_shown_beside_a_damaged_run(runs: Path) -> None:
    for seed in range(3):
        add_run(f"seed={seed}")
    (runs / "seed=1" / "record.json").write_text("{")
    (runs / "seed=2" / "metrics.csv").write_bytes(b"\xff\n")
    lines = shown(200)
    assert [line.split()[1] for line in lines[1:4]] == ["finished", "unreadable", "unreadable"]
    assert lines[5] == "1 finished, 2 unreadable"
    assert lines[6].startswith("runs/seeds/seed=1/record.json is not valid JSON")
    assert lines[7].startswith("runs/seeds/seed=2/metrics.csv is not text")


def test_a_study_in_which_nothing_has_started(runs: Path) -> None:
    assert shown(80) == ["no run in runs/seeds has started"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_no_width_is_too_small_for_it(width: int) -> None:
    progress = Progress("running", 1000, 100000, "starting", 12.34, 5000, 3, {"train/loss": 5.5})
    runs = {"a" * 50: progress, "b": Progress("new")}
    table, _ = runs_table(runs, width)
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    assert max(map(len, console.file.getvalue().splitlines())) <= width  # type: ignore[attr-defined]


def test_durations_rates_and_folded_names() -> None:
    assert [duration(s) for s in (None, 5, 184, 3725)] == ["–", "5 s", "3 min 04 s", "1 h 02 min"]
    assert [short_duration(s) for s in (5, 184, 3725, 200_000)] == ["5s", "3m04s", "1h02m", "2d07h"]
    assert [short_rate(r) for r in (None, 12.34, 123.4, 0.25)] == ["–", "12.3/s", "123/s", "4s/it"]
    assert folded("visibility=causal,seed=0", 20) == "visibility=causal,\nseed=0"
    assert folded("short", 20) == "short"


def test_an_early_stop_is_named_with_its_step_and_reason(runs: Path) -> None:
    stop = {"reason": "dvar: ratio 0.149 below 0.15", "step": 42, "ratio": 0.149}
    add_run("a", step=42, early_stop=stop)
    add_run("b")
    lines = shown(100)
    assert lines[1].split()[:3] == ["a", "finished", "42/60"]
    assert lines[-1] == "a: stopped early at step 42: dvar: ratio 0.149 below 0.15"
