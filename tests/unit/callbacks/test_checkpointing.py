"""Checkpoints: intact or absent, pruned, and found for a resume."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import At, names, step_of, train

from callbacks.checkpointing import (
    AtomicCheckpointIO,
    corruption,
    find_resume,
)
from switti.errors import UserError


def test_the_newest_stay_and_last_links_to_the_newest(tmp_path: Path) -> None:
    train(tmp_path, 10)
    assert names(tmp_path) == ["last.ckpt", "step_000009.ckpt", "step_000010.ckpt"]
    folder = tmp_path / "checkpoints"
    assert (folder / "last.ckpt").resolve() == (folder / "step_000010.ckpt").resolve()
    assert find_resume(tmp_path) == folder / "step_000010.ckpt"
    assert step_of(folder / "step_000009.ckpt") == 9


def test_pruning_goes_on_after_a_resume(tmp_path: Path) -> None:
    train(tmp_path, 6)
    train(tmp_path, 12, resume=True)
    assert names(tmp_path) == ["last.ckpt", "step_000009.ckpt", "step_000012.ckpt"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert find_resume(tmp_path) is None


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text"])
def test_a_corrupt_newest_is_skipped_and_named(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 6)
    newest = tmp_path / "checkpoints" / "step_000006.ckpt"
    content = bytearray(newest.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-100], "flip": content, "empty": b"", "text": b"x" * 500}[harm])
    with caplog.at_level(logging.WARNING):
        assert find_resume(tmp_path) == tmp_path / "checkpoints" / "step_000003.ckpt"
    assert "step_000006.ckpt cannot be used" in caplog.text
    resumed = train(tmp_path, 8, resume=True)
    assert len(resumed.losses) == 5
    assert corruption(newest) is None  # written again on the way


def test_a_failure_saves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("loss is not finite")

    with pytest.raises(ValueError, match="not finite"):
        train(tmp_path, 12, At(5, fail))
    assert names(tmp_path) == ["last.ckpt", "step_000003.ckpt"]


def test_leftovers_of_a_killed_write_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step_000003.ckpt.tmp").write_bytes(b"half")
    assert find_resume(tmp_path) is None
    train(tmp_path, 3)
    assert names(tmp_path) == ["last.ckpt", "step_000003.ckpt"]


FULL = """
import resource, signal, sys, torch
from callbacks.checkpointing import AtomicCheckpointIO
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
AtomicCheckpointIO().save_checkpoint({"state_dict": torch.zeros(int(sys.argv[2]))}, sys.argv[1])
"""


def test_a_write_that_cannot_be_finished_leaves_the_previous_file(tmp_path: Path, root: Path) -> None:
    """A limit on the size of files stops the write in the middle, as a full disk does, in a process of its own."""
    path = tmp_path / "step_000001.ckpt"

    def save(numbers: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", FULL, str(path), str(numbers)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert save(1_000).returncode == 0
    before = path.read_bytes()
    failed = save(100_000)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert f"UserError: cannot write checkpoint {path}" in last
    assert "MiB free" in last
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def full_disk(tmp_path: Path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_previous_checkpoint(full_disk: Path) -> None:
    folder = full_disk / "checkpoints"
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(50_000)}, folder / "step_000001.ckpt")
    with pytest.raises(UserError, match=r"step_000002\.ckpt: .*MiB free"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(500_000)}, folder / "step_000002.ckpt")
    assert find_resume(full_disk) == folder / "step_000001.ckpt"
    assert [path.name for path in folder.iterdir()] == ["step_000001.ckpt"]


def test_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step_000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(
        {
            "state_dict": {"a": torch.arange(5)},
            "b": [1, "x"],
            "global_step": 1,
            "pytorch-lightning_version": "2",
        },
        path,
    )
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]
    assert loaded["b"] == [1, "x"]
    assert corruption(path) is None
