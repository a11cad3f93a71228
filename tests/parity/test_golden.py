"""This implementation against golden tensors of the published one, and proof that the comparison can fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.parity.common import Golden
from benchmarks.parity.folder import compare
from benchmarks.parity.functions import check_functions
from benchmarks.parity.sampling import check_sampling
from benchmarks.parity.trajectory import check_trajectory
from benchmarks.parity.transformer import check_variant
from benchmarks.parity.vae import check_vae
from experiments.parity import main
from switti.sampling import filters

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "parity"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text())


def assert_passed(golden: Golden) -> None:
    """Everything in the folder was compared, and nothing is out of tolerance."""
    assert golden.checks
    assert [f"{c.quantity}: {c.deviation:.2e} > {c.tolerance:.0e} {c.reason}" for c in golden.failed] == []
    assert (golden.absent, golden.blocked, golden.unknown) == ({}, [], {})


@pytest.mark.parametrize("variant", META["switti"])
def test_transformer(variant: str) -> None:
    golden = Golden.open(FOLDER)
    check_variant(golden, variant)
    assert_passed(golden)


@pytest.mark.parametrize("check", [check_vae, check_functions, check_trajectory, check_sampling])
def test_part(check: Callable[[Golden], None]) -> None:
    golden = Golden.open(FOLDER)
    check(golden)
    assert_passed(golden)


def test_gelu_variants() -> None:
    """A folder that holds them alone, with few of their tensors."""
    golden = compare(ROOT / "tests" / "data" / "parity_gelu")
    assert golden.failed == [] and golden.blocked == []
    names = {check.quantity for check in golden.checks}
    assert {
        "switti_gelu_ar.out.logits",
        "switti_gelu_nonar.out.logits",
        "switti_gelu_ar.grad_l2.head.bias",
    } <= names


@pytest.mark.parametrize("variant", ["swiglu_ar", "swiglu_nonar"])
def test_a_model_does_not_meet_the_other_variants_expectations(variant: str, tmp_path: Path) -> None:
    """Each model against what the published model of the other variant computes from the same inputs and weights."""
    other = {"swiglu_ar": "swiglu_nonar", "swiglu_nonar": "swiglu_ar"}[variant]
    for path in FOLDER.glob("*.safetensors"):
        (tmp_path / path.name.replace(other, variant)).symlink_to(path) if other in path.name else None
    (tmp_path / "switti_swiglu.weights.safetensors").symlink_to(FOLDER / "switti_swiglu.weights.safetensors")
    golden = Golden.open(tmp_path, META)
    check_variant(golden, variant)
    checks = {check.quantity: check for check in golden.checks}
    for name in (
        "buffer.attn_bias_for_masking",
        "out.block.0.self_attn",
        "out.block.1",
        "out.logits",
        "out.loss",
    ):
        assert not checks[f"switti_{variant}.{name}"].passed, name
    # What comes before the first attention is the same in both.
    for name in ("out.cond", "out.x_in", "out.crop_coords", "buffer.lvl_1L"):
        assert checks[f"switti_{variant}.{name}"].passed, name


def test_command_reports_a_wrong_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One weight off by 1 % fails the command."""
    for path in FOLDER.glob("*.safetensors"):
        (tmp_path / path.name).symlink_to(path)
    meta = {
        key: value for key, value in META.items() if key not in ("sampling", "vae", "functions", "trajectory")
    }
    meta["switti"] = {"swiglu_nonar": META["switti"]["swiglu_nonar"]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert main([str(tmp_path)]) == 0
    weights = load_file(tmp_path / "switti_swiglu.weights.safetensors")
    weights["blocks.0.ffn.up_proj.weight"][0] *= 1.01
    (tmp_path / "switti_swiglu.weights.safetensors").unlink()
    save_file(weights, tmp_path / "switti_swiglu.weights.safetensors")
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    assert "failed: switti_swiglu_nonar.out.logits" in capsys.readouterr().out


def test_a_wrong_filter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nucleus a little too large is noticed."""
    original = filters._kept_on_cpu

    def lenient(
        logits: torch.Tensor, top_k: int, top_p: float, rounded: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        return original(logits, top_k, min(1.0, top_p + 0.02), rounded)

    monkeypatch.setattr(filters, "_kept_on_cpu", lenient)
    golden = Golden.open(FOLDER)
    check_functions(golden)
    assert golden.failed
