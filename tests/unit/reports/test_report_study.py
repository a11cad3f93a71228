"""Variants, pairs and paired differences of runs with known numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker

from reports.data.comparability import loss_groups, obstacle
from reports.data.comparison import compare_variants
from reports.data.final_values import final
from reports.data.metric_catalogue import describe
from reports.data.runs import Run, read_run
from reports.data.study import differing, group
from reports.render import tables
from reports.sections.paired_tables import comparison_tables
from reports.sections.runs import runs_section
from reports.sections.summary import verdict
from switti.errors import UserError

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def _make(
        visibility: str,
        seed: int,
        loss: float,
        settings: dict[str, Any] | None = None,
        norm: float | None = None,
        **record: Any,
    ) -> Run:
        name = f"{visibility}-{seed}-{len(list(tmp_path.iterdir()))}"
        config = maker.config(visibility, seed, name)
        for key, value in (settings or {}).items():
            part, _, last = key.rpartition(".")
            (config.setdefault(part, {}) if part else config)[last] = value
        points = [
            (10, "validation/loss", loss + 1),
            (20, "validation/loss", loss),
            (20, "time/step_seconds", loss),
            *([(20, "norms/last/mean", norm)] if norm else []),
        ]
        return read_run(maker.write_run(tmp_path / name, config, maker.record(name, seed, **record), points))

    return _make


def four(make: Make) -> list[Run]:
    values = {("causal", 0): 2.0, ("causal", 1): 3.0, ("non_causal", 0): 1.75, ("non_causal", 1): 2.5}
    return [make(visibility, seed, loss) for (visibility, seed), loss in values.items()]


def test_variants_and_pairs(make: Make) -> None:
    study = group(four(make))
    assert study.vary == ("model.visibility",)
    assert [variant.label for variant in study.variants] == ["causal", "non_causal"]
    assert [value for value, *_ in study.pairs(study.variants[1])] == [0, 1]
    assert study.unpaired == []
    assert list(differing(study.runs)) == ["model.visibility", "seed"]


def test_paired_difference_by_hand(make: Make) -> None:
    study = group(four(make))
    d = compare_variants(study).difference(study.variants[1], "validation/loss")
    assert d.paired.differences == (-0.25, -0.5)
    assert (d.paired.mean, d.paired.low, d.paired.high) == (-0.375, -0.5, -0.25)
    assert (d.reference_mean, d.variant_mean, d.step) == (2.5, 2.125, 20)
    assert compare_variants(study).spread(study.variants[0], "validation/loss").deviation == pytest.approx(
        0.5**0.5
    )


def test_rows_are_exact(make: Make) -> None:
    header, rows = tables.rows(compare_variants(group(four(make))))
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["variant"], row["seed"], row["validation/loss"]) for row in table] == [
        ("causal", 0, 2.0),
        ("causal", 1, 3.0),
        ("non_causal", 0, 1.75),
        ("non_causal", 1, 2.5),
    ]
    assert {row["status"] for row in table} == {"finished"}


def test_paired_rows_are_exact(make: Make) -> None:
    rows = [
        dict(zip(tables.PAIRED_COLUMNS, row, strict=True))
        for row in tables.paired_rows(compare_variants(group(four(make))))
    ]
    row = next(row for row in rows if row["metric"] == "validation/loss")
    assert row["pairs"] == 2 and row["better"] == "lower" and row["differences"] == "0: -0.25; 1: -0.5"
    assert (row["mean_difference"], row["low"], row["high"], row["not_compared"]) == (-0.375, -0.5, -0.25, "")


def test_shorter_run_is_compared_at_the_last_common_step(make: Make, tmp_path: Path) -> None:
    runs = [make("causal", 0, 2.0), make("non_causal", 0, 1.0)]
    path = runs[1].path / "metrics.csv"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("20,")))
    study = group([runs[0], read_run(runs[1].path)])
    d = compare_variants(study).difference(study.variants[1], "validation/loss")
    assert (d.step, d.paired.mean) == (10, 2.0 - 3.0)
    assert final(runs[0], "validation/loss") == 2.0


def test_unpaired_runs_are_told(make: Make) -> None:
    study = group([make("causal", 0, 1.0), make("causal", 7, 1.0), make("non_causal", 0, 1.0)])
    assert [run.setting("seed") for run in study.unpaired] == [7]
    apart = group([make("causal", 1, 1.0), make("non_causal", 2, 1.0)])
    d = compare_variants(apart).difference(apart.variants[1], "validation/loss")
    assert d.paired is None and d.reason == "no two runs share a value of seed"


def test_losses_of_other_token_spaces_are_not_subtracted(make: Make) -> None:
    short = {"model.scales": [1, 2, 4], "tokenizer.scales": [1, 2, 4]}
    study = group([make("causal", 0, 2.0), make("causal", 0, 1.0, short)])
    assert study.vary == ("model.scales",)  # the tokenizer's scales split the runs alike
    d = compare_variants(study).difference(study.variants[1], "validation/loss")
    assert d.paired is None and "token spaces differ (tokenizer.scales, model.scales)" in d.reason
    assert compare_variants(study).difference(study.variants[1], "time/step_seconds").paired is not None
    assert [len(space) for space in loss_groups(study)] == [1, 1]
    assert len(loss_groups(group(four(make)))) == 1


def test_other_data_and_other_machines(make: Make) -> None:
    study = group(
        [make("causal", 0, 2.0), make("causal", 0, 1.0, {"data.validation": "photos.tar"}, device="H100")]
    )
    assert (
        "data differ (data.validation)"
        in compare_variants(study).difference(study.variants[1], "validation/loss").reason
    )
    assert (
        "machines differ (device)"
        in compare_variants(study).difference(study.variants[1], "time/step_seconds").reason
    )
    loading = group([make("causal", 0, 2.0), make("causal", 0, 1.0, {"data.workers": 8})])
    assert compare_variants(loading).difference(loading.variants[1], "validation/loss").paired is not None
    more = group([make("causal", 0, 2.0), make("causal", 0, 1.0, {"data.train": "more-*.tar"})])
    assert compare_variants(more).difference(more.variants[1], "validation/loss").paired is not None
    assert "data differ (data.train)" in obstacle(describe("train/loss"), *more.runs)


def test_equal_paths_with_other_contents_are_told(make: Make) -> None:
    def data(train: str, validation: str) -> dict[str, Any]:
        return {"train": {"samples": 9, "digest": train}, "validation": {"samples": 3, "digest": validation}}

    runs = [make("causal", 0, 2.0, data=data("a", "v")), make("non_causal", 0, 1.0, data=data("a", "w"))]
    study = group(runs)
    d = compare_variants(study).difference(study.variants[1], "validation/loss")
    assert d.paired is None and "the data differ (contents of data.validation)" in d.reason
    assert obstacle(describe("train/loss"), *runs) is None
    assert [len(members) for members in loss_groups(study)] == [1, 1]
    text = " ".join(getattr(block, "text", "") for block in runs_section(study).blocks)
    assert "data.validation is the same setting with other contents" in text and "data.train is" not in text
    assert f"in: `{study.runs[0].name}`; in: `{study.runs[1].name}`" in text

    other = [make("causal", 0, 2.0, data=data("a", "v")), make("non_causal", 0, 1.0, data=data("a+b", "v"))]
    study = group(other)
    assert compare_variants(study).difference(study.variants[1], "validation/loss").paired is not None
    assert "contents of data.train" in obstacle(describe("train/loss"), *other)
    shown = {"metrics.captions": "train"}
    training = [make("causal", 0, 2.0, shown, data=data("a", "v")), other[1]]
    assert "contents of data.train" in obstacle(describe("metrics/fid_alexnet"), *training)
    text = " ".join(getattr(block, "text", "") for block in runs_section(study).blocks)
    assert f"The contents of data.train changed while `{study.runs[1].name}` lasted" in text

    elsewhere = {"data.train": "more-*.tar"}  # told by the settings already
    apart = group(
        [
            make("causal", 0, 2.0, data=data("a", "v")),
            make("causal", 0, 1.0, elsewhere, data=data("b", "v")),
            make("causal", 1, 1.0),  # of an earlier version, which noted nothing
        ]
    )
    assert "contents" not in " ".join(getattr(block, "text", "") for block in runs_section(apart).blocks)
    assert obstacle(describe("train/loss"), other[1], make("causal", 1, 1.0)) is None


def test_losses_on_other_data_are_drawn_apart(make: Make) -> None:
    runs = [make("causal", 0, 2.0), make("causal", 0, 1.0, {"data.validation": "photos.tar"})]
    assert [len(members) for members in loss_groups(group(runs))] == [1, 1]
    runs = [make("causal", 0, 2.0), make("causal", 0, 1.0, {"data.train": "more.tar"})]
    assert [len(members) for members in loss_groups(group(runs))] == [2]


def test_many_varied_settings_name_only_what_is_unusual(make: Make) -> None:
    runs = [
        make("causal", 0, 2.0),
        make("non_causal", 0, 2.0),
        make("causal", 0, 2.0, {"model.depth": 4}),
        make("causal", 0, 2.0, {"data.validation": "other/v-*.tar", "model.depth": 4}),
        make("causal", 1, 2.0),
    ]
    labels = {variant.label for variant in group(runs).variants}
    assert labels == {"common settings", "non_causal", "depth=4", "depth=4, validation=other/v-*.tar"}


def test_not_finite_values_are_left_out(make: Make) -> None:
    study = group([make("causal", 0, 2.0), make("non_causal", 0, float("nan"))])
    d = compare_variants(study).difference(study.variants[1], "validation/loss")
    assert d.paired is None and "not finite" in d.reason


def test_vary_and_pair_by_are_the_users(make: Make) -> None:
    runs = [make("causal", 0, 1.0, {"model.depth": 4}), make("non_causal", 0, 1.0, {"model.depth": 8})]
    assert group(runs, vary=["model.depth"]).variants[0].label == "depth=4"
    assert group(runs).variants[1].label == "depth=8, non_causal"
    assert [len(v.runs) for v in group(runs, pair_by="model.depth", vary=["seed"]).variants] == [2]
    with pytest.raises(UserError, match=r"did you mean 'model\.depth'"):
        group(runs, vary=["model.dept"])


def test_twins_and_mixed_tasks_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"are both 'all runs' with seed=0: leave one out.*--vary"):
        group([make("causal", 0, 1.0), make("causal", 0, 2.0)])
    with pytest.raises(UserError, match="different tasks \\(generator, tokenizer\\)"):
        group([make("causal", 0, 1.0), make("causal", 1, 1.0, task="tokenizer")])


@pytest.mark.parametrize(("gain", "word"), [(-0.5, "better"), (0.5, "worse"), (0.0, "equal")])
def test_verdict_follows_the_numbers(make: Make, gain: float, word: str) -> None:
    study = group([make("causal", 0, 2.0), make("non_causal", 0, 2.0 + gain)])
    lead, sentence, *_ = [text.text for text in verdict(compare_variants(study))]
    assert lead.startswith("non_causal against causal: " + word) and "validation loss" in lead
    assert "one pair, no interval" in sentence


def test_verdict_calls_norms_neither_better_nor_worse(make: Make) -> None:
    study = group([make("causal", 0, 2.0, norm=80.0), make("non_causal", 0, 1.0, norm=100.0)])
    lead = verdict(compare_variants(study))[0].text
    assert "better in validation loss and time of a step; higher: last block's activation norm, mean;" in lead


def test_verdict_does_not_tell_apart_what_disagrees(make: Make) -> None:
    runs = [
        make("causal", 0, 2.0),
        make("causal", 1, 2.0),
        make("non_causal", 0, 1.5),
        make("non_causal", 1, 2.25),
    ]
    lead, sentence, *_ = [text.text for text in verdict(compare_variants(group(runs)))]
    assert "no clear difference: validation loss" in lead
    assert "difference −0.12 " in sentence and "[−0.50, +0.25] over 2 pairs, which do not agree" in sentence


def test_more_than_two_variants_have_their_differences_in_a_table_of_their_own(make: Make) -> None:
    losses = {4: 2.0, 8: 1.5, 16: 1.75}
    runs = [
        make("causal", seed, loss + seed, {"model.depth": d}) for d, loss in losses.items() for seed in (0, 1)
    ]
    means, gaps = comparison_tables(
        compare_variants(group(runs)), ["validation/loss", "time/step_seconds"], ratio=True
    )
    assert means.header[1:] == tuple(
        f"depth={d} (n\u00a0=\u00a02)" for d in (4, 8, 16)
    )  # by size, not by alphabet
    assert gaps.header == ("metric", "depth=8", "depth=16")
    assert gaps.rows[0][1] == "−0.500 [−0.500, −0.500], 2 pairs, ratio 1.25×"  # 2.5 / 2.0
    assert gaps.rows[0][2] == "−0.250 [−0.250, −0.250], 2 pairs, ratio 1.11×"  # 2.5 / 2.25


def test_two_variants_share_one_table(make: Make) -> None:
    (table,) = comparison_tables(compare_variants(group(four(make))), ["validation/loss"], ratio=False)
    assert table.rows == (
        ("validation loss ↓", "2.50 ± 0.71", "2.12 ± 0.53", "−0.38", "[−0.50, −0.25]", "2"),
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, ""), ({"step": 10}, "different steps"), ({"pictures": 64}, "numbers of images")],
)
def test_evaluations_under_other_circumstances(make: Make, change: dict[str, Any], reason: str) -> None:
    runs = []
    for visibility in ("causal", "non_causal"):
        path = make(visibility, 0, 1.0).path
        value = maker.evaluation(visibility, 0, [1, 2]) | (change if visibility == "causal" else {})
        (path / "evaluation.json").write_text(json.dumps(value))
        runs.append(read_run(path))
    study = group(runs)
    d = compare_variants(study).difference(study.variants[1], "evaluation/fid_alexnet")
    assert (d.paired is None) == bool(reason) and reason in d.reason
    early = compare_variants(study).difference(study.variants[1], "sampling/seconds_total_stopped_early")
    seconds = [0.7 * sum(run.evaluation.sampling.seconds_per_scale) for run in study.runs]
    assert early.paired.mean == pytest.approx(seconds[1] - seconds[0])
