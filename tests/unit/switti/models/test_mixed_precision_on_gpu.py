"""What a GPU keeps for the backward pass under autocast is what a plan, which is traced on the CPU, counts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda, move_to_cuda, on_cuda
from torch import Tensor

from switti.models.config import GeneratorConfig
from switti.models.norm import RMSNorm, unit_layer_norm, unit_rms_norm
from switti.models.transformer import ScaleTransformer

CONFIG = GeneratorConfig(
    depth=2, width=64, heads=2, scales=[1, 2, 3, 4, 6], codebook_size=32, code_width=8, text_width=12, pooled_width=10
)  # fmt: skip


class FusedAttention(torch.autograd.Function):
    """Keeps what fused kernels keep; a GPU that is feigned is given the unfused formulation."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return FusedAttention.apply(*(t.to(torch.bfloat16) for t in (q, k, v)))


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """torch.autocast switches itself off where there is no GPU; what it sets does not."""
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()


def kept_bytes(model: ScaleTransformer, device: str) -> int:
    """Size of all tensors that the forward pass keeps, but for the parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    batch, length = 16, model.pyramid.length
    inputs = (
        torch.empty(batch, length - 1, 8), torch.empty(batch, 5, 12), torch.ones(batch, 5, dtype=torch.bool),
        torch.empty(batch, 10), torch.zeros(batch, 4, dtype=torch.int64),
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device):
        model(*(on_cuda(tensor) if device == "cuda" else tensor for tensor in inputs))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("norms", ["sandwich", "pre"])
def test_a_gpu_keeps_what_is_planned(visibility: str, norms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    config = GeneratorConfig(**{**vars(CONFIG), "visibility": visibility, "norms": norms})
    model = ScaleTransformer(config, backend="fused")
    planned = kept_bytes(model, "cpu")
    with fake_cuda():
        on_gpu = kept_bytes(move_to_cuda(model), "cuda")
    assert on_gpu == pytest.approx(planned, rel=0.05)


def test_norms_keep_the_type_of_their_input_on_a_gpu() -> None:
    """And with it the kernel's statistics in float32; a gain in float32 widens the result, as on a CPU."""
    norm = RMSNorm(8)
    with fake_cuda(), autocast("cuda"):
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="cuda")
        assert torch.nn.functional.layer_norm(x, (8,)).dtype == torch.float32
        assert unit_layer_norm(x).dtype == unit_rms_norm(x).dtype == torch.bfloat16
        assert move_to_cuda(norm)(x).dtype == torch.float32
