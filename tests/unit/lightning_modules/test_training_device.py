"""A training step on an accelerator: it waits for the device once, for the nonfinite guard, and at no other place."""

from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda, move_to_cuda, on_cuda
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from lightning_modules.config import LossConfig, OptimizerConfig, TrainerConfig
from lightning_modules.generator import GeneratorModule
from lightning_modules.optimization import build_optimizer
from switti.models.config import GeneratorConfig
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE

TOKENIZER = RQVAEConfig(
    scales=[1, 2, 4], codebook_size=32, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
)


def build(visibility: str, monkeypatch: pytest.MonkeyPatch) -> GeneratorModule:
    model = GeneratorConfig(
        visibility=visibility, depth=2, width=32, heads=2, scales=TOKENIZER.scales, codebook_size=32, code_width=8,
        text_width=12, pooled_width=10,
    )  # fmt: skip
    trainer = TrainerConfig(max_steps=4, log_every=1)
    module = GeneratorModule(
        model, RQVAE(TOKENIZER), OptimizerConfig(), LossConfig(), trainer, seed=0, ema=True
    )
    module.configure_model()
    monkeypatch.setattr(GeneratorModule, "global_step", 0)
    return module


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
    module = build(visibility, monkeypatch)
    seeds = torch.zeros(2, dtype=torch.int64)
    with fake_cuda():
        move_to_cuda(module, dtype)
        move_to_cuda(module.tokenizer)
        loss = module.training_step(batch(dtype) | {"seed": seeds}, 0)
        assert loss.device.type == "cuda" and loss.shape == ()


def test_clipping_and_the_optimizer_step_wait_for_the_guard_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("causal", monkeypatch)
    with fake_cuda():
        move_to_cuda(module)
        assert module.generator is not None
        optimizer, scheduler = build_optimizer(module.generator, OptimizerConfig(), 4)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        with pytest.raises(DataDependentOutputException):
            module.nonfinite_guard.settle(norm, parameters)
        optimizer.step()
        scheduler["scheduler"].step()
