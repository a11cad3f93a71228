"""Ratios of activation norms by hand, and norms that cannot be compared."""

from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic_runs as maker

from reports.data.comparison import compare_variants
from reports.data.runs import Run, read_run
from reports.data.study import group
from reports.sections.norms import norms_section

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def _make(head: str, seed: int, norms: list[float], width: int = 512) -> Run:
        name = f"{head}-{seed}-{width}"
        config = maker.config("causal", seed, name)
        config["model"] |= {"head_precision": head, "width": width}
        points = [
            (step, f"norms/last/{kind}", factor * value)
            for step, value in enumerate(norms, start=1)
            for kind, factor in (("mean", 1.0), ("max", 10.0))
        ]
        return read_run(maker.write_run(tmp_path / name, config, maker.record(name, seed), points))

    return _make


def test_ratios_are_geometric_and_at_the_end(make: Make) -> None:
    runs = [
        make("bfloat16", 0, [1.0, 900.0, 100.0]),
        make("bfloat16", 1, [1.0, 400.0, 400.0]),
        make("float32", 0, [1.0, 2.0, 1.0]),
        make("float32", 1, [1.0, 2.0, 1.0]),
    ]
    figure, table = norms_section(compare_variants(group(runs))).blocks
    # Geometric means: √(100 · 400) = 200 and √(9 000 · 4 000) = 6 000; ratios 1/100 and 1/400, their mean 1/200.
    assert table.rows == (
        ("bfloat16", "200", "2000", "6000", "1", "1"),
        ("float32", "1.00", "10.0", "20.0", *["0.00500 [0.00250, 0.0100]"] * 2),
    )
    assert [panel.name for panel in figure.panels] == ["norms/last/mean", "norms/last/max"]


def test_one_pair_other_widths_other_steps_and_overflow(make: Make) -> None:
    reference = make("bfloat16", 0, [1.0, 4.0])
    one = (
        norms_section(compare_variants(group([reference, make("float32", 0, [1.0, 2.0])]))).blocks[1].rows[1]
    )
    assert one[4:] == ("0.500 (one pair, no interval)",) * 2
    for other in (
        make("float32", 0, [1.0, 2.0], width=64),
        make("float32", 1, [1.0, 2.0]),
        make("float32", 0, [1.0], width=513),
    ):
        rows = (
            norms_section(compare_variants(group([reference, other], vary=["model.head_precision"])))
            .blocks[1]
            .rows
        )
        assert rows[1][4:] == ("not compared",) * 2


def test_norms_that_are_no_numbers_any_more(make: Make) -> None:
    runs = [make("bfloat16", 0, [1.0, float("inf")], 32), make("float32", 0, [1.0, 2.0], 32)]
    rows = norms_section(compare_variants(group(runs))).blocks[1].rows
    assert rows[0][1:4] == ("–", "–", "–") and rows[1][4] == "not compared"


def test_none_were_logged(make: Make) -> None:
    (text,) = norms_section(compare_variants(group([make("float32", 0, [])]))).blocks
    assert text.kind == "missing" and "activation_norms_every" in text.text
