"""This implementation against golden tensors of the published one, and proof that the comparison can fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.parity import main
from switti.parity.common import Check
from switti.parity.functions import check_functions
from switti.parity.sampling import check_sampling
from switti.parity.trajectory import check_trajectory
from switti.parity.transformer import check_variant
from switti.parity.vae import check_vae
from switti.sampling import filters

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "parity"
FOLDER = SHARED if (SHARED / "meta.json").is_file() else ROOT / "tests" / "data" / "parity"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text())


def assert_passed(checks: list[Check]) -> None:
    assert checks
    assert [f"{c.quantity}: {c.deviation:.2e} > {c.tolerance:.0e}" for c in checks if not c.passed] == []


@pytest.mark.parametrize("variant", META["switti"])
def test_transformer(variant: str) -> None:
    assert_passed(check_variant(FOLDER, META, variant))


def test_tokenizer() -> None:
    assert_passed(check_vae(FOLDER, META))


def test_functions() -> None:
    assert_passed(check_functions(FOLDER, META))


def test_optimiser_trajectory() -> None:
    assert_passed(check_trajectory(FOLDER, META))


def test_sampling() -> None:
    assert_passed(check_sampling(FOLDER, META))


def test_the_variant_matters_to_the_comparison() -> None:
    """The causal expectation is not met by the non-causal model: the comparison sees the variant."""
    meta = {**META, "switti": dict(META["switti"])}
    io = load_file(FOLDER / "switti_swiglu_ar.io.safetensors")
    other = load_file(FOLDER / "switti_swiglu_nonar.io.safetensors")
    assert not torch.allclose(io["out.logits"], other["out.logits"], atol=0.1)
    checks = check_variant(FOLDER, meta, "swiglu_ar")
    names = {check.quantity for check in checks}
    assert "switti_swiglu_ar.out.logits" in names and "switti_swiglu_ar.out.block.0.self_attn" in names


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
    original = filters.kept_tokens

    def lenient(logits: torch.Tensor, top_k: int, top_p: float, rounded: bool = False) -> torch.Tensor:
        return original(logits, top_k, min(1.0, top_p + 0.02), rounded)

    monkeypatch.setattr(filters, "kept_tokens", lenient)
    assert any(not check.passed for check in check_functions(FOLDER, META))
