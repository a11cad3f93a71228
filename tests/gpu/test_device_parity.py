"""Golden tensors of the published implementation on a device: float32 to tolerance, bfloat16 to its rounding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.parity.common import FEATURE_TOLERANCE, Golden, TensorFile
from benchmarks.parity.sampling import check_case
from benchmarks.parity.transformer import golden_tokens, load_golden_transformer, teacher_forced_inputs
from benchmarks.parity.vae import build_vae
from switti.losses.cross_entropy import token_losses

FOLDER = Path(__file__).parents[1] / "data" / "parity"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text())
VARIANTS = ["swiglu_ar", "swiglu_nonar"]
# Sums in another order than the CPU's.
ON_A_DEVICE = 3


def opened(variant: str) -> tuple[Golden, TensorFile, nn.Module]:
    golden = Golden.open(FOLDER)
    model = load_golden_transformer(golden, "switti_swiglu", variant.endswith("_ar"))
    return golden, golden.tensors(f"switti_{variant}.io.safetensors", ""), model


def logits_of(model: nn.Module, io: TensorFile, device: str) -> Tensor:
    return model.to(device)(*(tensor.to(device) for tensor in teacher_forced_inputs(io)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients_in_float32(device: str, variant: str) -> None:
    _, io, model = opened(variant)
    logits = logits_of(model, io, device)
    torch.testing.assert_close(
        logits.detach().cpu(), io["out.logits"], rtol=0, atol=ON_A_DEVICE * FEATURE_TOLERANCE
    )
    loss = token_losses(logits, golden_tokens(io, model.pyramid.count).to(device)).mean()
    assert loss.item() == pytest.approx(io["out.loss"].item(), rel=1e-5)
    loss.backward()
    expected = META["switti"][variant]["grad_l2"]
    floor = 1e-4 * max(norm for norm in expected.values() if norm is not None)
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        off = abs(parameter.grad.norm().item() - expected[name]) / max(expected[name], floor)
        assert off < 5e-3, f"{name}: {off:.1e}"


@pytest.mark.parametrize("weights", ["autocast", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_bfloat16(device: str, variant: str, weights: str) -> None:
    """As in training (autocast, head in float32) and as in sampling (bfloat16 weights)."""
    _, io, model = opened(variant)
    model = model.to(torch.bfloat16) if weights == "bfloat16" else model
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=weights == "autocast"):
        logits = logits_of(model, io, device)
    expected = io["out.logits"]
    assert logits.dtype == (torch.float32 if weights == "autocast" else torch.bfloat16)
    error = (logits.cpu().float() - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.03
    other = Golden.open(FOLDER).tensors(f"switti_{({*VARIANTS} - {variant}).pop()}.io.safetensors", "")
    # Rounding is smaller than what the variants differ by.
    assert error < 0.3 * (other["out.logits"] - expected).square().mean().sqrt() / expected.std()


@pytest.mark.parametrize("name", sorted(META["sampling"]["cases"]))
def test_sampling_cases(device: str, name: str) -> None:
    """Tokens are equal, logits, latents and images within tolerance, with the published noise."""
    golden = Golden.open(FOLDER)
    vae = build_vae(golden).to(device)
    pool = golden.tensors("sampling_prompts.safetensors", "")
    file = golden.tensors(f"sampling_{name.split('/')[0]}.safetensors", "")
    check_case(golden, vae, pool, file, name)
    assert golden.checks
    wrong = [c for c in golden.checks if not c.deviation <= ON_A_DEVICE * c.tolerance]
    assert [f"{c.quantity}: {c.deviation:.1e} > {c.tolerance:.0e} {c.reason}" for c in wrong] == []


def test_tokens_of_the_golden_images(device: str) -> None:
    golden = Golden.open(FOLDER)
    vae, io = build_vae(golden).to(device), golden.tensors("vae.io.safetensors", "")
    with torch.no_grad():
        tokens = vae.tokenize(io["image"].to(device)).cpu()
    count = vae.pyramid.count
    assert torch.equal(tokens, torch.cat([io[f"idx.{k}"] for k in range(count)], dim=1))
