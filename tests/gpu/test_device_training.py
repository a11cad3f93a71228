"""Training on a device: exact resume, EMA, activation norms, the CPU's losses up to rounding."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="training needs the package lightning")
from generator_cases import fit, module

from callbacks.activation_norms import ActivationNorms
from callbacks.ema import ExponentialMovingAverage
from callbacks.rng_state import read_random_state, set_random_state

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu"}


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_losses_are_the_cpus_up_to_rounding(tmp_path: Path, device: str, visibility: str) -> None:
    expected = fit(module(visibility=visibility), tmp_path / "cpu").losses
    actual = fit(module(visibility=visibility), tmp_path / device, accelerator=ACCELERATORS[device]).losses
    assert actual == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, device: str, precision: str) -> None:
    """Deterministic kernels: otherwise a GPU adds in another order each time."""
    accelerator = ACCELERATORS[device]

    def callbacks() -> tuple:
        return ExponentialMovingAverage(0.9), ActivationNorms(every=2)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        full, resumed = module(precision=precision), module(precision=precision)
        fit(full, tmp_path / "full", callbacks=callbacks(), accelerator=accelerator)
        first = module(precision=precision)
        fit(first, tmp_path / "parts", stop_after=3, callbacks=callbacks(), accelerator=accelerator)
        checkpoint = tmp_path / "parts" / "checkpoints" / "step_000003.ckpt"
        fit(resumed, tmp_path / "parts", resume=checkpoint, callbacks=callbacks(), accelerator=accelerator)
    finally:
        torch.use_deterministic_algorithms(False)
    expected, actual = full.state_dict(), resumed.state_dict()
    assert any(key.startswith("ema_generator") for key in expected)
    assert all(torch.equal(expected[key].cpu(), actual[key].cpu()) for key in expected)
    metrics = (tmp_path / "parts" / "metrics.csv").read_text()
    assert "norms/last/mean" in metrics and "train/loss_by_scale/0" in metrics


def test_random_streams_of_the_device_are_part_of_the_state(device: str) -> None:
    """What is drawn on the device after a resume is what would have been drawn."""
    place = torch.device(device)
    torch.manual_seed(3)
    torch.rand(5, device=place)
    state = read_random_state(place)
    assert ("cuda" in state) == (device == "cuda")
    expected = torch.rand(7, device=place), torch.rand(3)
    torch.manual_seed(4)
    torch.rand(11, device=place)
    set_random_state(state, place)
    assert torch.equal(torch.rand(7, device=place), expected[0])
    assert torch.equal(torch.rand(3), expected[1])


@pytest.mark.parametrize("precision, tolerance", [("32-true", 2e-3), ("bf16-mixed", 0.06)])
def test_ema_and_norms_are_the_cpus_up_to_rounding(
    tmp_path: Path, device: str, precision: str, tolerance: float
) -> None:
    def run(name: str, accelerator: str) -> tuple[dict[str, torch.Tensor], list[float]]:
        built, folder = module(precision=precision), tmp_path / name
        callbacks = ExponentialMovingAverage(0.9), ActivationNorms(every=2)
        fit(built, folder, callbacks=callbacks, accelerator=accelerator)
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        norms = [float(row[3]) for row in rows if row[2] == "norms/last/max"]
        assert built.ema_generator is not None
        return {key: value.cpu() for key, value in built.ema_generator.state_dict().items()}, norms

    (expected, norms), (actual, device_norms) = run("first", "cpu"), run("second", ACCELERATORS[device])
    assert len(norms) == 3
    assert device_norms == pytest.approx(norms, rel=tolerance)
    for name, weight in expected.items():
        # A mean: AdamW takes a full step where a gradient is nearly zero, whichever sign rounding gives it.
        error = (actual[name] - weight).abs().mean() / weight.abs().mean().clamp_min(1e-3)
        assert error < tolerance, name
