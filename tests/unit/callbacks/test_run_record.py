"""record.json, metrics.csv and atomic files: true after success, failure, interruption and resume."""

import csv
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from callbacks import run_record
from callbacks.base import log_now
from callbacks.checkpointing import RunCheckpoint, find_resume
from callbacks.csv_logger import MetricsCSV
from callbacks.event_log import EventLog
from callbacks.run_record import RunRecord, git_state, last_line
from experiments.train import is_complete
from switti.errors import UserError
from switti.files import atomic_write, read_json, sha256_file, write_json
from switti.run_folder import COLUMNS, read_record


class Module(LightningModule):
    """12 trained parameters, 5 frozen ones in a tokenizer that is not a registered submodule, and an EMA of the 12."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.ema = torch.nn.Linear(3, 3).requires_grad_(False)
        object.__setattr__(self, "tokenizer", torch.nn.Linear(4, 1).requires_grad_(False))

    def ema_pairs(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        return [(self.ema, self.layer)]

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("validation/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class RaiseAt(Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise self.error


class Data(LightningDataModule):
    """Twenty samples; describes their contents as given."""

    def __init__(self, contents: dict) -> None:
        super().__init__()
        self.contents = contents

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.ones(20, 3)), batch_size=2)

    val_dataloader = train_dataloader


def fit(
    run_dir: Path, steps: int, *callbacks: Callback, resume: bool = False, contents: dict | None = None
) -> None:
    record = RunRecord(run_dir, name="n", study=None, task="generator", seed=3, tokens_per_image=21)
    Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, log_every_n_steps=2,
        logger=[EventLog(run_dir), MetricsCSV(run_dir)],
        callbacks=[record, RunCheckpoint(run_dir / "checkpoints", 3, 2), *callbacks], num_sanity_val_steps=0,
        val_check_interval=4, check_val_every_n_epoch=None, enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), datamodule=Data(contents or {}), ckpt_path=find_resume(run_dir) if resume else None)  # fmt: skip


def record_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "record.json").read_text())


def rows_of(run_dir: Path, metric: str) -> list[int]:
    with (run_dir / "metrics.csv").open() as stream:
        return [int(row["step"]) for row in csv.DictReader(stream) if row["metric"] == metric]


def test_a_finished_run(tmp_path: Path, root: Path) -> None:
    fit(tmp_path, 10)
    record = record_of(tmp_path)
    expected = {
        "format": 1, "name": "n", "study": None, "task": "generator", "status": "finished", "error": None, "seed": 3,
        "world_size": 1, "parameters": {"trained": 12, "frozen": 5}, "tokens_per_image": 21, "step": 10,
        "max_steps": 10, "resumed": [], "pid": os.getpid(),
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    assert record["started"] <= record["updated"] <= record["ended"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["peak_memory_bytes"] > 50 * 2**20  # the interpreter with torch alone is larger
    assert 0 < record["train_seconds"] < 60
    assert shlex.split(record["command"])[1:] == sys.orig_argv[1:]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    assert record["commit"] == (commit.stdout.strip() or None)


def test_steps_are_counted_as_completed_updates(tmp_path: Path) -> None:
    fit(tmp_path, 10)
    assert rows_of(tmp_path, "train/loss") == [2, 4, 6, 8, 10]
    assert rows_of(tmp_path, "validation/loss") == [4, 8]


def test_tensorboard_has_the_steps_of_the_table(tmp_path: Path) -> None:
    """Also of a run resumed from a checkpoint, whose later points are written again."""
    with pytest.raises(ValueError):
        fit(tmp_path, 10, RaiseAt(9, ValueError("killed")))
    fit(tmp_path, 10, resume=True)
    files = sorted(tmp_path.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "validation/loss"}
    for metric in events.Tags()["scalars"]:
        assert [point.step for point in events.Scalars(metric)] == rows_of(tmp_path, metric)


def test_a_failure_keeps_the_last_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        fit(tmp_path, 10, RaiseAt(5, ValueError("many words\nloss is not finite")))
    record = record_of(tmp_path)
    assert (record["status"], record["error"], record["step"]) == (
        "failed",
        "ValueError: loss is not finite",
        5,
    )
    assert record["ended"] is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_is_no_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path, 10, RaiseAt(5, error))
    assert caught.value.code != 0
    record = record_of(tmp_path)
    assert (record["status"], record["error"], record["step"]) == ("interrupted", None, 5)


def test_a_resumed_run_adds_up_and_logs_nothing_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"):
        fit(tmp_path, 10, RaiseAt(8, ValueError("x")))
    before = record_of(tmp_path)
    assert rows_of(tmp_path, "train/loss") == [2, 4, 6, 8]
    fit(tmp_path, 10, resume=True)
    record = record_of(tmp_path)
    assert (record["status"], record["error"], record["resumed"], record["step"]) == (
        "finished",
        None,
        [6],
        10,
    )
    assert record["started"] == before["started"]
    assert record["train_seconds"] > before["train_seconds"]
    assert rows_of(tmp_path, "train/loss") == [2, 4, 6, 8, 10]
    assert rows_of(tmp_path, "validation/loss") == [4, 8]


def test_a_run_that_starts_over_forgets_the_first_attempt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"):
        fit(tmp_path, 10, RaiseAt(2, ValueError("x")))
    fit(tmp_path, 4, resume=True)
    assert record_of(tmp_path)["resumed"] == []
    assert rows_of(tmp_path, "train/loss") == [2, 4]


def test_a_failure_before_training_is_recorded(tmp_path: Path) -> None:
    class Bad(Callback):
        def on_fit_start(self, *args: object) -> None:
            raise UserError("no such weights")

    with pytest.raises(UserError):
        fit(tmp_path, 4, Bad())
    record = record_of(tmp_path)
    assert (record["status"], record["error"], record["step"]) == ("failed", "UserError: no such weights", 0)


def test_last_line() -> None:
    assert last_line(ValueError("a\nb\n")) == "ValueError: b"
    assert last_line(RuntimeError()) == "RuntimeError"


def test_outside_of_git_there_is_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "new").touch()
    subprocess.run(["git", "add", "new"], cwd=tmp_path, check=True)
    state = git_state(tmp_path)
    assert state["dirty"] is True
    assert len(state["commit"]) == 40


def test_metrics_are_written_at_once_and_rewound_byte_for_byte(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.rewind(5)  # nothing there yet
    for step in range(1, 5):
        log.log_metrics({"a": step / 3, "epoch": 1}, step)
        log.log_metrics({"b,c": 1e-12}, step)
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row[3]) for row in rows[1::2]] == [1 / 3, 2 / 3, 1.0, 4 / 3]  # every digit
    assert rows[2][:4] == ["1", "1", "b,c", "1e-12"]
    text = log.path.read_text()
    log.path.write_text(text + "5,1,cut of")  # what a kill in the middle of a write leaves
    log.rewind(9)
    assert log.path.read_text() == text
    log.rewind(2)
    assert log.path.read_text() == "".join(text.splitlines(keepends=True)[:5])
    log.rewind(0)
    assert log.path.read_text() == ",".join(COLUMNS) + "\n"


def test_atomic_write_replaces_or_leaves(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
        assert temporary.parent == path.parent
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [item.name for item in path.parent.iterdir()] == ["x.txt"]


def test_json_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": [1, None]})
    assert read_json(path) == {"ä": [1, None]}
    assert read_json(tmp_path / "none", default=7) == 7
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text('{"cut')
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        read_json(path)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise UserError('model.width=1 is too small')", 2, "error: model.width=1 is too small"),
        ("raise KeyboardInterrupt", 130, "error: interrupted"),
        ("open('/nowhere/x')", 1, "error: [Errno 2] No such file or directory: '/nowhere/x'"),
        ("return 5", 5, ""),
        ("return None", 0, ""),
    ],
)
def test_how_a_command_ends(root: Path, body: str, code: int, message: str) -> None:
    head = "from experiments.cli import run\nfrom switti.errors import UserError\n"
    source = f"{head}def main(argv):\n    {body}\nrun(main)"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (code, message)


def test_a_defect_keeps_its_traceback(root: Path) -> None:
    source = "from experiments.cli import run\nrun(lambda argv: 1 / 0)"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_the_data_are_noted_and_a_change_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def contents(train: str) -> dict:
        return {"train": {"samples": 20, "digest": train}, "validation": {"samples": 20, "digest": "v"}}

    with pytest.raises(ValueError, match="x"):
        fit(tmp_path, 12, RaiseAt(4, ValueError("x")), contents=contents("a"))
    assert record_of(tmp_path)["data"] == contents("a")
    with pytest.raises(ValueError, match="x"):
        fit(tmp_path, 12, RaiseAt(7, ValueError("x")), resume=True, contents=contents("a"))
    assert record_of(tmp_path)["data"] == contents("a")
    assert "the shards hold" not in caplog.text
    with pytest.raises(ValueError, match="x"):
        fit(tmp_path, 12, RaiseAt(10, ValueError("x")), resume=True, contents=contents("b"))
    assert "data.train: the shards hold other samples" in caplog.text
    fit(tmp_path, 12, resume=True, contents=contents("b"))
    record = record_of(tmp_path)
    assert record["data"] == contents("a+b") and record["resumed"] == [3, 6, 9]
    fit(tmp_path / "fresh", 2, contents=contents("b"))
    assert record_of(tmp_path / "fresh")["data"] == contents("b")


class Do(Callback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.action()


@pytest.mark.parametrize("what", ["removed", "renamed", "replaced", "emptied"])
@pytest.mark.parametrize("step", [3, 5, 10])
def test_a_folder_that_vanishes_under_a_run_stays_so(
    tmp_path: Path, what: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_record, "LOOK_SECONDS", 0.0)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()

    def vanish() -> None:
        run_dir.rename(tmp_path / "elsewhere")
        if what != "renamed":
            shutil.rmtree(tmp_path / "elsewhere")
        if what == "replaced":
            shutil.copytree(other, run_dir)
        if what == "emptied":
            run_dir.mkdir()

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").touch()
    with pytest.raises(
        UserError, match=r"run has been (removed or renamed|removed, emptied or replaced)|cannot write .*run/"
    ):
        fit(run_dir, 10, Do(step, vanish))
    assert not (run_dir / "record.json").exists()
    if what in ("removed", "renamed"):
        assert not run_dir.exists()


def test_a_resume_that_fails_early_forgets_nothing(tmp_path: Path) -> None:
    class Bad(Callback):
        def setup(self, *args: object, **kwargs: object) -> None:
            raise UserError("no such weights")

    with pytest.raises(ValueError, match="x"):
        fit(tmp_path, 10, RaiseAt(5, ValueError("x")))
    fit(tmp_path, 8, resume=True)
    before = record_of(tmp_path)
    with pytest.raises(UserError):
        fit(tmp_path, 12, Bad(), resume=True)
    record = record_of(tmp_path)
    assert (record["status"], record["error"]) == ("failed", "UserError: no such weights")
    for key in ("step", "train_seconds", "resumed", "parameters", "data"):
        assert record[key] == before[key], key


class StopAt(Callback):
    """Ends the run early, and tells its record."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True
            record = next(callback for callback in trainer.callbacks if isinstance(callback, RunRecord))
            record.note_early_stop({"reason": "enough", "step": self.step, "ratio": 0.1})


def test_an_early_stop_is_finished_until_max_steps_is_raised(tmp_path: Path) -> None:
    fit(tmp_path, 10, StopAt(5))
    record = read_record(tmp_path)
    assert record is not None
    assert (record["status"], record["step"], record["max_steps"]) == ("finished", 5, 10)
    assert record["early_stop"] == {"reason": "enough", "step": 5, "ratio": 0.1}
    assert [is_complete(record, steps) for steps in (4, 5, 10, 11)] == [True, True, True, False]
    fit(tmp_path, 11, resume=True)
    record = read_record(tmp_path)
    assert record is not None and "early_stop" not in record and record["step"] == 11


def test_a_run_that_starts_again_from_nothing_drops_all_rows(tmp_path: Path) -> None:
    """Those from before the first step, too, which it writes again."""

    class First(Callback):
        def on_train_start(self, trainer: Trainer, *args: object) -> None:
            log_now(trainer, {"first": 1.0})

    with pytest.raises(ValueError):
        fit(tmp_path, 10, First(), RaiseAt(2, ValueError("killed")))
    fit(tmp_path, 10, First())
    assert rows_of(tmp_path, "first") == [0]
    assert rows_of(tmp_path, "train/loss") == [2, 4, 6, 8, 10]
