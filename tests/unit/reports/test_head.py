"""What a reader sees first: whether anything was learned, the plot of all differences, digits and warnings that fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker
from matplotlib.figure import Figure as Canvas

from experiments import compare
from reports.build import document
from reports.data.comparison import compare_variants
from reports.data.runs import Run, read_run
from reports.data.statistics import paired_bootstrap, spread
from reports.data.study import Study, group
from reports.render.document import Document, Figure, ImageGrid, Table, Text
from reports.render.forest import Line, forest_figure
from reports.render.formatting import gap, in_one_row, interval, plus_minus
from reports.sections.summary import learning

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(variant, seed, {metric: final value}, {evaluated metric: value}, **evaluation)."""

    def _make(
        visibility: str,
        seed: int,
        finals: dict[str, float] | None = None,
        evaluated: dict[str, float] | None = None,
        task: str = "generator",
        settings: dict[str, Any] | None = None,
        **evaluation: Any,
    ) -> Run:
        name = f"{visibility}-{seed}"
        points = [(10, metric, value) for metric, value in (finals or {}).items()]
        content = {"step": 10, "metrics": evaluated, **evaluation} if evaluated else None
        config = maker.config(visibility, seed, name) | (settings or {})
        return read_run(
            maker.write_run(
                tmp_path / "s" / name, config, maker.record(name, seed, task=task), points, content
            )
        )

    return _make


def by_scale(*losses: float) -> dict[str, float]:
    """Final losses of scales whose unigram entropy is 5."""
    values = {f"validation/loss_by_scale/{k}": loss for k, loss in enumerate(losses)}
    return values | {f"validation/unigram_entropy_by_scale/{k}": 5.0 for k in range(len(losses))}


NOTHING = "no scale is below its unigram entropy yet (nothing has been learned)"


def test_that_nothing_has_been_learned_is_said_first(make: Make) -> None:
    runs = [
        make(visibility, seed, by_scale(5.0, 6.0) | {"validation/loss": loss})
        for visibility, loss in (("causal", 5.9), ("non_causal", 5.8))
        for seed in (0, 1)
    ]
    first, second, *_ = document(compare_variants(group(runs))).lead
    assert first.kind == "summary" and first.text.startswith(NOTHING[:1].upper() + NOTHING[1:])
    assert "better in validation loss" in second.text
    (alone,) = learning(compare_variants(group(runs[:2])))
    assert alone.text == NOTHING[:1].upper() + NOTHING[1:] + "."


def test_who_has_learned_nothing_is_named(make: Make) -> None:
    runs = [make("causal", 0, by_scale(5.5, 4.9)), make("non_causal", 0, by_scale(5.5, 5.1))]
    assert [text.text for text in learning(compare_variants(group(runs)))] == [f"non_causal: {NOTHING}."]


@pytest.mark.parametrize(
    "finals", [by_scale(4.0, 6.0), {"validation/loss_by_scale/0": 9.0}, {"validation/loss": 9.0}]
)
def test_nothing_is_said_where_it_is_not_known(make: Make, finals: dict[str, float]) -> None:
    assert learning(compare_variants(group([make("causal", 0, finals), make("non_causal", 0, finals)]))) == []


def drawn(study: Study) -> tuple[Figure, list[Line]]:
    figure = forest_figure(compare_variants(study))
    (panel,) = figure.panels
    axes = Canvas().add_subplot()
    panel.draw(axes)  # must not fail
    assert axes.get_xlim()[0] == -axes.get_xlim()[1]
    assert len(axes.get_yticklabels()) == len(panel.draw.keywords["rows"])
    return figure, panel.draw.keywords["rows"]


def test_forest_turns_every_metric_so_that_better_is_right(make: Make) -> None:
    """Six pairs: loss 2 → 1.9 (5 % better), FID 10 → 11 (10 % worse), score 0.2 → 0.25 (25 % better)."""
    runs = [
        make(
            visibility, seed,
            {"validation/loss": (2.0, 1.9)[other] + seed, "norms/last/mean": 5.0 + other},
            {"fid": (10.0, 11.0)[other], "pick_score_v1": (0.2, 0.25)[other], "kid_alexnet": -0.001 + other},
            pictures=4096,
        )
        for other, visibility in enumerate(("causal", "non_causal"))
        for seed in range(6)
    ]  # fmt: skip
    figure, rows = drawn(group(runs))
    found = {row.label: row.dots[0] for row in rows}
    assert found["validation loss"].mean == pytest.approx(100 * 0.1 / 4.5)
    assert found["FID (Inception)"].mean == pytest.approx(-10)
    assert found["PickScore v1"].mean == pytest.approx(25)
    assert all(
        dot.firm and dot.low <= dot.mean <= dot.high for name, dot in found.items() if name != "peak memory"
    )
    assert not any("norm" in label for label in found)  # has no better side
    assert "has no positive mean to compare with: KID (AlexNet)" in figure.caption
    assert "PickScore v1 25 % better" in figure.panels[0].alt


def test_forest_of_one_pair_has_no_intervals(make: Make) -> None:
    _, rows = drawn(
        group([make("causal", 0, {"validation/loss": 2.0}), make("non_causal", 0, {"validation/loss": 1.0})])
    )
    dot = rows[0].dots[0]
    assert (dot.mean, dot.low, dot.high, dot.firm) == (50.0, None, None, False)


def test_forest_of_several_variants_has_a_dot_for_each(make: Make) -> None:
    runs = [make(f"v{i}", seed, {"validation/loss": 4.0 - i}) for i in range(3) for seed in (0, 1)]
    figure, rows = drawn(group(runs))
    assert [(dot.variant, dot.mean) for dot in rows[0].dots] == [(1, 25.0), (2, 50.0)]
    assert figure.legend == (("v1", 1), ("v2", 2))


def test_no_forest_without_a_comparison(make: Make) -> None:
    assert forest_figure(compare_variants(group([make("causal", 0, {"validation/loss": 2.0})]))) is None


def test_the_head_has_plot_and_images_before_the_sentences(tmp_path: Path) -> None:
    study = maker.write_study(tmp_path, sides=[1, 2])
    page = document(
        compare_variants(group([read_run(path.parent) for path in sorted(study.glob("*/record.json"))]))
    )
    kinds = [block.kind if isinstance(block, Text) else type(block).__name__ for block in page.lead]
    assert kinds.index("Figure") < kinds.index("ImageGrid") < kinds.index("verdict")
    assert [block.name for block in page.lead if isinstance(block, Figure | ImageGrid)] == [
        "forest",
        "images_first",
    ]


def texts(page: Document, kind: str) -> str:
    blocks = [*page.lead, *(block for section in page.sections for block in section.blocks)]
    return "\n".join(block.text for block in blocks if isinstance(block, Text) and block.kind == kind)


def test_a_distance_over_few_images_carries_a_warning(make: Make) -> None:
    runs = [
        make(v, 0, {"metrics/kid_alexnet": 0.1}, {"fid_alexnet": 9.0, "pick_score_v1": 0.2}, pictures=16,
             settings={"metrics": {"prompts": 64}})
        for v in ("causal", "non_causal")
    ]  # fmt: skip
    study = group(runs)
    warning = texts(document(compare_variants(study)), "warning")
    assert "FID (AlexNet): over 16 images, fewer than 2048." in warning
    assert "KID (AlexNet) in training: over 64 images, fewer than 2048." in warning
    assert "PickScore" not in warning
    assert "FID (AlexNet) (over 16 images only)" in texts(document(compare_variants(study)), "summary")
    assert any("16 images" in " ".join(row.label.split()) for row in drawn(study)[1])


def test_a_distance_over_enough_images_does_not(make: Make) -> None:
    runs = [make(v, 0, {}, {"fid_alexnet": 9.0}, pictures=2048) for v in ("causal", "non_causal")]
    page = document(compare_variants(group(runs)))
    assert "images" not in texts(page, "warning") + texts(page, "summary")


def test_no_metric_stands_twice(make: Make) -> None:
    names = {"metrics/fid": 2.0, "metrics/kid": 0.1, "train/loss": 3.0, "validation/loss": 3.0}
    run = make("causal", 0, names, {"fid": 1.9})
    assert compare_variants(group([run])).main_names == [
        "validation/loss",
        "train/loss",
        "evaluation/fid",
        "metrics/kid",
    ]


@pytest.mark.parametrize(("task", "count"), [("generator", 0), ("tokenizer", 1)])
def test_codebook_use_is_a_result_of_tokenizers_alone(make: Make, task: str, count: int) -> None:
    names = {"train/codebook_use": 0.5, "validation/codebook_use": 0.6, "validation/loss": 1.0}
    runs = [make(v, 0, names, task=task) for v in ("causal", "non_causal")]
    page = document(compare_variants(group(runs)))
    (table,) = [b for s in page.sections if s.anchor == "metrics" for b in s.blocks if isinstance(b, Table)]
    assert sum("codebook use" in row[0] for row in table.rows) == count
    titles = [p.title for s in page.sections for b in s.blocks if isinstance(b, Figure) for p in b.panels]
    assert (
        any("codebook use" in title and ("of the data" in title) != bool(count) for title in titles) or count
    )


def test_the_hint_speaks_of_generated_images(make: Make) -> None:
    page = document(compare_variants(group([make("causal", 0, {"validation/loss": 1.0})])))
    missing = texts(page, "missing")
    assert "whole validation set" not in missing
    assert "Distances and scores of many generated images: no run has an `evaluation.json`" in missing


def test_digits_follow_the_standard_error() -> None:
    values = [7.12345678, 7.12345688]
    assert plus_minus(spread(values)) == "7.1235 ± 7e−8"  # no more than five digits
    assert plus_minus(spread([23.1, 23.9, 22.3, 24.4])) == "23.42 ± 0.92"  # standard error 0.46
    assert plus_minus(spread([20.0 + i % 2 for i in range(100)])) == "20.500 ± 0.503"  # standard error 0.050
    assert plus_minus(spread([0.3, 1.7])) == "1.00 ± 0.99"
    assert plus_minus(spread([100.0, 4000.0])) == "2050 ± 2758"
    assert plus_minus(spread([3.0, 3.0])) == "3.000 ± 0"
    assert plus_minus(spread([2e-6, 3e-6])) == "2.500e−6 ± 7.1e−7"


def test_a_row_has_one_number_of_decimals() -> None:
    """A small deviation of two runs is chance: the pooled one sets the digits."""
    assert in_one_row([spread([20.0, 24.0]), spread([21.2345, 21.2346]), None, spread([22.123])]) == [
        "22.0 ± 2.8", "21.2 ± 7e−5", "–", "22.12",
    ]  # fmt: skip


def test_a_difference_and_its_interval_have_one_number_of_decimals() -> None:
    paired = paired_bootstrap([0.0123456, 0.0234567, 0.0345678])
    assert (gap(paired), interval(paired)) == ("+0.0235", "[+0.0123, +0.0346]")
    zero = paired_bootstrap([-1.0, 1.0])
    assert (gap(zero), interval(zero)) == ("0.0", "[−1.0, +1.0]")
    assert gap(paired_bootstrap([1.25])) == "+1.25"


def test_hundreds_of_metrics_are_not_all_drawn(tmp_path: Path) -> None:
    points = [(step, f"odd/metric_{i}", float(i)) for step in (1, 2) for i in range(300)]
    points += [(step, f"validation/loss_by_scale/{k}", 1.0) for step in (1, 2) for k in ("x", "²", "1" * 9)]
    run = maker.write_run(tmp_path / "x", maker.config("causal", 0, "x"), maker.record("x", 0), points)
    compare.main([str(run)])
    text = (run / "report" / "index.html").read_text()
    assert text.count("<svg") < 60 and "The first 48 of 30" in text
    assert json.dumps("odd/metric_299")[1:-1] in (run / "report" / "rows.csv").read_text()
