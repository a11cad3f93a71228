"""A run that its objective's dynamics stop, as a user runs it: kill -9, resume, the same command again, a longer run.

Also what status, report and sweep make of it, for generators, tokenizers and decoders.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from story_command import command
from story_images import draw_pictures

from switti.run_folder import metric_values

pytestmark = pytest.mark.slow
GROUP = "callbacks.objective_dynamics"
RULE = [f"{GROUP}.criterion=dvar", f"{GROUP}.window=12", f"{GROUP}.threshold=0.3"]
LENGTH = [
    "trainer.max_steps=120",
    "trainer.log_every=1",
    "callbacks.checkpoint_every=3",
    "trainer.validate_every=50",
]


@pytest.fixture(scope="module")
def data(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("early")
    draw_pictures(base / "pictures")
    split = ("--size", 16, "--validation-fraction", 0.3)
    command(root, "experiments.prepare", base / "pictures", "--out", base / "data", *split)
    command(root, "experiments.embed", base / "data")
    places = [f"data.{name}={base}/data/{name}-*.tar" for name in ("train", "validation")]
    places.append(f"runs_dir={base}/runs")
    command(root, "experiments.train", "tokenizer/tiny", *places, *LENGTH, *RULE)
    return [
        *places, f"tokenizer_weights={base}/runs/single/tiny/tokenizer.safetensors",
        f"data.embeddings={base}/data/embeddings", "callbacks.samples_every=0", "callbacks.metrics_every=0",
    ]  # fmt: skip


def folder_of(data: list[str], name: str, study: str = "single") -> Path:
    runs = next(item for item in data if item.startswith("runs_dir=")).removeprefix("runs_dir=")
    return Path(runs) / study / name


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def kill_at(root: Path, arguments: list[str], folder: Path, step: int) -> None:
    """SIGKILL as soon as the objective of that step is logged."""
    child = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *arguments], cwd=root, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    try:
        while child.poll() is None and time.monotonic() < deadline:
            if (folder / "metrics.csv").is_file() and step in metric_values(folder, f"{GROUP[10:]}/loss"):
                break
            time.sleep(0.01)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_killed_it_stops_at_the_same_step_and_stays_stopped(root: Path, data: list[str]) -> None:
    whole, cut = folder_of(data, "whole"), folder_of(data, "cut")
    settings = ["generator/tiny", *data, *LENGTH, *RULE]
    command(root, "experiments.train", *settings, "name=whole")
    stop = record_of(whole)["early_stop"]
    assert 12 <= stop["step"] < 100 and record_of(whole)["status"] == "finished"
    for step in (1, 8, stop["step"]):
        kill_at(root, [*settings, "name=cut"], cut, step)
    command(root, "experiments.train", *settings, "name=cut")
    assert record_of(cut)["early_stop"] == stop and record_of(cut)["step"] == stop["step"]
    for name in ("loss", "ratio"):
        values = metric_values(whole, f"objective_dynamics/{name}")
        assert metric_values(cut, f"objective_dynamics/{name}") == values
        assert sorted(values) == list(range(stop["step"] + 1))
    lines = (cut / "metrics.csv").read_text().splitlines()
    assert sum(",objective_dynamics/loss," in line for line in lines) == stop["step"] + 1
    again = command(root, "experiments.train", *settings, "name=cut")
    assert f"is finished at step {stop['step']} ({stop['reason']})" in again

    longer = [item.replace("max_steps=120", "max_steps=126") for item in settings]
    command(root, "experiments.train", *longer, "name=cut")
    assert record_of(cut)["step"] == 126 and "early_stop" not in record_of(cut)
    assert sorted(metric_values(cut, "objective_dynamics/ratio")) == list(range(127))


def test_a_changed_interval_is_refused_on_resume_and_another_threshold_is_not(
    root: Path, data: list[str]
) -> None:
    settings = ["generator/tiny", *data, *LENGTH, *RULE, "name=changed"]
    kill_at(root, settings, folder_of(data, "changed"), 8)
    printed = command(root, "experiments.train", *settings, f"{GROUP}.every=2", code=2)
    assert f"{GROUP}.every=2 (the run has 1)" in printed
    command(root, "experiments.train", *settings, f"{GROUP}.threshold=0.9")
    stop = record_of(folder_of(data, "changed"))["early_stop"]
    assert 12 <= stop["step"] < record_of(folder_of(data, "whole"))["early_stop"]["step"]


def test_a_study_of_them_is_finished_shown_and_reported(root: Path, data: list[str], tmp_path: Path) -> None:
    sweep = [
        "base=generator/tiny", "study=rules", f"vary.{GROUP}.criterion=[dvar,clip_s]", *data, *LENGTH, *RULE[1:],
        f"{GROUP}.patience=1", f"{GROUP}.margin=0.5",
    ]  # fmt: skip
    command(root, "experiments.sweep", *sweep)
    folder = folder_of(data, "", "rules")
    assert "2 finished" in command(root, "experiments.sweep", *sweep)
    shown = command(root, "experiments.status", folder, "--once")
    assert shown.count("stopped early at step") == 2 and "2 scores in a row without" in shown
    command(root, "experiments.compare", folder, "--out", tmp_path / "report")
    report = (tmp_path / "report" / "report.md").read_text()
    assert "Stopped early: " in report and "of 120 (dvar: ratio" in report


def test_tokenizers_and_decoders_stop_as_well(root: Path, data: list[str]) -> None:
    tokenizer = folder_of(data, "tiny")
    assert (
        record_of(tokenizer)["early_stop"]["step"] < 120 and (tokenizer / "tokenizer.safetensors").is_file()
    )
    decoder = ["task=decoder", "decoder.lpips=0", "decoder.adversarial=0", "name=decoder"]
    own = [item for item in data if "embeddings" not in item]
    command(root, "experiments.train", "tokenizer/tiny", *own, *LENGTH, *RULE, *decoder)
    assert record_of(folder_of(data, "decoder"))["early_stop"]["step"] < 120
