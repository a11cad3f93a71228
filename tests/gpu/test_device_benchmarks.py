"""Measuring on a device: the quick benchmark, its peaks, and a real step's memory against its plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("omegaconf", reason="commands need the package omegaconf")
from benchmarks.measure import machine, matmul_peak, peak_bytes


def hidden(device: str) -> dict[str, str]:
    """Environment in which commands, which take a GPU where there is one, take this device."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


@pytest.mark.slow
def test_the_quick_benchmark_runs_and_names_the_device(device: str, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "experiments.bench", "--quick", "--only", "train,sample,tokenizer"]
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=root, env=hidden(device), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    last = done.stdout.splitlines()[-2]
    name = torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"]
    assert last.startswith(name) and "GB at the most" in last
    assert (content["machine"]["gpu"] is not None) == (device == "cuda")
    assert content["raw"]["matmul_peak.bfloat16"] > 1e9
    by_scale = content["raw"]["sample.512.causal.full.seconds_per_scale"]
    total = content["raw"]["sample.512.causal.full.seconds"]
    # Scales are timed when the device has finished them, so that they add up to the call.
    assert 0.3 * total < sum(by_scale) < 1.5 * total
    assert content["raw"]["train.512.causal.ours.peak_bytes"] > 10**6


def test_peak_memory_is_that_of_the_device(device: str) -> None:
    size = 64 * 2**20
    chosen = torch.device(device)
    used = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8, device=chosen).amax(), chosen)
    assert 0.8 * size < used < 2.5 * size


@pytest.mark.slow
def test_the_peak_of_products_does_not_depend_on_how_long_it_is_looked_for(device: str) -> None:
    """It is warm when it is measured."""
    chosen = torch.device(device)
    size = 512 if device == "cpu" else None
    short, longer = (matmul_peak(torch.float32, chosen, size, seconds) for seconds in (0.1, 0.4))
    assert short == pytest.approx(longer, rel=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        ["data.batch_size=32"],
        pytest.param(["data.batch_size=32", "trainer.checkpointing=true"], marks=pytest.mark.slow),
        pytest.param(["data.batch_size=16", "model.visibility=causal"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_memory_is_what_was_planned(device: str, settings: list[str], tmp_path: Path, root: Path) -> None:
    """Within 10 %: the allocator's peak on a GPU, the process's resident size on a CPU."""
    if device == "cpu":
        pytest.skip("tests/unit/benchmarks/test_cost_model.py measures it on the CPU")
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "experiments.plan", "generator/demo", *settings, "--measure"]
    done = subprocess.run([*command, "--json", str(out)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())["measured"]
    assert measured["peak"] == pytest.approx(measured["planned_peak"], rel=0.1)
    assert measured["operations"] == pytest.approx(measured["planned_operations"], rel=0.1)
