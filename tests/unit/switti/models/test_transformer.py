"""The scale transformer: variants, conditioning, precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformer_cases import SCALES, inputs, model, tiny

from benchmarks.reference_model import dense_mask
from switti.errors import UserError
from switti.models import attention
from switti.models.attention import attend_by_scale
from switti.models.norm import RMSNorm
from switti.models.transformer import ScaleTransformer
from switti.scales import Pyramid


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_attention_by_scale_equals_dense_mask(visibility: str) -> None:
    pyramid = Pyramid(tuple(SCALES))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, pyramid.length, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    found = attend_by_scale(q, k, v, pyramid.spans, visibility)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(pyramid, visibility))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize(
    "ladder", [{}, {"norms": "pre", "ffn": "gelu"}, {"crop_condition": False, "rope": False}]
)
def test_training_equals_sampling(visibility: str, ladder: dict) -> None:
    """All scales at once and scale by scale give the same logits."""
    built, given = model(visibility=visibility, **ladder), inputs()
    with torch.no_grad():
        expected = built(**given)
        condition = built.prepare(given["text_BTC"], given["mask_BT"], given["pooled_BP"], given["crop_B4"])
        cache = built.build_cache()
        for scale, (start, stop) in enumerate(built.pyramid.spans):
            rows = None if scale == 0 else given["x_BMC"][:, start - 1 : stop - 1]
            found = built.forward_scale(scale, rows, condition, cache)
            torch.testing.assert_close(found, expected[:, start:stop], rtol=0, atol=1e-10)


def influence(built: ScaleTransformer, source: int) -> list[bool]:
    """Which scales' logits change when the input of scale `source` does."""
    given = inputs()
    start, stop = built.pyramid.spans[source]
    with torch.no_grad():
        before = built(**given)
        given["x_BMC"][:, start - 1 : stop - 1] += 1.0
        after = built(**given)
    return [
        not torch.equal(a, b)
        for a, b in zip(built.pyramid.split(before), built.pyramid.split(after), strict=True)
    ]


def test_perturbing_one_scale_changes_the_logits_of_exactly_the_scales_that_may_see_it() -> None:
    assert influence(model(visibility="non_causal"), 1) == [False, True, False, False]
    assert influence(model(visibility="causal"), 1) == [False, True, True, True]
    assert influence(model(visibility="causal"), 2) == [False, False, True, True]


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_the_backend_reaches_attention_and_norms(visibility: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and by products: other kernels, the same numbers; in float64 on a CPU attention is fused by itself."""
    calls: list[str] = []
    by_products = attention.attend_by_products
    monkeypatch.setattr(
        attention, "attend_by_products", lambda *a, **k: calls.append("products") or by_products(*a, **k)
    )
    auto, outputs = model(visibility=visibility), {}
    for backend in ("auto", "fused", "products"):
        built = ScaleTransformer(auto.config, backend=backend).to(torch.float64)
        built.load_state_dict(auto.state_dict())
        norms = [m for m in built.modules() if isinstance(m, RMSNorm)]
        assert norms and {norm.backend for norm in norms} == {backend}
        calls.clear()
        with torch.no_grad():
            outputs[backend] = built(**inputs())
        assert len(calls) == (2 * auto.config.depth if backend == "products" else 0)
    torch.testing.assert_close(outputs["fused"], outputs["auto"], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs["products"], outputs["auto"], rtol=0, atol=1e-12)


def test_no_attention_call_spans_more_than_one_scale_without_causality(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    original = F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None):
        seen.append((q.shape[2], k.shape[2], attn_mask is None))
        return original(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", record)
    model(visibility="non_causal", depth=1)(**inputs())
    sizes = [side * side for side in SCALES]
    assert seen[:-1] == [(size, size, True) for size in sizes]
    seen.clear()
    model(visibility="causal", depth=1)(**inputs())
    assert seen[:-1] == [(size, sum(sizes[: k + 1]), True) for k, size in enumerate(sizes)]


def test_variants_of_one_seed_start_from_the_same_weights() -> None:
    states = []
    for visibility in ("causal", "non_causal"):
        torch.manual_seed(7)
        states.append(ScaleTransformer(tiny(visibility=visibility)).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_padding_does_not_change_logits() -> None:
    built, given = model(), inputs()
    with torch.no_grad():
        before = built(**given)
        given["text_BTC"][0, 3:] += 5.0
        after = built(**given)
    assert torch.equal(before, after)


def test_each_condition_matters() -> None:
    built = model()
    with torch.no_grad():
        before = built(**inputs())
        for name in ("text_BTC", "pooled_BP", "crop_B4"):
            given = inputs()
            given[name] = given[name] + 3
            assert not torch.allclose(before, built(**given)), name


def test_float32_head_under_autocast() -> None:
    """In mixed precision the head and its logits are float32, unless the ladder's first rung is asked for."""
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        built = ScaleTransformer(tiny(head_precision=precision))
        seen = []
        built.head.register_forward_hook(lambda _m, args, out, seen=seen: seen.append(out.dtype))
        given = {k: v.float() if v.is_floating_point() else v for k, v in inputs().items()}
        with torch.autocast("cpu", torch.bfloat16):
            built(**given)
        assert seen == [expected]


def test_crop_features_stay_float32_in_a_half_precision_model() -> None:
    built = ScaleTransformer(tiny())
    features = built.crop_embed(torch.tensor([[512, 512, 37, 0]]))
    half = copy.deepcopy(built).to(torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16
    assert torch.equal(half.crop_embed(torch.tensor([[512, 512, 37, 0]])), features)
    assert torch.equal(half.cosine_LK, built.cosine_LK)


def test_meta_device_model_gets_its_tables_when_it_materialises() -> None:
    with torch.device("meta"):
        built = ScaleTransformer(tiny())
    built = built.to_empty(device="cpu")
    assert torch.equal(built.cosine_LK, ScaleTransformer(tiny()).cosine_LK)
    assert torch.equal(built.level_L, Pyramid(tuple(SCALES)).levels())


def test_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        built = model().train()
        built.checkpointing = checkpointing
        built(**inputs()).square().mean().backward()
        gradients.append({name: p.grad for name, p in built.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 33}, "model.width=33 must be a multiple of model.heads=2"),
        ({"width": 36, "heads": 6}, "must be a multiple of 4"),
        ({"scales": [1, 3, 2]}, "strictly increasing"),
    ],
)
def test_impossible_sizes_are_named(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ScaleTransformer(tiny(**changes))
