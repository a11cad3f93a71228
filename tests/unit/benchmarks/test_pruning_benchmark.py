"""The pruning benchmark's arithmetic, and its part of the command."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import TEXT_TOKENS, build, random_captions
from benchmarks.flops import pruned_sampling_flops, scale_flops
from experiments import bench
from switti.models.config import GeneratorConfig
from switti.models.pruning import TokenPruning


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize(("counts", "first_block"), [({}, 0), ({2: 4, 3: 11}, 1), ({3: 5}, 0)])
def test_operations_of_sampling_are_those_that_torch_counts(
    visibility: str, counts: dict[int, int], first_block: int
) -> None:
    config = GeneratorConfig(
        visibility=visibility, depth=2, width=48, heads=3, scales=[1, 2, 3, 5], codebook_size=40,
        code_width=8, text_width=16, pooled_width=12,
    )  # fmt: skip
    # Attention by products, which the counter knows.
    model = build(config, torch.device("cpu")).bfloat16()
    text, cache = random_captions(config, 2, torch.device("cpu")), model.build_cache()
    pruning = TokenPruning(counts, first_block, 2)
    rows = [2, 2, 2, 1]
    with torch.no_grad():
        condition = model.prepare(text.tokens_BTC, text.mask_BT, text.pooled_BP)
        with FlopCounterMode(display=False) as counter:
            for scale, size in enumerate(model.pyramid.sizes):
                x = torch.randn(rows[scale], size, 8) if scale else None
                model.forward_scale(scale, x, condition.first_rows(rows[scale]), cache, pruning)
    assert counter.get_total_flops() == pruned_sampling_flops(config, rows, TEXT_TOKENS, counts, first_block)
    if not counts:
        by_scale = [scale_flops(config, k, rows[k], TEXT_TOKENS) for k in range(4)]
        assert counter.get_total_flops() == sum(by_scale)


@pytest.mark.slow
def test_the_command_compares_pruned_sampling_with_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--quick", "--only", "prune", "--json", str(tmp_path / "bench.json")]) == 0
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["ratios"]["prune.512.full.last_three.fewer_operations"] > 1.1
    assert all(value > 0 for value in content["ratios"].values())
    assert "prune.512.block.scale_9.faster" in capsys.readouterr().out
