"""The comparison of a study: one table of numbers, computed once, from which everything else is shown."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import synthetic_runs as maker

from reports.build import write_report
from reports.data import comparison
from reports.data.comparison import compare_variants
from reports.data.final_values import final
from reports.data.runs import find_runs, read_run
from reports.data.study import Study, group


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = maker.write_study(tmp_path_factory.mktemp("runs"))
    return group([read_run(path) for path in find_runs([str(folder)])])


def test_a_report_computes_each_paired_difference_once(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: Counter[tuple[str, str]] = Counter()

    def counted(metric: Any, study: Study, variant: Any, pairs: Any) -> Any:
        computed[metric.name, variant.label] += 1
        return original(metric, study, variant, pairs)

    original = comparison.paired_difference
    monkeypatch.setattr(comparison, "paired_difference", counted)
    write_report(study, tmp_path / "report")
    assert set(computed.values()) == {1}
    assert ("validation/loss", study.variants[1].label) in computed


def test_rows_hold_every_metric_of_every_variant(study: Study) -> None:
    found = compare_variants(study)
    reference, other = study.variants
    for name, row in found.rows.items():
        assert row.metric.name == name and len(row.spreads) == 2 and len(row.differences) == 1
        assert row.differences[0] is found.difference(other, name)
        for run in study.runs:
            assert found.final(run, name) == final(run, name)
    assert found.spread(reference, "validation/loss").count == len(reference.runs)
    assert found.spread(reference, "no/such metric") is None
    assert {"validation/loss", "training/seconds"} <= set(found.names)
    assert "training/seconds" in found.cost_names and "training/seconds" not in found.main_names


def test_variants_are_numbered_in_their_order(study: Study) -> None:
    assert [variant.number for variant in study.variants] == [0, 1]
