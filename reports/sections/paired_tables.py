"""Tables of variants side by side with their paired differences, and what is not compared."""

from reports.data.comparison import Comparison
from reports.data.differences import Difference
from reports.render.document import Table, Text
from reports.render.formatting import DASH, gap, in_one_row, interval, number, plural


def comparison_tables(comparison: Comparison, names: list[str], ratio: bool) -> list[Table]:
    """A row a metric: mean ± deviation of each variant, and the paired differences.

    Two variants fit into one table; the differences of more are in a table of their own, one cell a variant.
    ratio: give the reference over the variant as well.
    """
    variants = comparison.study.variants
    reference, *others = variants
    header = [
        "metric",
        *(f"{variant.label} (n\u00a0=\u00a0{len(variant.runs)})" for variant in variants),
    ]
    rows = [
        [comparison.rows[name].metric.heading, *in_one_row(comparison.rows[name].spreads)] for name in names
    ]
    text = (
        "↓ lower is better, ↑ higher is better. Mean ± standard deviation; digits follow the standard error."
    )
    if len(others) == 1:
        header += ["difference", "95 % interval", "pairs"] + (
            [f"{reference.label} / {others[0].label}"] if ratio else []
        )
        for row, name in zip(rows, names, strict=True):
            row += _difference_cells(comparison.difference(others[0], name), ratio)
        return [_table(header, rows, text, frozenset({0, header.index("95 % interval")}))]
    tables = [_table(header, rows, text, frozenset({0}))]
    if others:
        title = f"Paired differences against {reference.label} with 95 % intervals and the number of pairs"
        title += f"; ratio: {reference.label} over the variant." if ratio else "."
        cells = [
            [row.metric.heading, *(_in_one_cell(d, ratio) for d in row.differences)]
            for row in (comparison.rows[name] for name in names)
        ]
        labels = ["metric", *(variant.label for variant in others)]
        tables.append(_table(labels, cells, title, frozenset(range(len(labels)))))
    return tables


def _table(header: list[str], rows: list[list[str]], caption: str, words: frozenset[int]) -> Table:
    return Table(tuple(header), tuple(map(tuple, rows)), caption, words)


def _in_one_cell(d: Difference, ratio: bool) -> str:
    if d.paired is None:
        return "not compared"
    gap, interval, pairs, *quotient = _difference_cells(d, ratio)
    return ", ".join(
        [f"{gap} {interval}", plural(int(pairs), "pair"), *(f"ratio {text}" for text in quotient)]
    )


def _difference_cells(d: Difference, ratio: bool) -> list[str]:
    """Difference, interval, number of pairs and, if wanted, reference over variant."""
    if d.paired is None:
        return [DASH, "not compared", "0"] + ([DASH] if ratio else [])
    cells = [gap(d.paired), interval(d.paired), str(d.paired.count)]
    if ratio:
        ratio_of_means = (
            None if d.reference_mean is None or not d.variant_mean else d.reference_mean / d.variant_mean
        )
        cells.append(DASH if ratio_of_means is None else f"{number(ratio_of_means, 3)}×")
    return cells


def refusals(comparison: Comparison, names: list[str]) -> list[Text]:
    """Which metrics were not subtracted: one text for each reason and the variants that it concerns."""
    refused: dict[tuple[str, str], list[str]] = {}
    for variant in comparison.study.variants[1:]:
        titles: dict[str, list[str]] = {}
        for d in (comparison.difference(variant, name) for name in names):
            if d.reason:
                some = "some pairs only: " if d.paired else ""
                titles.setdefault(some + d.reason, []).append(d.metric.title)
        for reason, metrics in titles.items():
            refused.setdefault((reason, ", ".join(metrics)), []).append(variant.label)
    return [
        Text(f"Not compared – {reason}. Variants: {'; '.join(labels)}. Metrics: {metrics}.", "warning")
        for (reason, metrics), labels in refused.items()
    ]
