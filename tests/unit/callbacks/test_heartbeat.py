"""Heartbeat and watchdog: what a rank reports while it runs, ends, and hangs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from callbacks.checkpointing import build_checkpoint_callback
from callbacks.config import CallbacksConfig
from callbacks.heartbeat import Heartbeat


class Line(LightningModule):
    def __init__(self, look) -> None:
        super().__init__()
        self.layer, self.look = torch.nn.Linear(3, 1), look

    def training_step(self, batch, index):
        self.look("forward")
        return self.layer(batch[0]).square().mean()

    def on_after_backward(self):
        self.look("backward")

    def on_before_optimizer_step(self, optimizer):
        self.look("optimizer")

    def validation_step(self, batch, index):
        self.look("validation")

    def on_train_batch_end(self, outputs, batch, index):
        self.look("callbacks")

    def on_save_checkpoint(self, checkpoint):
        self.look("checkpoint")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loader(DataLoader):
    """Announces when a batch is fetched, as the data module's loader does."""

    waiting = None

    def __iter__(self):
        for batch in super().__iter__():
            if self.waiting is not None:
                self.waiting()
                self.look("data")
            yield batch


def train(
    folder: Path, steps: int, *callbacks: Callback, look=lambda name, beat: None, watchdog: float = 0
) -> Heartbeat:
    beat = Heartbeat(folder, every=0.05, watchdog=watchdog)
    checkpoint = build_checkpoint_callback(CallbacksConfig(checkpoint_every=3), folder)
    loader = Loader(TensorDataset(torch.ones(100, 3)))
    loader.look = lambda name: look(name, beat)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[beat, *callbacks, checkpoint], num_sanity_val_steps=0, val_check_interval=4, limit_val_batches=1,
    )  # fmt: skip
    trainer.fit(Line(lambda name: look(name, beat)), loader, DataLoader(TensorDataset(torch.ones(4, 3))))
    return beat


def report_of(folder: Path) -> dict:
    return json.loads((folder / "heartbeat" / "rank_0.json").read_text())


def test_every_phase_is_reported_by_its_name(tmp_path: Path) -> None:
    seen: list[tuple[str, str, int]] = []
    train(tmp_path, 6, look=lambda name, beat: seen.append((name, beat.state["phase"], beat.state["step"])))
    assert {name for name, _, _ in seen} == {
        "data", "forward", "backward", "optimizer", "callbacks", "checkpoint", "validation"
    }  # fmt: skip
    # the module hears of the end of a batch after the callbacks, the last of which saves
    assert {(name, phase) for name, phase, _ in seen if name != phase} == {("callbacks", "checkpoint")}
    assert [step for name, _, step in seen if name == "forward"] == [0, 1, 2, 3, 4, 5]
    report = report_of(tmp_path)
    assert (report["status"], report["step"], report["rank"], report["world_size"]) == ("finished", 6, 0, 1)
    assert report["pid"] == os.getpid() and abs(report["time"] - time.time()) < 60


def test_a_slow_step_is_seen_from_outside_while_it_lasts(tmp_path: Path) -> None:
    seen = []

    class Slow(Callback):
        def on_before_zero_grad(self, *args: object) -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and report_of(tmp_path)["phase"] != "forward":
                time.sleep(0.02)
            seen.append(report_of(tmp_path))

    train(tmp_path, 1, Slow())
    assert seen[0]["phase"] == "forward" and seen[0]["status"] == "running"


@pytest.mark.parametrize(("error", "status"), [(ValueError("x"), "failed"), (SystemExit(75), "interrupted")])
def test_how_it_ended(tmp_path: Path, error: BaseException, status: str) -> None:
    class Fail(Callback):
        def on_train_batch_start(self, *args: object) -> None:
            raise error

    with pytest.raises(type(error)):
        train(tmp_path, 3, Fail())
    assert report_of(tmp_path)["status"] == status


def test_files_of_an_earlier_attempt_are_removed(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").mkdir()
    for name in ("rank_7.json", "hung"):
        (tmp_path / "heartbeat" / name).write_text("{}")
    train(tmp_path, 1, watchdog=60)
    assert [path.name for path in (tmp_path / "heartbeat").iterdir()] == ["rank_0.json"]


def test_a_step_that_stands_still_is_told_in_its_file_and_once_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("callbacks.heartbeat._STANDSTILL", 0.3)
    idle = []

    def look(name: str, beat: Heartbeat) -> None:
        if name == "data" and beat.state["step"] == 2:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and report_of(tmp_path)["idle"] < 0.6:
                time.sleep(0.05)
            idle.append(report_of(tmp_path)["idle"])

    with caplog.at_level("WARNING"):
        train(tmp_path, 4, look=look, watchdog=500)
    assert idle[0] >= 0.6 and report_of(tmp_path)["idle"] < 0.6
    lines = [record.message for record in caplog.records if "no progress" in record.message]
    assert lines == [
        "rank 0: no progress for 0 s at step 2, in data; callbacks.watchdog_seconds=500 ends the run"
    ]


HANG = """
import sys, time, test_heartbeat as t
from pathlib import Path
def stuck_here(name, beat):
    if name == "backward" and beat.state["step"] == 2:
        time.sleep(600)
Path(sys.argv[1], "record.json").write_text('{"format": 1, "status": "running", "step": 2}')
t.train(Path(sys.argv[1]), 5, look=stuck_here, watchdog=1.0)
"""


def test_a_hanging_process_says_where_and_ends(tmp_path: Path, root: Path) -> None:
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 76, done.stderr
    assert "no progress for more than callbacks.watchdog_seconds=1" in done.stderr
    assert (
        f"rank 0 ({report_of(tmp_path)['host']}, pid {report_of(tmp_path)['pid']}): step 2, backward for"
        in done.stderr
    )
    assert "in stuck_here" in done.stderr
    assert report_of(tmp_path)["status"] == "hung"
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "failed" and "watchdog_seconds" in record["error"]
