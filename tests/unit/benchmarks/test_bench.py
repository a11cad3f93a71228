"""The benchmark's own arithmetic, and that it measures what it says."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import TEXT_TOKENS, SamplingCase, Size, build, random_captions, with_visibility
from benchmarks.flops import attention_pairs, forward_flops, sampling_flops
from benchmarks.measure import interleaved_medians, peak_bytes
from benchmarks.report import Results
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.scales import Pyramid


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_operations_are_those_that_torch_counts(visibility: str, ffn: str) -> None:
    config = GeneratorConfig(
        visibility=visibility, ffn=ffn, depth=2, width=48, heads=3, scales=[1, 2, 3, 5], codebook_size=40,
        code_width=8, text_width=16, pooled_width=12,
    )  # fmt: skip
    model = build(config, torch.device("cpu")).bfloat16()  # attention by products, which the counter knows
    text = random_captions(config, 3, torch.device("cpu"))
    x_BMC = torch.randn(3, model.pyramid.length - 1, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x_BMC, text.tokens_BTC, text.mask_BT, text.pooled_BP)
    # The formula counts the input map for all L tokens; the first one comes from the caption.
    first = 2 * 3 * config.width * config.code_width
    assert counter.get_total_flops() == forward_flops(config, 3, TEXT_TOKENS) - first


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_sampling_needs_the_products_of_one_forward_pass_and_twice_them_where_guidance_is_on(
    visibility: str,
) -> None:
    config = Size(width=64, heads=2, depth=3).config(256, visibility)
    pyramid, width = Pyramid(tuple(config.scales)), config.width

    def flops(**settings) -> list[int]:
        schedule = GuidanceSchedule.of(SamplingConfig(**settings), pyramid)
        return sampling_flops(config, schedule, 2, TEXT_TOKENS)

    # Maps of the pooled caption, the crop and the head's modulation, and the code that the first scale has none of.
    outside = width * (config.code_width + 2 * width + config.pooled_width + width * config.crop_condition)
    assert sum(flops(guidance=0.0)) == forward_flops(config, 2, TEXT_TOKENS) - 2 * 2 * outside
    single, guided, stopped = flops(guidance=0.0), flops(), flops(guidance_stop=pyramid.count - 2)
    assert guided[1:] == [2 * count for count in single[1:]]
    assert stopped == [*guided[:-2], *single[-2:]]


def test_score_pairs_at_512_px() -> None:
    """3.30 times fewer than a dense mask computes without causality, 1.53 times with it."""
    pyramid = Pyramid((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
    dense = pyramid.length**2
    assert dense / attention_pairs(pyramid, "non_causal") == pytest.approx(3.30, abs=0.01)
    assert dense / attention_pairs(pyramid, "causal") == pytest.approx(1.53, abs=0.01)


def test_jobs_take_turns() -> None:
    order: list[str] = []
    jobs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    medians = interleaved_medians(jobs, 3, "turns")
    assert order == ["a", "b"] * 4
    assert set(medians) == {"a", "b"} and all(value >= 0 for value in medians.values())


def test_peak_memory_sees_a_large_tensor() -> None:
    size = 64 * 2**20
    used = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).max(), torch.device("cpu"))
    assert 0.8 * size < used < 2.5 * size


def test_table_names_every_number() -> None:
    results = Results({"train.512.causal": 1.25}, {"sample.seconds_per_scale": [0.5, 0.25]})
    assert results.table().splitlines() == [
        "train.512.causal          1.250",
        "sample.seconds_per_scale  0.5 0.25",
    ]


def test_variants_share_their_weights_and_the_clock_runs_inside_the_model() -> None:
    model = build(Size(width=64, heads=2, depth=1).config(256, "non_causal"), torch.device("cpu")).eval()
    causal = with_visibility(model, "causal")
    assert causal.config.visibility == "causal" and causal.blocks[0].attn.visibility == "causal"
    assert model.config.visibility == "non_causal" and model.blocks[0].attn.visibility == "non_causal"
    for (name, a), b in zip(model.named_parameters(), causal.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr(), name
    share = SamplingCase.of(model, 1).share_outside(SamplingConfig(gumbel=False), [0])
    assert 0 < share < 1


def test_sizes_describe_the_model() -> None:
    config = Size(width=64, heads=2, depth=3).config(256, "causal")
    assert len(ScaleTransformer(config).blocks) == 3 and config.visibility == "causal"
