"""A disk that is full: each file that a run writes fails in one line with its path, the free space and the remedy."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.bad_samples import BadSamples
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.checkpointing import _link
from callbacks.csv_logger import MetricsCSV
from callbacks.event_log import EventLog
from callbacks.sample_grids import write_image
from switti.errors import UserError
from switti.run_folder import read_metrics, write_record
from switti.sampling.pipeline_folder import whole_folder
from switti.weights.save import write_weights


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: the system says "File too large", at the same places as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def parts_of_a_folder(path: Path) -> None:
    with whole_folder(path) as folder:
        write_weights(folder / "a" / "model.safetensors", {"x": torch.zeros(4000)})


WRITERS: dict[str, Callable[[Path], None]] = {
    "metrics.csv": lambda path: MetricsCSV(path.parent).log_metrics(
        {f"metric_{i}": i / 7 for i in range(99)}, 1
    ),
    "record.json": lambda path: write_record(path.parent, {"error": "x" * 2000}),
    "damaged.csv": lambda path: BadSamples(path.parent)._append([(1, "kind", "shard", "key", "x" * 2000)]),
    "a.png": lambda path: write_image(path, noise()),
    "a.safetensors": lambda path: write_weights(path, {"x": torch.zeros(4000)}),
    "step_000001.ckpt": lambda path: AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(4000)}, path),
    "exported": parts_of_a_folder,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 1, 500, 1999])
def test_each_file_says_so_in_a_line(tmp_path: Path, name: str, size: int) -> None:
    with pytest.raises(UserError) as caught, files_of_at_most(size):
        WRITERS[name](tmp_path / name)
    message = str(caught.value)
    assert str(tmp_path / name) in message and "File too large" in message, message
    assert "MiB free); make room and " in message and message.isprintable()
    assert {path.name for path in tmp_path.iterdir()} <= {"metrics.csv", "damaged.csv"}
    WRITERS[name](tmp_path / name)  # there is room again
    assert (tmp_path / name).exists()


def test_what_fitted_of_the_metrics_can_be_read(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path)
    log.log_metrics({"a": 1.0}, 1)
    with pytest.raises(UserError), files_of_at_most((tmp_path / "metrics.csv").stat().st_size + 40):
        log.log_metrics({"b": 1.0, "c": 1.0, "d": 1.0}, 2)
    assert {row.metric for row in read_metrics(tmp_path)} <= {"a", "b"}
    log.rewind(2)
    assert (tmp_path / "metrics.csv").read_bytes().endswith(b"\n")


def test_events_end_the_run_in_a_line_and_their_thread_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(tmp_path)
    log.log_metrics({"a": 1.0}, 1)
    log.save()
    with files_of_at_most(600), pytest.raises(UserError) as caught:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            log.log_metrics({"a": 1.0}, 1)
            log.save()
    assert str(tmp_path / "events.out.tfevents") in str(caught.value) and "File too large" in str(
        caught.value
    )
    with files_of_at_most(600):
        log.finalize("failed")  # the first error is the one to report
    assert capfd.readouterr().err == ""


def test_the_errors_of_other_threads_are_still_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    for _ in range(2):
        EventLog(tmp_path)
    error = threading.ExceptHookArgs((OSError, OSError("mine"), None, threading.current_thread()))
    threading.excepthook(error)
    assert shown == [error]


def test_events_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/a/events\.out\.tfevents: Not a directory"):
        EventLog(tmp_path / "file" / "a").log_metrics({"a": 1.0}, 1)


def test_a_link_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*gone/last\.ckpt: No such file or directory"):
        _link(tmp_path / "gone" / "last.ckpt", tmp_path / "step.ckpt")


def test_two_exports_at_once_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UserError, match="out exists already"), whole_folder(target) as first:
        (first / "a").write_text("1")
        with whole_folder(target) as second:
            assert second != first
            (second / "a").write_text("2")
    assert (target / "a").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
