"""kill -9 at random moments, the same command again until the run is finished: the same bits as without.

Compared are every row of metrics.csv but times and memory, and all tensors of the last checkpoint.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from story_command import command
from story_images import draw_pictures

from callbacks.checkpointing import AtomicCheckpointIO, corruption, find_resume, steps_in
from switti.run_folder import CHECKPOINTS
from switti.sampling.pipeline import SwittiPipeline

STEPS = 32
KILLS = 3
SETTINGS = (
    f"trainer.max_steps={STEPS} trainer.log_every=1 trainer.validate_every=8 trainer.accumulate=2 data.workers=1 "
    "callbacks.checkpoint_every=3 callbacks.keep_last=2 callbacks.samples_every=0 callbacks.metrics_every=0 "
    "callbacks.best_metric=validation/loss callbacks.keep_every=9"
).split()
Rows = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def settings(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Shards with embeddings and a tokenizer's weights, and where runs go."""
    base = tmp_path_factory.mktemp("kill")
    draw_pictures(base / "pictures")
    split = ("--size", 16, "--validation-fraction", 0.3)
    command(root, "experiments.prepare", base / "pictures", "--out", base / "data", *split)
    command(root, "experiments.embed", base / "data")
    data = [
        f"data.train={base}/data/train-*.tar",
        f"data.validation={base}/data/validation-*.tar",
        f"runs_dir={base}/runs",
    ]
    command(root, "experiments.train", "tokenizer/tiny", "trainer.max_steps=1", *data)
    weights = f"tokenizer_weights={base}/runs/single/tiny/tokenizer.safetensors"
    return [*data, weights, f"data.embeddings={base}/data/embeddings", *SETTINGS]


def folder_of(settings: list[str], name: str) -> Path:
    runs = next(item for item in settings if item.startswith("runs_dir=")).removeprefix("runs_dir=")
    return Path(runs) / "single" / name


def start(root: Path, ranks: int, settings: list[str], name: str) -> subprocess.Popen[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    strategy = ["trainer.strategy=fsdp", f"trainer.devices={ranks}"] if ranks > 1 else []
    arguments = ["-m", "experiments.train", "generator/tiny", *settings, *strategy, f"name={name}"]
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        cwd=root, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip


def rows(folder: Path) -> Rows:
    """Values as written, by step and metric. The last line may be half there."""
    if not (folder / "metrics.csv").is_file():
        return {}
    with (folder / "metrics.csv").open() as stream:
        lines = [line for line in csv.reader(stream) if len(line) == 5 and line[0].isdigit()]
    kept = [line for line in lines if not line[2].startswith(("time/", "memory/"))]
    found = {(line[0], line[2]): line[3] for line in kept}
    assert len(found) == len(kept), "a value was logged twice"
    return found


def last_step(folder: Path) -> int:
    record = folder / "metrics.csv"
    if not record.is_file():
        return 0
    return max((int(line.split(",")[0]) for line in record.read_text().splitlines()[1:-1]), default=0)


def kill_later(child: subprocess.Popen[str], folder: Path, steps: int, delay: float) -> int:
    """SIGKILL to all of its processes, `delay` seconds after it has done so many steps more. The step, or -1."""
    begun, deadline = time.time(), time.monotonic() + 300
    before = folder / "metrics.csv"
    first = last_step(folder)
    while child.poll() is None and time.monotonic() < deadline:
        fresh = before.is_file() and before.stat().st_mtime > begun
        if fresh and (reached := last_step(folder)) >= min(first + steps, STEPS - 1):
            time.sleep(delay)
            kill(child)
            return reached
        time.sleep(0.005)
    kill(child)
    return -1


def kill(child: subprocess.Popen[str]) -> None:
    """SIGKILL to it and all that it has started; torchrun gives each rank a session of its own."""
    with suppress(psutil.NoSuchProcess):
        for process in [*(root := psutil.Process(child.pid)).children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    child.communicate()


def content(folder: Path) -> dict[str, Any]:
    path = find_resume(folder)
    assert path is not None and path.name == f"step_{STEPS:06d}.ckpt"
    return AtomicCheckpointIO().load_checkpoint(path)


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{place}[{number}]")


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.distributed)]
)
def test_killed_and_started_again_it_gives_the_same_bits(root: Path, settings: list[str], ranks: int) -> None:
    chance = random.Random(seed := int.from_bytes(os.urandom(4)))
    print(f"seed {seed}")
    whole, cut = (folder_of(settings, f"{name}_{ranks}") for name in ("whole", "cut"))
    output, _ = start(root, ranks, settings, whole.name).communicate(timeout=600)
    assert json.loads((whole / "record.json").read_text())["status"] == "finished", output
    for _ in range(KILLS):
        child = start(root, ranks, settings, cut.name)
        killed_at = kill_later(child, cut, chance.randint(1, STEPS // 4), chance.random() * 0.2)
        left = sorted(path.name for path in (cut / CHECKPOINTS).iterdir())
        print(f"killed at step {killed_at}: {left}")
        for step in steps_in(cut / CHECKPOINTS):  # whatever has its name is whole
            assert corruption(cut / CHECKPOINTS / f"step_{step:06d}.ckpt") is None
    output, _ = start(root, ranks, settings, cut.name).communicate(timeout=600)
    record = json.loads((cut / "record.json").read_text())
    assert record["status"] == "finished", output
    assert rows(cut) == rows(whole)
    found, expected = content(cut), content(whole)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random", "ShardDataModule"):
        assert_same(found[part], expected[part], part)
    for name in (CHECKPOINTS,):
        assert {p.name for p in (cut / name).iterdir()} == {p.name for p in (whole / name).iterdir()}
    check_exported(root, cut, found["state_dict"])


def check_exported(root: Path, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """One plain folder of the checkpoint, which the pipeline reads and draws with; refused if a byte is wrong."""
    out = folder.parent / f"{folder.name}_plain"
    command(root, "experiments.export", folder, "--verify", "--out", out)
    pipeline = SwittiPipeline.from_pretrained(out)
    for name, weight in pipeline.generator.state_dict().items():
        assert torch.equal(weight, state[f"ema_generator.{name}"]), name
    assert pipeline(["a red circle"], seeds=[1], output_type="pt").isfinite().all()
    checkpoint = find_resume(folder)
    assert checkpoint is not None
    largest = max(
        (p for p in [checkpoint, *checkpoint.rglob("*")] if p.is_file()), key=lambda p: p.stat().st_size
    )
    with largest.open("r+b") as stream:
        stream.seek(largest.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    again = out.with_name("refused")
    printed = command(root, "experiments.export", checkpoint, "--verify", "--out", again, code=2)
    assert "cannot be used" in printed and not again.exists()


@pytest.mark.slow
def test_one_run_is_trained_by_one_process(root: Path, settings: list[str]) -> None:
    child = start(root, 1, settings, "twice")
    try:
        deadline = time.monotonic() + 300
        while not rows(folder_of(settings, "twice")) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGSTOP)
        printed = command(root, "experiments.train", "generator/tiny", *settings, "name=twice", code=2)
    finally:
        kill(child)
    assert "is being trained by another process" in printed
