"""Predicted kernels and latency of sampling: hand counts, torch's profiler, closed forms."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cost_model.hardware import ACCELERATORS, Accelerator
from benchmarks.cost_model.kernel_trace import Kernel, KernelTrace, launches, operations
from benchmarks.cost_model.launches import launches_of
from benchmarks.cost_model.sampling_latency import (
    CAPTION,
    DECODE,
    Assumptions,
    SamplingLatency,
    kernel_seconds,
    latency,
    rows_by_scale,
    sampling_latency,
    trace_sampling,
)
from benchmarks.flops import scale_flops
from experiments import plan
from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.tokenizer.config import RQVAEConfig

SCALES = [1, 2, 3, 4]
TOKENIZER = RQVAEConfig(
    scales=SCALES, codebook_size=48, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
)
MODEL = GeneratorConfig(
    depth=2, width=64, heads=2, scales=SCALES, codebook_size=48, code_width=8, text_width=12, pooled_width=10
)  # fmt: skip
HARD = SamplingConfig(top_k=16, gumbel=False)
A100 = ACCELERATORS["a100-80gb"]


# ---- counting -----------------------------------------------------------------------------------------------------


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.zeros(4, 6)
    with KernelTrace() as trace:
        x.view(2, 12).transpose(0, 1)[3:].expand(9, 2)
        x.new_empty(3)
        x.detach().unflatten(1, (2, 3)).unbind(1)
    assert launches(trace.sections.get("", Counter())) == 0
    with KernelTrace() as trace:
        y = x.T @ x
        y += 1
        y.relu().clone()
        torch.zeros(2)
    assert launches(trace.sections[""]) == 5


def test_known_composites_launch_several() -> None:
    assert launches_of(torch.ops.aten.topk.default) > launches_of(torch.ops.aten.mm.default) == 1
    assert launches_of(torch.ops.aten.view.default) == 0


def test_bytes_are_read_and_written_once() -> None:
    table, rows = torch.zeros(100, 3), torch.tensor([1, 2])
    with KernelTrace() as trace:
        torch.zeros(5, 1).expand(5, 7) + torch.zeros(5, 7, dtype=torch.float64)
        torch.nn.functional.embedding(rows, table)
    by_name = {kernel.name: kernel for kernel in trace.sections[""]}
    assert by_name["add"].bytes == 5 * 4 + 35 * 8 + 35 * 8
    assert by_name["embedding"].bytes == 2 * (2 * 3 * 4) + 2 * 8


def test_a_block_has_the_kernels_of_a_hand_count() -> None:
    """Of scale 1 in a non-causal model; a causal one also copies keys and values into its cache."""
    norm = 2  # statistics; gain
    modulated = norm + 2  # scale + 1; product and sum
    residual = norm + 1
    rotated = 4  # to float32, complex table, product, to bfloat16
    self_attention = (
        modulated + 1 + 2 + 2 * rotated + 1 + 1 + residual
    )  # qkv, two norms, …, attention, output
    caption = (
        norm + 1 + 1 + 2 + 1 + 1 + residual
    )  # queries, their norm, bias and its padding, attention, output
    feed_forward = modulated + 3 + 2 + residual  # three products, SiLU, gate
    expected = self_attention + caption + feed_forward
    for visibility, more in (("non_causal", 0), ("causal", 2)):
        config = replace(MODEL, visibility=visibility)
        one, two = (
            trace_sampling(replace(config, depth=depth), TOKENIZER, HARD, 2, 5)["1"] for depth in (1, 2)
        )
        assert launches(two) - launches(one) == expected + more


def test_operations_that_the_profiler_sees() -> None:
    """A forward pass of all scales on the CPU; what others call inside is not counted twice."""
    model = ScaleTransformer(replace(MODEL, visibility="causal"), backend="fused").eval()
    inputs = (
        torch.randn(2, model.pyramid.length - 1, 8), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool),
        torch.randn(2, 10),
    )  # fmt: skip
    with torch.no_grad():
        with KernelTrace() as trace:
            model(*inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(*inputs)
    counted: Counter[str] = Counter()
    for kernel, count in trace.sections[""].items():
        counted[kernel.name] += count
    seen = {event.key.removeprefix("aten::"): event.count for event in profiler.key_averages()}
    inner = {"_to_copy", "clone", "complex", "where"}
    assert {name: seen[name] for name in counted.keys() - inner} == {
        name: counted[name] for name in counted.keys() - inner
    }
    assert all(seen[name] >= counted[name] for name in inner & counted.keys())
    assert counted["addmm"] > 10


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_operations_of_a_scale_are_those_of_the_formula(visibility: str, ffn: str) -> None:
    model = replace(MODEL, visibility=visibility, ffn=ffn, depth=3)
    sampling = replace(HARD, guidance_stop=3)
    traced = trace_sampling(model, TOKENIZER, sampling, 2, text_tokens=5)
    for scale, rows in enumerate(rows_by_scale(model, sampling, 2)):
        products = Counter({k: n for k, n in traced[str(scale)].items() if k.name != "convolution"})
        # The captions' rows are prepared before the first scale.
        assert operations(products) == scale_flops(model, scale, rows, 5), scale


def test_more_blocks_are_like_the_second() -> None:
    deep = replace(MODEL, depth=4, visibility="causal")
    found = trace_sampling(deep, TOKENIZER, SamplingConfig(top_k=16), 2, 5)
    expected = trace_all_blocks(deep)
    assert found.keys() == expected.keys() == {CAPTION, *map(str, range(4)), DECODE}
    assert found == expected


def trace_all_blocks(model: GeneratorConfig) -> dict[str, Counter[Kernel]]:
    from benchmarks.cost_model.sampling_latency import _trace

    return _trace(model, TOKENIZER, SamplingConfig(top_k=16), 2, 5)


# ---- time ---------------------------------------------------------------------------------------------------------

ROUND = Accelerator(1000.0, 100.0, 1.0, 50.0, 1.0, 1.0, source="made up")
ASSUMED = Assumptions(matmul=0.5, attention=0.25, bandwidth=0.1, host=3.0, gap=1.0)


def test_the_roofline_by_hand() -> None:
    moving = Kernel("mul", 1, 0, torch.bfloat16, 20)
    product = Kernel("mm", 1, 4000, torch.bfloat16, 20)
    exact = Kernel("mm", 1, 400, torch.float32, 20)
    attention = Kernel("flash", 1, 2000, torch.bfloat16, 20, attention=True)
    seconds = [kernel_seconds(kernel, ROUND, ASSUMED) for kernel in (moving, product, exact, attention)]
    assert seconds == pytest.approx([20 / 5, 4000 / 500, 400 / 50, 2000 / 250])


def test_the_host_is_the_limit_of_small_kernels_and_graphs_are_not() -> None:
    small, large = Kernel("add", 2, 0, torch.float32, 5), Kernel("add", 1, 0, torch.float32, 500)
    one = latency(Counter({small: 3}), ROUND, ASSUMED)
    assert (one.kernels, one.device, one.captured, one.eager) == (6, 3.0, 3.0 + 6, 18.0)
    both = latency(Counter({small: 3, large: 1}), ROUND, ASSUMED)
    assert both.eager == both.captured == 3.0 + 100.0 + 7


def test_more_work_takes_longer() -> None:
    shallow = replace(MODEL, depth=1)

    def traced(images: int = 2, sampling: SamplingConfig = HARD) -> SamplingLatency:
        kernels = trace_sampling(shallow, TOKENIZER, sampling, images, text_tokens=5)
        of_gpus = [
            sampling_latency(kernels, images, rows_by_scale(shallow, sampling, images), gpu, Assumptions())
            for gpu in (A100, ACCELERATORS["h100-80gb"])
        ]
        assert all(h100.device < a100.device for a100, h100 in zip(*(x.parts for x in of_gpus), strict=True))
        assert [part.kernels for part in of_gpus[0].parts] == [part.kernels for part in of_gpus[1].parts]
        return of_gpus[0]

    base, more, stopped = traced(), traced(images=8), traced(sampling=replace(HARD, guidance_stop=2))
    assert 0 < base.captured <= base.eager
    assert all(a.device < b.device for a, b in zip(base.scales, more.scales, strict=True))
    assert stopped.rows == [2, 4, 2, 2] and base.rows == [2, 4, 4, 4]
    assert all(a.device <= b.device for a, b in zip(stopped.scales, base.scales, strict=True))
    # Numbers per image are those of the batch.
    assert more.eager == pytest.approx(sum(part.eager for part in more.parts) / 8)
    assert more.step == pytest.approx(sum(part.eager for part in more.scales) / 4 / 8)


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_has_a_sampling_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    settings = ["data.batch_size=16", "sampling.guidance_stop=1"]
    assert plan.main(["generator/tiny", *settings, "--images", "3", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "3 images in bfloat16, guidance before scale 1, without text encoders" in text
    assert "scale 1 (" in text and "decoding" in text and "captured in a CUDA graph" in text
    assert "a step launches at most" in text
    content = json.loads(out.read_text())
    sampling = content["sampling"]
    assert sampling["rows"] == [3, 3] and len(sampling["scales"]) == 2
    assert sampling["eager_per_image"] >= sampling["captured_per_image"] > 0
    assert content["passes"]["all_kept"]["kernels"] < content["passes"]["checkpointing"]["kernels"]


def test_a_batch_without_images_is_refused() -> None:
    with pytest.raises(UserError, match="--images 0"):
        plan.main(["generator/tiny", "--images", "0"])
