"""Sweeps whose runs really train: as jobs of a cluster, in several ranks here, as trials of a search; also stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_slurm import install
from story_command import command
from story_images import draw_pictures

from sweeps.run_state import state_of
from switti.files import read_json
from switti.run_folder import QUEUED, metric_values

SETTINGS = [
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
    *(f"{name}=4" for name in ("trainer.validate_every", "callbacks.checkpoint_every")),
    *(f"callbacks.{name}_every=0" for name in ("samples", "metrics", "activation_norms")),
]
SECONDS = 600  # at most; a few minutes where the cores are busy


@pytest.fixture(scope="module")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, embeddings and a tokenizer's weights."""
    base = tmp_path_factory.mktemp("sweeps")
    draw_pictures(base / "pictures")
    split = ("--size", 16, "--validation-fraction", 0.3)
    command(root, "experiments.prepare", base / "pictures", "--out", base / "data", *split)
    command(root, "experiments.embed", base / "data")
    command(root, "experiments.train", "tokenizer/tiny", "trainer.max_steps=1", *shards(base))
    return base


def shards(base: Path) -> list[str]:
    data = f"{base}/data"
    return [
        f"data.train={data}/train-*.tar",
        f"data.validation={data}/validation-*.tar",
        f"runs_dir={base}/runs",
    ]


class Sweeps:
    """Drivers of studies over `base`, as commands of their own; what is left of them is killed in the end."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.base, self.environment = root, base, {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        self.drivers: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        settings = [*shards(self.base), f"data.embeddings={self.base}/data/embeddings", *SETTINGS]
        driver = subprocess.Popen(
            [sys.executable, "-m", "experiments.sweep", "base=generator/tiny", *settings, *words],
            cwd=self.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.drivers.append(driver)
        return driver

    def run(self, *words: str) -> tuple[int, str]:
        driver = self.start(*words)
        text, _ = driver.communicate(timeout=SECONDS)
        return driver.returncode, text

    @property
    def weights(self) -> str:
        return f"{self.base}/runs/single/tiny/tokenizer.safetensors"

    def folder(self, study: str, run: str = "") -> Path:
        return self.base / "runs" / study / run

    def processes(self) -> list[psutil.Process]:
        """All that train below `base`."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if f"runs_dir={self.base}/runs" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@pytest.fixture
def sweeps(root: Path, base: Path) -> Iterator[Sweeps]:
    sweeps = Sweeps(root, base)
    yield sweeps
    for process in sweeps.processes():
        process.kill()


def wait_for(condition: Callable[[], Any], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_step(folder: Path) -> int:
    return max(metric_values(folder, "validation/loss"), default=0)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_jobs_of_two_tasks_outlive_their_time_limit(sweeps: Sweeps, strategy: str, tmp_path: Path) -> None:
    """One of two jobs of an array is told to leave, saves, is queued again and goes on; the other fails."""
    programs = install(tmp_path / "cluster")
    sweeps.environment |= {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE_SLURM": str(tmp_path / "cluster"),
    }
    name, lost = f"slurm_{strategy}", tmp_path / "lost.safetensors"
    words = [
        f"study={name}", "--launcher", "slurm", "trainer.devices=2", f"trainer.strategy={strategy}",
        f"vary.tokenizer_weights=[{sweeps.weights},{lost}]", "trainer.max_steps=32",
    ]  # fmt: skip
    driver = sweeps.start(*words)
    wait_for(lambda: sweeps.folder(name).is_dir() and list(sweeps.folder(name).glob("*/metrics.csv")), driver)
    (folder,) = (path.parent for path in sweeps.folder(name).glob("*/metrics.csv"))
    wait_for(lambda: last_step(folder) >= 4, driver)
    job = read_json(folder / QUEUED)["job"]
    subprocess.run(["scancel", "--signal=USR2", job], env=sweeps.environment, check=True)
    text, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 1, text
    assert re.search(rf"failed: tokenizer_weights={lost}: no such file", text)
    assert f"    error: tokenizer_weights={lost}" in text  # its last lines
    record = read_json(folder / "record.json")
    assert (record["status"], record["step"], record["world_size"]) == ("finished", 32, 2)
    assert len(record["resumed"]) == 1 and record["resumed"][0] < 32
    assert len(list((tmp_path / "cluster" / "scripts").iterdir())) == 1  # the queue's doing, no other job

    lost.write_bytes(Path(sweeps.weights).read_bytes())
    code, text = sweeps.run(*words)
    assert code == 0 and "2 finished (1 before)" in text
    assert read_json(folder / "record.json") == record
    code, text = sweeps.run(*words)
    assert code == 0 and "2 finished (2 before)" in text


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_ctrl_c_saves_runs_of_two_ranks(sweeps: Sweeps, strategy: str) -> None:
    name = f"local_{strategy}"
    words = [
        f"study={name}", "--jobs", "2", "trainer.devices=2", f"trainer.strategy={strategy}", "vary.seed=[0,1]",
        f"tokenizer_weights={sweeps.weights}", "trainer.max_steps=24",
    ]  # fmt: skip
    driver = sweeps.start(*words)
    folders = [sweeps.folder(name, f"seed={seed}") for seed in (0, 1)]
    wait_for(lambda: min(map(last_step, folders)) >= 4, driver)
    driver.send_signal(signal.SIGINT)
    text, _ = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 130, text
    assert sweeps.processes() == []
    assert "seed=0 was interrupted" in text or "seed=1 was interrupted" in text
    steps = {folder: read_json(folder / "record.json")["step"] for folder in folders}
    assert {state_of(folder) for folder, step in steps.items() if step < 24} == {"interrupted"}
    code, text = sweeps.run(*words)
    assert code == 0, text
    for folder, step in steps.items():
        record = read_json(folder / "record.json")
        assert (record["status"], record["step"]) == ("finished", 24)
        assert record["resumed"] == ([step] if step < 24 else [])


@pytest.mark.slow
def test_a_killed_search_goes_on_and_gives_up_what_is_not_worth_it(sweeps: Sweeps) -> None:
    """Learning rates of which the second learns nothing; the driver and its run are killed in the first trial."""
    words = [
        "study=search", "search.space={optimizer.learning_rate: [0.01, 1.0e-9]}", "search.sampler=grid",
        "search.pruner=median", "search.startup_trials=1", f"tokenizer_weights={sweeps.weights}",
        "trainer.max_steps=300", "trainer.validate_every=20", "callbacks.checkpoint_every=20",
    ]  # fmt: skip
    driver = sweeps.start(*words)
    wait_for(lambda: list(sweeps.folder("search").glob("trial_0000*/record.json")), driver)
    first = next(sweeps.folder("search").glob("trial_0000*"))
    wait_for(lambda: last_step(first) >= 40, driver)
    driver.kill()
    os.kill(read_json(first / "record.json")["pid"], signal.SIGKILL)
    driver.communicate()

    code, text = sweeps.run(*words)
    assert code == 0, text
    assert "1 finished, 1 pruned" in text
    record = read_json(first / "record.json")
    assert (record["status"], record["step"]) == ("finished", 300) and record["resumed"][0] >= 20
    second = next(sweeps.folder("search").glob("trial_0001*"))
    assert state_of(second) == "pruned"
    assert read_json(second / "record.json")["step"] < 300
    saved = json.dumps([path.stat().st_mtime_ns for path in sorted(second.rglob("*"))])
    code, text = sweeps.run(*words)
    assert code == 0 and "1 finished, 1 pruned" in text
    assert json.dumps([path.stat().st_mtime_ns for path in sorted(second.rglob("*"))]) == saved
