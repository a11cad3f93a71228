"""A training step on an accelerator: it waits for the device once, for the nonfinite guard, and at no other place."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda, move_to_cuda, on_cuda
from generator_cases import module
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from callbacks.activation_norms import ActivationNorms
from lightning_modules.config import OptimizerConfig
from lightning_modules.generator import GeneratorModule
from lightning_modules.optimization import build_optimizer


def build(visibility: str, monkeypatch: pytest.MonkeyPatch) -> GeneratorModule:
    built = module(steps=4, visibility=visibility)
    built.configure_model()
    monkeypatch.setattr(GeneratorModule, "global_step", 0)
    return built


def batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "image": on_cuda(torch.empty(2, 3, 8, 8)),
        "crop": on_cuda(torch.zeros(2, 4, dtype=torch.int64)),
        "text": on_cuda(torch.empty(2, 5, 12), dtype),
        "text_mask": on_cuda(torch.ones(2, 5, dtype=torch.bool)),
        "pooled": on_cuda(torch.empty(2, 10), dtype),
    }


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_does_not_wait(
    visibility: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, latent noise, logits and what is logged of them."""
    built = build(visibility, monkeypatch)
    seeds = torch.zeros(2, dtype=torch.int64)
    with fake_cuda():
        move_to_cuda(built, dtype)
        move_to_cuda(built.tokenizer)
        loss = built.training_step(batch(dtype) | {"seed": seeds}, 0)
        assert loss.device.type == "cuda" and loss.shape == ()


def test_activation_norms_stay_on_the_device_until_they_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """And steps without them have no hooks."""
    built, norms = build("causal", monkeypatch), ActivationNorms(every=2)
    seeds = torch.zeros(2, dtype=torch.int64)
    with fake_cuda():
        move_to_cuda(built)
        move_to_cuda(built.tokenizer)
        for step, expected in ((0, 0), (1, 2)):
            norms.on_train_batch_start(SimpleNamespace(global_step=step), built)  # type: ignore[arg-type]
            built.training_step(batch(torch.float32) | {"seed": seeds}, 0)
            assert len(norms._norms) == len(norms._handles) == expected
        assert all(value.device.type == "cuda" for pair in norms._norms.values() for value in pair)


def test_clipping_and_the_optimizer_step_wait_for_the_guard_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("causal", monkeypatch)
    with fake_cuda():
        move_to_cuda(built)
        assert built.generator is not None
        optimizer, scheduler = build_optimizer(built.generator, OptimizerConfig(), 4)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        with pytest.raises(DataDependentOutputException):
            built.nonfinite_guard.settle(norm, parameters)
        optimizer.step()
        scheduler["scheduler"].step()
