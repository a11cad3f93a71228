"""Training on a device: exact resume, EMA, activation norms, the CPU's losses up to rounding."""

from pathlib import Path

import pytest
import torch
from generator_cases import fit, module

from callbacks.activation_norms import ActivationNorms
from callbacks.ema import ExponentialMovingAverage

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
