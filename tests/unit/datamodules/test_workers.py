"""Data workers on a machine that lacks something, and when somebody dies."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from batch_cases import module, take
from data_shards import make_set
from torch.utils.data._utils.pin_memory import pin_memory

from datamodules.batches import pack_batch
from datamodules.shards.bad_samples import BadSample, Fatal
from datamodules.shards.index import load_index
from datamodules.shards.open_files import OpenFiles
from datamodules.workers import worker_failure
from switti.errors import UserError

HEAD = """
import os, resource, signal, sys, time
from pathlib import Path
from batch_cases import module, take
folder = Path(sys.argv[1])
"""


def start(root: Path, folder: Path, code: str, *before: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(root), str(root / "tests" / "helpers")])
    return subprocess.Popen(
        [*before, sys.executable, "-c", HEAD + textwrap.dedent(code), str(folder)],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_set(tmp_path, [4, 3, 5])
    make_set(tmp_path, [3], "validation")
    return tmp_path


def test_tensors_of_workers_need_no_shared_memory(root: Path, folder: Path) -> None:
    """A batch that torch would put into /dev/shm file by file, with next to no descriptors."""
    code = """
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, 4096))
    data = module(folder, workers=2, batch_size=64)
    print(sum(len(batch["key"]) for batch in take(data, 30)))
    """
    out, err = start(root, folder, code).communicate(timeout=120)
    assert out.strip() == str(30 * 64), err


@pytest.mark.slow
def test_too_few_descriptors_for_workers_are_an_error_with_its_remedy(root: Path, folder: Path) -> None:
    code = """
    from switti.errors import UserError
    data = module(folder, workers=2)
    data.setup("fit")
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, 4096))
    try:
        take(data, 1)
    except UserError as error:
        print(error)
    """
    out, err = start(root, folder, code).communicate(timeout=120)
    assert "data.workers=2: the data workers cannot be started" in out and "ulimit -n" in out, err


def test_a_limit_of_descriptors_that_is_near_closes_files_early(folder: Path) -> None:
    files = OpenFiles()
    paths = sorted(folder.glob("*.tar"))
    for path in paths:
        files.read(path, 1, 0)
    real, left = os.dup, 1

    def dup(descriptor: int) -> int:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(24, "Too many open files")
        return real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "dup", dup)
        (folder / "other").write_bytes(b"abc")
        assert files.read(folder / "other", 1, 0) == b"a"
    assert files.most == len(paths) // 2
    files.close()


def test_a_process_without_descriptors_does_not_blame_the_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(folder, max_bad_fraction=1.0)
    data.setup("fit")

    def refuse(*args: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("datamodules.shards.open_files.open_regular", refuse)
    damage = data.training_set.samples.read(0, 0, 0)
    assert isinstance(damage, Fatal)
    with pytest.raises(UserError, match=r"no file descriptor left .*ulimit -n"):
        take(data, 1)


def test_a_worker_that_is_killed_is_one_line(root: Path, folder: Path) -> None:
    code = """
    import multiprocessing
    data = module(folder, workers=2)
    data.setup("fit")
    try:
        for number, batch in enumerate(data.train_dataloader()):
            data.advance()
            if number == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    except (OSError, RuntimeError) as error:
        from datamodules.workers import worker_failure
        print(error if isinstance(error, OSError) else worker_failure(error))
    """
    out, err = start(root, folder, code).communicate(timeout=120)
    words = r"data worker \d+ (was killed \(Killed\)|ended unexpectedly); most likely the machine ran out of memory"
    assert out.count("\n") == 1 and re.match(words, out), err
    assert "The same command resumes the run" in out


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            "data worker 7 was killed (Killed); most likely",
        ),
        (
            "DataLoader worker (pid(s) 7, 8) exited unexpectedly",
            "data worker 7, 8 ended unexpectedly; most likely",
        ),
        (
            "DataLoader worker (pid 7) is killed by signal: Aborted. ",
            "data worker 7 was killed (Aborted). The same",
        ),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details",
            "data worker 7 ended unexp",
        ),
        ("shape mismatch", None),
    ],
)
def test_what_torch_says_of_dead_workers(message: str, words: str | None) -> None:
    failure = worker_failure(RuntimeError(message))
    assert (failure is None) if words is None else str(failure).startswith(words)


@pytest.mark.parametrize(
    "how",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        pytest.param("raise ValueError('x')", marks=pytest.mark.slow),
    ],
)
def test_workers_end_with_the_training_process(root: Path, folder: Path, how: str) -> None:
    """Also while they write a batch that nobody will read, and without the loader having been closed."""
    code = f"""
    import multiprocessing
    data = module(folder, workers=2, batch_size=64, resolution=64)
    data.setup("fit")
    kept = iter(data.train_dataloader())
    next(kept)
    cycle = [kept]
    cycle.append(cycle)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {how}
    """
    process = start(root, folder, code)
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.wait(timeout=60)
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.communicate()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_workers_send_is_what_the_batch_holds(folder: Path) -> None:
    """Packed and unpacked, also by the thread that copies batches for a GPU."""
    data = module(folder, batch_size=8)
    data.setup("fit")
    read = data.training_set.samples.read
    samples = [read(0, row, 0) for row in range(3)] + [BadSample("a", "a/b", "torn")]
    packed = pack_batch(samples)
    batch = packed.unpack()
    assert packed.read == 4 and packed.bad == [samples[-1]] and packed.images_B3HW.dtype == "uint8"
    for image, sample in zip(batch["image"], samples, strict=False):
        expected = torch.from_numpy(sample.image.copy()).permute(2, 0, 1).float() / 127.5 - 1
        assert torch.equal(image, expected) and image.is_contiguous()
    assert pack_batch(samples[3:]).unpack() == {}


def test_batches_for_a_gpu_are_unpacked_by_the_thread_that_pins_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(folder)
    data.setup("fit")
    samples = [data.training_set.samples.read(0, row, 0) for row in range(3)]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    ours, theirs = pin_memory(pack_batch(samples)).unpack(), pack_batch(samples).unpack()
    assert any(tensor is ours["image"] for tensor in pinned) and ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value


def test_a_shard_that_another_one_has_replaced_is_not_read_by_the_old_index(folder: Path) -> None:
    data = module(folder, max_bad_fraction=1.0)
    data.setup("fit")
    make_set(folder, [7])
    damage = data.training_set.samples.read(0, 2, 0)
    assert isinstance(damage, BadSample) and "another size than when it was checked" in damage.reason
    assert len(load_index(folder / "train-000000.tar")) == 7
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN  # the workers' business alone
