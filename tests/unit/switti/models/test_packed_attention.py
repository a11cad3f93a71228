"""All scales in one call of the variable-length kernel, and where it is chosen."""

from typing import Any, get_args, get_type_hints

import pytest
import torch
from fake_cuda import fake_cuda, move_to_cuda, on_cuda
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformer_cases import inputs, model

from lightning_modules.config import TrainerConfig
from switti.errors import UserError
from switti.models import kernels, transformer
from switti.models.kernels import Backend, attends_packed
from switti.models.packed_attention import Packing, Prefixes
from switti.models.transformer import ScaleTransformer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
VARIANTS = ("causal", "non_causal")


def attention_of_sequences(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int
) -> Tensor:
    """What the kernel computes, by its documentation: each sequence by itself, without a mask."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    sizes_q, sizes_k = (starts.diff().tolist() for starts in (starts_q, starts_k))
    assert (max(sizes_q), max(sizes_k)) == (longest_q, longest_k) and len(sizes_q) == len(sizes_k)
    parts = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True)
    width = q.shape[-1]
    return torch.cat(
        [
            torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", a, b) * width**-0.5).softmax(-1), c)
            for a, b, c in parts
        ]
    )


def gradients(built: ScaleTransformer) -> list[Tensor]:
    built.zero_grad()
    logits = built(**inputs())
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in built.parameters() if p.grad is not None)]


@pytest.mark.parametrize("visibility", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_scales_give_the_logits_and_gradients_of_single_calls(
    visibility: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, calls = model(visibility=visibility).train(), []
    built.checkpointing = checkpointing
    expected = gradients(built)
    monkeypatch.setattr(transformer, "attends_packed", lambda *_: True)
    monkeypatch.setattr(
        kernels,
        "varlen_attn",
        lambda *a: calls.append(1) or attention_of_sequences(*a),  # type: ignore[func-returns-value]
    )
    actual = gradients(built)
    assert len(calls) == built.config.depth * (2 if checkpointing else 1)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_keys_of_a_causal_model_are_the_prefixes() -> None:
    spans = ((0, 1), (1, 5), (5, 14))
    packing = Packing.of(spans, "causal", 2, CPU)
    assert packing.queries.tolist() == [0, 1, 5, 14, 15, 19, 28]
    assert packing.keys.tolist() == [0, 1, 6, 20, 21, 26, 40]
    assert (packing.longest_query, packing.longest_key, packing.prefixes) == (9, 14, (1, 5, 14))
    alone = Packing.of(spans, "non_causal", 2, CPU)
    assert torch.equal(alone.keys, alone.queries) and alone.prefixes is None
    x = torch.randn(2, 14, 3, dtype=torch.float64, requires_grad=True)
    assert Prefixes.apply(x, packing.prefixes).shape == (2, 20, 3)
    assert torch.autograd.gradcheck(lambda x: Prefixes.apply(x, (1, 5, 14)), x)


@pytest.mark.parametrize("visibility", VARIANTS)
def test_a_forward_pass_on_a_device_takes_the_kernel_once_a_block(
    visibility: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, types and devices of PyTorch's own operator."""
    calls: list[tuple[Any, ...]] = []
    kernel = kernels.varlen_attn
    monkeypatch.setattr(kernels, "varlen_attn", lambda *a: (calls.append(a), kernel(*a))[1])
    built = ScaleTransformer(model(visibility=visibility).config, backend="varlen").train()
    batch = inputs()
    with fake_cuda():
        move_to_cuda(built, torch.bfloat16)
        logits = built(**{name: on_cuda(value, torch.bfloat16) for name, value in batch.items()})
        assert len(calls) == built.config.depth and logits.device.type == "cuda"
    q, k, _, *offsets = calls[0]
    length = built.pyramid.length
    assert q.shape == (len(logits) * length, built.config.heads, built.config.width // built.config.heads)
    assert q.dtype == torch.bfloat16 and {t.device.type for t in (q, k, *offsets[:2])} == {"cuda"}
    assert len(k) == len(q) if visibility == "non_causal" else len(k) > len(q)


@pytest.mark.parametrize("visibility", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through_the_operator(
    visibility: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "attends_packed", lambda *_: True)
    built = ScaleTransformer(model(visibility=visibility).config).train()
    built.checkpointing = checkpointing
    batch = {name: value.float() if value.is_floating_point() else value for name, value in inputs().items()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.autocast("cpu", torch.bfloat16):
        built.to_empty(device="cpu")
        loss = built(**{name: mode.from_tensor(value) for name, value in batch.items()}).float().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in built.blocks.parameters())


def chosen(*, backend: Backend = "auto", visibility: str = "non_causal", device: torch.device = CUDA,
           dtype: torch.dtype = torch.bfloat16, head_width: int = 64) -> bool:  # fmt: skip
    return attends_packed(backend, visibility, device, dtype, head_width)


def test_auto_packs_where_the_kernel_is_and_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0))
    assert chosen() and chosen(dtype=torch.float16)
    assert not chosen(visibility="causal") and chosen(backend="varlen", visibility="causal")
    assert not chosen(dtype=torch.float32) and not chosen(device=CPU) and not chosen(head_width=12)
    assert not chosen(backend="fused") and not chosen(backend="products")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not chosen() and chosen(backend="varlen")
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(kernels, "_capability", lambda device: (7, 5))
    assert not chosen()
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "varlen_attn", None)
    assert not chosen()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"device": CPU}, "needs a GPU, not cpu"),
        ({"dtype": torch.float32}, "not float32"),
        ({"head_width": 12}, "not 12"),
        ({"head_width": 264}, "not 264"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(case: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"varlen .*{reason}; use auto"):
        chosen(backend="varlen", **case)


def test_the_setting_has_the_names_of_the_backends() -> None:
    assert get_args(get_type_hints(TrainerConfig)["attention"]) == get_args(Backend)
