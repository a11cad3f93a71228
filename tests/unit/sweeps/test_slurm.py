"""Runs as jobs of a cluster: submitit with a stand-in for SLURM's programs and for the train command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import install
from stand_in import prepare, record_of, starts

submitit = pytest.importorskip("submitit")

from experiments import sweep  # noqa: E402
from sweeps.launchers import slurm as launch_slurm  # noqa: E402
from sweeps.launchers.slurm import Rank, minutes  # noqa: E402
from sweeps.run_state import state_of  # noqa: E402
from switti.errors import UserError  # noqa: E402
from switti.run_folder import QUEUED  # noqa: E402


@pytest.fixture
def study(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds, in a working folder with a cluster."""
    prepare(tmp_path)
    path = tmp_path / "seeds.yaml"
    path.write_text(
        f"base: {tmp_path / 'base.yaml'}\nvary: {{seed: [0, 1]}}\noverrides: {{trainer.accelerator: cpu}}\n"
    )
    programs = install(tmp_path / "cluster")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "cluster"))
    monkeypatch.setenv("PYTHONPATH", f"{root}:{tmp_path}")
    monkeypatch.setattr(launch_slurm, "TRAIN", ["stand_in.py"])
    monkeypatch.setattr(launch_slurm, "_ASK_SECONDS", 0.5)
    return path


def scripts() -> list[str]:
    return [path.read_text() for path in sorted(Path("cluster/scripts").iterdir())]


def test_runs_of_one_shape_are_one_array(study: Path, capfdbinary) -> None:
    Path("fail").touch()
    arguments = [
        str(study),
        "--launcher",
        "slurm",
        "--partition",
        "long",
        "--time",
        "1-2:00:00",
        "--jobs",
        "2",
    ]
    assert sweep.main([*arguments, "--cpus", "3", "--memory", "7", "--sbatch", "account=me"]) == 1
    text = capfdbinary.readouterr().out.decode()
    assert "seed=1 failed: ValueError: loss is not finite" in text
    assert "    Traceback\n    ValueError: loss is not finite" in text
    assert record_of("seeds/seed=0")["status"] == "finished"
    (script,) = scripts()
    wanted = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, flags=re.M))
    expected = {
        "array": "0-1%2", "partition": "long", "time": "1560", "nodes": "1", "ntasks-per-node": "1",
        "cpus-per-task": "3", "mem": "7GB", "account": "me", "signal": "USR2@180",
    }  # fmt: skip
    assert {key: wanted.get(key) for key in expected} == expected
    assert "gpus-per-node" not in wanted

    Path("fail").unlink()
    assert sweep.main([*arguments]) == 0
    assert [starts(f"seeds/seed={seed}") for seed in (0, 1)] == [1, 2]
    assert "array" not in scripts()[1].split("srun")[0].replace("%A_%a", "")  # a single run is not an array


@pytest.mark.distributed
def test_every_rank_of_a_run_is_a_task_that_finds_the_others(study: Path) -> None:
    settings = ["trainer.devices=2", "trainer.num_nodes=2", "data.batch_size=8", "vary.seed=[0]"]
    assert sweep.main([str(study), "--launcher", "slurm", *settings]) == 0
    assert sorted(path.name for path in Path("runs/seeds/seed=0").glob("rank_*")) == [
        f"rank_{rank}_of_4" for rank in range(4)
    ]
    (script,) = scripts()
    assert "--nodes=2" in script and "--ntasks-per-node=2" in script
    assert Path("runs/seeds/seed=0/output.rank_3.log").is_file()


def test_what_is_queued_is_not_started_twice(study: Path, capsys) -> None:
    Path("slow").write_text("1")
    assert sweep.main([str(study), "--launcher", "slurm", "--detach"]) == 0
    jobs = [json.loads((Path(f"runs/seeds/seed={seed}") / QUEUED).read_text())["job"] for seed in (0, 1)]
    assert jobs == ["100_0", "100_1"]
    assert {state_of(f"runs/seeds/seed={seed}") for seed in (0, 1)} <= {"queued", "running"}
    assert sweep.main([str(study), "--launcher", "slurm", "--detach"]) == 0
    assert len(scripts()) == 1
    deadline = time.monotonic() + 60
    while {state_of(f"runs/seeds/seed={seed}") for seed in (0, 1)} != {"finished"}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [starts(f"seeds/seed={seed}") for seed in (0, 1)] == [1, 1]


def start_driver(arguments: list[str]) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from experiments import sweep; from experiments.cli import run\n"
        "from sweeps.launchers import slurm as launch_slurm\n"
        "launch_slurm.TRAIN = ['stand_in.py']; launch_slurm._ASK_SECONDS = 0.5\n"
        f"sys.argv = {['sweep', *arguments, '--launcher', 'slurm']!r}\nrun(sweep.main)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.distributed
def test_a_job_at_its_time_limit_is_queued_again_and_resumes(study: Path) -> None:
    """Of two tasks the other has an answer ready when the first leaves: it must not count in the end."""
    Path("slow").write_text("1")
    process = start_driver([str(study), "vary.seed=[0]", "trainer.devices=2", "data.batch_size=8"])
    folder = Path("runs/seeds/seed=0")
    deadline = time.monotonic() + 60
    while not (folder / "metrics.csv").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(["scancel", "--signal=USR2", "100"], check=True)
    text = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, text
    assert "1 finished" in text and "resumes" not in text
    assert record_of("seeds/seed=0")["status"] == "finished" and starts("seeds/seed=0") == 4
    assert len(scripts()) == 1


@pytest.mark.distributed
def test_ctrl_c_cancels_and_leaves_the_runs_resumable(study: Path) -> None:
    Path("slow").write_text("10")
    process = start_driver([str(study)])
    deadline = time.monotonic() + 60
    while not all(Path(f"runs/seeds/seed={seed}/metrics.csv").is_file() for seed in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130, text
    assert [state_of(f"runs/seeds/seed={seed}") for seed in (0, 1)] == ["interrupted"] * 2


def test_a_job_that_must_leave_saves_and_is_called_again(study: Path, tmp_path: Path) -> None:
    """submitit's own machinery on this machine: SIGUSR2 to the task, as SLURM sends it ahead of the time limit."""
    Path("slow").write_text("0.5")
    folder = Path("runs/one/run")
    executor = submitit.LocalExecutor(tmp_path / "jobs" / "%j")
    executor.update_parameters(timeout_min=5)
    command = [sys.executable, "stand_in.py", "base.yaml", "study=one", "name=run"]
    job = executor.submit(Rank(command, str(folder), 1))
    deadline = time.monotonic() + 60
    while not (folder / "metrics.csv").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    try:
        task = int(
            subprocess.run(
                ["pgrep", "-P", str(job.job_id)], capture_output=True, text=True, check=True
            ).stdout
        )
        os.kill(task, signal.SIGUSR2)
        while record_of("one/run")["status"] != "interrupted":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        saved = submitit.core.utils.DelayedSubmission.load(job.paths.submitted_pickle)
        assert isinstance(saved.function, Rank) and saved.function.command == command
    finally:
        job.cancel()
        job._process.wait()


def test_without_a_cluster_one_line_says_so(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match="start it where sbatch and srun are"):
        sweep.main([str(study), "--launcher", "slurm"])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:30", 90),
        ("2:00:00", 120),
        ("1-0", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("0-0:05:59", 5),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launcher", "slurm", "--time", "soon"], "--time soon is not"),
        (["--launcher", "slurm", "--time", "0:30"], "less than a minute"),
        (["--launcher", "slurm", "--sbatch", "account"], "--sbatch account: options of sbatch are key=value"),
        (["--partition", "gpu"], "--partition needs --launcher slurm"),
        (["trainer.num_nodes=2", "data.batch_size=8"], "trainer.num_nodes=2 needs --launcher slurm"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(study: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep.main([str(study), *words])
    assert message in str(caught.value)
    assert not Path("runs").exists()
