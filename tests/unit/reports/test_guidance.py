"""Sampling with guidance everywhere and stopped early: ratios by hand, and what must not be compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker

from reports.data.comparability import obstacle, overlapping
from reports.data.comparison import compare_variants
from reports.data.metric_catalogue import describe
from reports.data.runs import Run, Sampling, read_run
from reports.data.statistics import paired_ratio
from reports.data.study import Study, group
from reports.render.document import Table, Text
from reports.sections.guidance import guidance_blocks, time_ratio
from reports.sections.metrics import cost_section

Make = Callable[..., Run]


def timed(rounds: list[float], stop: int | None, together: str = "t", **changes: Any) -> dict[str, Any]:
    value = {"seconds_per_scale": [rounds[0] / 4, 3 * rounds[0] / 4], "seconds_total": rounds[0], "batch": 8}
    value |= {"guidance_stop": stop, "cache_bytes": 0, "seconds_by_round": rounds, "timed_together": together}
    return value | {"processor_seconds_by_round": [rounds[0]] * 3} | changes


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def _make(visibility: str, seed: int, full: dict[str, Any], early: dict[str, Any], **changes: Any) -> Run:
        name = f"{visibility}-{seed}"
        config = maker.config(visibility, seed, name, [1, 2]) | changes.pop("config", {})
        evaluation = maker.evaluation(visibility, seed, [1, 2])
        evaluation |= {"sampling": full, "sampling_stopped_early": early}
        evaluation["metrics_stopped_early"] = {"fid_alexnet": 21.0 + seed}
        record = maker.record(name, seed, **changes)
        return read_run(maker.write_run(tmp_path / name, config, record, [], evaluation))

    return _make


def study(make: Make, **changes: Any) -> Study:
    """Non-causal takes 3/4 (seed 0) and 1/3 (seed 1) of causal; stopping early halves either."""
    runs = [
        make("causal", 0, timed([4.0, 8.0, 80.0], None), timed([2.0, 4.0, 40.0], 0)),
        make("causal", 1, timed([9.0, 9.0, 9.0], None), timed([4.5, 4.5, 4.5], 0)),
        make("non_causal", 0, timed([3.0, 6.0, 60.0], None), timed([1.5, 3.0, 30.0], 0), **changes),
        make("non_causal", 1, timed([3.0, 3.0, 3.0], None), timed([1.5, 1.5, 1.5], 0), **changes),
    ]
    return group(runs, vary=["model.visibility"])


def table(blocks: list[Any]) -> list[tuple[str, ...]]:
    return list(next(block for block in blocks if isinstance(block, Table)).rows)


def test_ratio_is_the_median_over_rounds_of_one_go() -> None:
    a = Sampling(seconds_total=8.0, rounds=(8.0, 2.0, 9.0), together="x", processor=(3.0,))
    b = Sampling(seconds_total=2.0, rounds=(4.0, 2.0, 3.0), together="x", processor=(6.0,))
    assert time_ratio(a, b) == 2.0  # of 2, 1, 3
    assert time_ratio(a, Sampling(seconds_total=2.0, rounds=(4.0, 2.0, 3.0), together="y")) == 4.0
    assert time_ratio(a, b, processor=True) == 0.5


def test_paired_ratio_is_a_geometric_mean_and_can_be_turned_round() -> None:
    there, back = paired_ratio([0.5, 2.0, 8.0]), paired_ratio([2.0, 0.5, 0.125])
    assert there.mean == pytest.approx(2.0) and there.count == 3
    assert (there.low, there.high) == pytest.approx((0.5, 8.0))
    assert back.mean == pytest.approx(1 / there.mean)
    assert paired_ratio([0.7]).low is None


def test_all_four_ways_against_the_reference(make: Make) -> None:
    rows = table(guidance_blocks(study(make)))
    assert [row[:2] for row in rows] == [
        ("causal", "everywhere"),
        ("causal", "off from scale 0 on"),
        ("non_causal", "everywhere"),
        ("non_causal", "off from scale 0 on"),
    ]
    # √(3/4 · 1/3) = 1/2; halved again by stopping early.
    assert [row[3] for row in rows] == [
        "1",
        "0.500 [0.500, 0.500], 2 pairs",
        "0.500 [0.333, 0.750], 2 pairs",
        "0.250 [0.167, 0.375], 2 pairs",
    ]
    assert [row[4] for row in rows][2:] == ["1", "0.500 [0.500, 0.500], 2 pairs"]
    assert rows[2][5] == "0.500 [0.333, 0.750], 2 pairs"


def test_what_was_timed_apart_is_told(make: Make) -> None:
    together, apart = (
        study(make),
        make("non_causal", 2, timed([1.0], None, "other"), timed([1.0], 0, "other")),
    )
    assert "in turn, round by round" in guidance_blocks(together)[1].text
    note = guidance_blocks(group([*together.runs, apart], vary=["model.visibility"]))[1]
    assert note.kind == "warning" and "hold only if nothing else ran" in note.text


def test_other_machines_and_batches_are_not_compared(make: Make) -> None:
    blocks = guidance_blocks(study(make, device="H100"))
    assert [row[3] for row in table(blocks)] == ["1", "0.500 [0.500, 0.500], 2 pairs", *["not compared"] * 2]
    assert "the machines differ (device)" in blocks[1].text


def test_no_timing_no_table(make: Make) -> None:
    run = make("causal", 0, {}, {})
    assert guidance_blocks(group([run])) == []


def test_metrics_with_guidance_stopped_early_stand_beside_the_others(make: Make) -> None:
    found = study(make)
    assert "stopped_early/fid_alexnet" in compare_variants(found).main_names
    assert describe("stopped_early/fid_alexnet").title == "FID (AlexNet), guidance stopped early"
    assert (
        compare_variants(found).difference(found.variants[1], "stopped_early/fid_alexnet").paired.mean == 0.0
    )


def test_runs_of_one_time_and_host_are_told(make: Make) -> None:
    times = {"started": "2025-03-01T10:00:00", "ended": "2025-03-01T11:00:00"}
    later = {"started": "2025-03-01T11:00:00", "ended": "2025-03-01T12:00:00"}
    full, early = timed([1.0], None), timed([1.0], 0)
    a, b = make("causal", 0, full, early, **times), make("non_causal", 0, full, early, **times)
    c, d = make("causal", 1, full, early, **later), make("causal", 2, full, early, **times, host="other")
    assert overlapping([a, b, c, d]) == [(a, b)]
    texts = [
        block.text
        for block in cost_section(compare_variants(group([a, b, c, d]))).blocks
        if isinstance(block, Text)
    ]
    assert any(
        "at the same time on one host" in text and "`causal-0` and `non_causal-0`" in text for text in texts
    )


OTHER_DATA = {"data": {"train": "b", "validation": "v"}}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("evaluation/fid_alexnet", OTHER_DATA | {"metrics": {"captions": "train"}}, "data.train"),
        ("evaluation/fid_alexnet", OTHER_DATA | {"metrics": {"captions": "validation"}}, None),
        ("metrics/fid_alexnet", {"metrics": {"prompts": 8}}, "measured differently (metrics.prompts)"),
        ("evaluation/fid_alexnet", {"metrics": {"prompts": 8}}, None),
        ("evaluation/mini_clip_score", {"metrics": {"mini_clip": "mine"}}, "metrics.mini_clip"),
        ("evaluation/fid_alexnet", {"metrics": {"mini_clip": "mine"}}, None),
    ],
)
def test_what_images_were_measured_with(
    make: Make, name: str, change: dict[str, Any], reason: str | None
) -> None:
    base = {"data": {"train": "a", "validation": "v"}, "metrics": {"prompts": 4, "mini_clip": "embedded"}}
    if "captions" in change.get("metrics", {}):
        base["metrics"] = change["metrics"]
    full, early = timed([1.0], None), timed([1.0], 0)
    a = make("causal", 0, full, early, config=base)
    b = make("causal", 1, full, early, config=base | {k: base[k] | v for k, v in change.items()})
    found = obstacle(describe(name), a, b)
    assert found is None if reason is None else reason in found


def test_images_of_other_sizes_are_not_compared(make: Make) -> None:
    full, early = timed([1.0], None), timed([1.0], 0)
    runs = [
        make("causal", i, full, early, config={"tokenizer": {"scales": [1, side], "multipliers": [1, 1]}})
        for i, side in enumerate((2, 4))
    ]
    assert obstacle(describe("evaluation/fid_alexnet"), *runs) == "the images differ in size (4 px and 8 px)"
    assert json.loads((runs[0].path / "evaluation.json").read_text())["pictures"] == 512
