"""Signals of a scheduler or a person: what is saved, what is left behind, which code the process ends with."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoint_cases
import pytest
from checkpoint_cases import At, names, step_of, train

from callbacks.checkpointing import find_resume
from callbacks.preemption import slurm_job
from callbacks.signals import Interrupted

PREEMPTING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


def sending(number: int):
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM whose scontrol writes down its arguments; the file with these."""
    folder, requests = tmp_path / "bin", tmp_path / "requests"
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {requests}\n[ "$2" != 13 ] || {{ echo denied >&2; exit 1; }}\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return requests


@pytest.mark.parametrize("number", [signal.SIGINT, *PREEMPTING])
def test_a_signal_saves_after_the_step_and_the_resume_is_exact(tmp_path: Path, number: int) -> None:
    full = train(tmp_path / "full", 12)
    cut, marker = tmp_path / "cut", tmp_path / "cut" / "preempted.json"
    with pytest.raises(Interrupted) as caught:
        train(cut, 12, At(4, sending(number)))
    assert caught.value.code == (130 if number == signal.SIGINT else 75)
    assert find_resume(cut) == cut / "checkpoints" / "step_000005.ckpt"
    if number == signal.SIGINT:
        assert not marker.exists()
        with pytest.raises(KeyboardInterrupt):  # deferred no longer
            os.kill(os.getpid(), number)
    else:
        content = json.loads(marker.read_text())
        assert (content["signal"], content["step"]) == (signal.Signals(number).name, 5)
        assert content["exit_code"] == 75 and content["requeued"] is False
        os.kill(os.getpid(), signal.SIGTERM)  # a process that is leaving is in no hurry
    rest = train(cut, 12, resume=True)
    assert rest.losses == full.losses[5:]  # bit for bit
    assert not marker.exists()


def test_a_signal_waits_for_the_end_of_an_accumulated_step(tmp_path: Path) -> None:
    full = train(tmp_path / "full", 6, accumulate=2)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", 6, At(2, sending(signal.SIGTERM)), accumulate=2)
    assert find_resume(tmp_path / "cut") == tmp_path / "cut" / "checkpoints" / "step_000003.ckpt"
    rest = train(tmp_path / "cut", 6, accumulate=2, resume=True)
    assert rest.losses == full.losses[6:]


def test_a_signal_in_the_last_step_is_no_preemption(tmp_path: Path) -> None:
    train(tmp_path, 5, At(4, sending(signal.SIGTERM)))
    assert names(tmp_path) == ["last.ckpt", "step_000003.ckpt", "step_000005.ckpt"]
    assert not (tmp_path / "preempted.json").exists()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as caught:
        train(tmp_path, 12, At(4, twice))
    assert not isinstance(caught.value, Interrupted)
    assert caught.value.code == 1
    assert names(tmp_path) == ["last.ckpt", "step_000003.ckpt"]


@pytest.mark.parametrize(
    ("number", "requests"),
    [(signal.SIGUSR2, "requeue 4711\n"), (signal.SIGUSR1, "requeue 4711\n"), (signal.SIGTERM, "")],
)
def test_slurm_requeues_the_job_unless_it_was_a_cancellation(
    tmp_path: Path, scontrol: Path, number: int, requests: str
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, 12, At(4, sending(number)))
    assert (scontrol.read_text() if scontrol.exists() else "") == requests
    assert json.loads((tmp_path / "preempted.json").read_text())["requeued"] is bool(requests)


def test_a_refusal_of_slurm_is_reported(
    tmp_path: Path, scontrol: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, 12, At(4, sending(signal.SIGUSR1)))
    assert caught.value.code == 75
    assert "scontrol requeue 13: denied" in capsys.readouterr().err
    assert json.loads((tmp_path / "preempted.json").read_text())["requeued"] is False


def test_names_of_slurm_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm_job() == "8"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "7_3"
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")  # it queues its jobs again by itself
    assert slurm_job() is None


# Run in a process of its own: (run folder, grace period in s, sleep in s in the step that the signal hits).
GROUP = """
import sys, time, torch, checkpoint_cases as t
from pathlib import Path
t.data = lambda: t.DataLoader(t.TensorDataset(torch.zeros(4000, 1)), num_workers=2)
def ready():
    print("ready", flush=True)
    time.sleep(float(sys.argv[3]))
t.train(Path(sys.argv[1]), 3000, t.At(3, ready), every=1000, grace=float(sys.argv[2]))
"""


def signalled(
    root: Path,
    folder: Path,
    number: int,
    send: Callable[[int, int], None],
    grace: float = 60,
    sleep: float = 0,
) -> tuple[int, str, float]:
    """(exit code, stderr, seconds) of a training that gets a signal once it has begun; send: os.kill or os.killpg."""
    path = os.pathsep.join([str(root), str(Path(checkpoint_cases.__file__).parent)])
    child = subprocess.Popen(
        [sys.executable, "-c", GROUP, str(folder), str(grace), str(sleep)],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert "ready" in child.stdout.readline()
    began = time.monotonic()
    send(child.pid, number)
    _, errors = child.communicate(timeout=60)
    return child.returncode, errors, time.monotonic() - began


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_to_the_whole_group_spares_the_data_workers(
    tmp_path: Path, root: Path, number: int, code: int
) -> None:
    """A terminal's Ctrl-C reaches every process; a worker that died would turn the stop into a failure."""
    returned, errors, _ = signalled(root, tmp_path, number, os.killpg)
    assert returned == code, errors
    resumable = find_resume(tmp_path)
    assert resumable is not None
    assert 4 <= step_of(resumable) < 3000


def test_the_grace_period_ends_a_step_that_takes_too_long(tmp_path: Path, root: Path) -> None:
    returned, errors, seconds = signalled(root, tmp_path, signal.SIGTERM, os.kill, grace=1, sleep=50)
    assert returned == 75
    assert seconds < 20
    assert "callbacks.grace_seconds=1 after SIGTERM are over" in errors
    content = json.loads((tmp_path / "preempted.json").read_text())
    assert content["signal"] == "SIGTERM" and content["step"] == 0
