"""The sweep driver with a stand-in for the train command: what is started, skipped, resumed, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.study import load_study
from experiments import launch_local, status, sweep
from experiments.launch import tail_of
from switti.errors import UserError
from switti.studies import state_of

# Behaves as experiments.train does towards the driver: saves its config, then its record.
# `trained` counts how often a run was started; a file `fail` in the working folder makes seed 1 fail.
STAND_IN = """
import json, os, signal, socket, sys, time
from datetime import UTC, datetime
from pathlib import Path
from configs.loading import load, to_yaml

config = load(sys.argv[1], sys.argv[2:])
folder = config.run_dir
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(to_yaml(config))
with open(folder / "trained", "a") as stream:
    stream.write("x")

def record(status, error=None):
    (folder / "record.json").write_text(json.dumps({
        "status": status, "error": error, "pid": os.getpid(), "host": socket.gethostname(), "step": 5,
        "max_steps": config.trainer.max_steps, "train_seconds": 2.0, "updated": datetime.now(UTC).isoformat()}))

print("training", config.name, "threads", os.environ.get("OMP_NUM_THREADS"), flush=True)
if Path("slow").exists():
    try:
        record("running")
        time.sleep(60)
    except KeyboardInterrupt:
        record("interrupted")
        sys.exit(130)
if config.seed == 1 and Path("fail").exists():
    record("failed", "ValueError: loss is not finite")
    print("Traceback\\nValueError: loss is not finite", file=sys.stderr)
    sys.exit(1)
record("finished")
"""


@pytest.fixture
def study(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of three seeds in an empty working folder, whose runs are done by the stand-in."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "base.yaml").write_text(
        "tokenizer: {scales: [1, 2, 4], multipliers: [1, 2], codebook_size: 64, code_width: 8, channels: 32}\n"
        "model: {depth: 2, width: 64, heads: 4}\n"
    )
    path = tmp_path / "seeds.yaml"
    path.write_text(f"base: {tmp_path / 'base.yaml'}\nvary: {{seed: [0, 1, 2]}}\npair_by: seed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch_local, "TRAIN", ["stand_in.py"])
    before = signal.getsignal(signal.SIGTERM)
    yield path
    signal.signal(signal.SIGTERM, before)


def starts(seed: int) -> int:
    path = Path(f"runs/seeds/seed={seed}/trained")
    return len(path.read_text()) if path.exists() else 0


def test_a_failing_run_stops_no_other_and_is_retried_alone(study: Path, capfdbinary) -> None:
    Path("fail").touch()
    assert sweep.main([str(study)]) == 1
    text = capfdbinary.readouterr().out.decode()
    assert [starts(seed) for seed in range(3)] == [1, 1, 1]
    assert "seed=1 failed: ValueError: loss is not finite" in text
    assert "    Traceback\n    ValueError: loss is not finite" in text
    assert "2 finished now, 0 skipped, 1 not finished" in text

    Path("fail").unlink()
    assert sweep.main([str(study)]) == 0
    text = capfdbinary.readouterr().out.decode()
    assert [starts(seed) for seed in range(3)] == [1, 2, 1]
    assert "1 finished now, 2 skipped, 0 not finished" in text

    assert sweep.main([str(study)]) == 0
    assert [starts(seed) for seed in range(3)] == [1, 2, 1]


def test_study_json_says_how_runs_pair(study: Path) -> None:
    sweep.main([str(study)])
    saved = json.loads(Path("runs/seeds/study.json").read_text())
    assert (saved["name"], saved["pair_by"], saved["vary"]) == ("seeds", "seed", {"seed": [0, 1, 2]})
    assert [run["varied"] for run in saved["runs"]] == [{"seed": seed} for seed in range(3)]


def test_runs_at_a_time_share_the_cores_and_prefix_their_lines(study: Path, capfdbinary) -> None:
    assert sweep.main([str(study), "--jobs", "2"]) == 0
    lines = capfdbinary.readouterr().out.decode().splitlines()
    threads = max(1, (os.cpu_count() or 1) // 2)
    for seed in range(3):
        assert f"[seed={seed}] training seed={seed} threads {threads}" in lines


def test_a_dry_run_checks_everything_and_starts_nothing(study: Path, capsys) -> None:
    assert sweep.main([str(study), "--dry-run", "trainer.max_steps=3"]) == 0
    assert capsys.readouterr().out.count("start") == 3
    assert not Path("runs").exists()
    with pytest.raises(UserError, match=r"run seed=0: model\.width=62"):
        sweep.main([str(study), "--dry-run", "model.width=62"])


def test_settings_for_all_runs_may_rename_the_study(study: Path) -> None:
    assert sweep.main([str(study), "study=other", "trainer.max_steps=3"]) == 0
    assert "max_steps: 3" in Path("runs/other/seed=2/config.yaml").read_text()


def test_a_folder_with_other_settings_is_not_taken_for_the_run(study: Path) -> None:
    sweep.main([str(study)])
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        sweep.main([str(study), "optimizer.learning_rate=1"])
    with pytest.raises(UserError, match=r"is finished with trainer\.max_steps=1000, not 7"):
        sweep.main([str(study), "trainer.max_steps=7"])
    assert sweep.main([str(study), "trainer.log_every=7"]) == 0  # computes nothing else
    assert [starts(seed) for seed in range(3)] == [1, 1, 1]


def test_states_decide_what_happens(study: Path, capsys) -> None:
    folder = load_study(study).folder
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    for seed, record in enumerate(
        [
            {"status": "running", "pid": os.getpid(), "host": host},
            {"status": "running", "pid": gone.pid, "host": host},
            {"status": "interrupted"},
        ]
    ):
        path = folder / f"seed={seed}" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
    assert [state_of(folder / f"seed={seed}") for seed in range(3)] == ["running", "killed", "interrupted"]
    assert state_of(folder / "seed=9") == "new"
    sweep.main([str(study), "--dry-run"])
    actions = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert actions == ["skip", "resume", "resume"]


def test_a_run_on_another_host_counts_as_killed_when_it_falls_silent(tmp_path: Path) -> None:
    record = {"status": "running", "pid": 1, "host": "elsewhere"}
    for updated, state in [("2020-01-01T00:00:00+00:00", "killed"), ("2999-01-01T00:00:00+00:00", "running")]:
        (tmp_path / "record.json").write_text(json.dumps({**record, "updated": updated}))
        assert state_of(tmp_path) == state


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_every_run_resumable(study: Path, root: Path, number: int) -> None:
    Path("slow").touch()
    code = (
        "import sys; from experiments import launch_local, sweep; from experiments.command import run\n"
        "launch_local.TRAIN = ['stand_in.py']\n"
        f"sys.argv = ['sweep', {str(study)!r}, '--jobs', '2']\n"
        "run(sweep.main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 30
    while not all(Path(f"runs/seeds/seed={seed}/record.json").is_file() for seed in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130, text
    assert "error: interrupted" in text
    assert [state_of(f"runs/seeds/seed={seed}") for seed in (0, 1, 2)] == [
        "interrupted",
        "interrupted",
        "new",
    ]


def test_progress_bars_do_not_fill_the_tail() -> None:
    content = b"".join(b"\rstep %d" % i for i in range(500)) + b"\n\nlast"
    assert tail_of(content) == ["step 499", "last"]


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_jobs_must_be_positive(study: Path, jobs: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main([str(study), "--jobs", jobs])
    assert caught.value.code == 2
    assert "--jobs" in capsys.readouterr().err


def test_status_shows_each_run_with_its_last_losses(study: Path, capsys) -> None:
    Path("fail").touch()
    sweep.main([str(study)])
    (Path("runs/seeds/seed=0") / "metrics.csv").write_text(
        "step,epoch,metric,value,time\n1,0,train/loss,4.5,0\n5,0,train/loss,4.25,1\n5,0,validation/loss,4.75,1\n5,0,trai"
    )
    capsys.readouterr()
    assert status.main(["seeds"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "finished" in rows["seed=0"]
    assert "5/1000" in rows["seed=0"]
    assert "2.50" in rows["seed=0"]  # 5 steps in 2 s
    assert "4.2500" in rows["seed=0"]
    assert "4.7500" in rows["seed=0"]
    assert "failed: ValueError: loss is not finite" in rows["seed=1"]
    with pytest.raises(UserError, match="there are: seeds"):
        status.main(["sedes"])
