"""The cost of guidance and of attention: each variant sampled with guidance everywhere and stopped early."""

from collections.abc import Sequence
from statistics import median

from reports.data.comparability import obstacle, scale_sides
from reports.data.metric_catalogue import Metric
from reports.data.runs import Run, Sampling
from reports.data.statistics import Ratio, paired_ratio, spread
from reports.data.study import Study, Variant
from reports.render.document import Block, Table, Text
from reports.render.formatting import DASH, plural, plus_minus, ratio_interval

# A variant, and whether guidance is stopped early.
Way = tuple[Variant, bool]
_COST = Metric("sampling/seconds_total", "sampling time", needs="cost")


def guidance_blocks(study: Study) -> list[Block]:
    """A table of sampling times as ratios to the reference variant as configured, and one of milliseconds by scale."""
    ways = _ways(study)
    if not ways:
        return []
    reference, processor = study.variants[0], all(timed.processor for timed in _timings(study))
    rows = []
    for variant, early in ways:
        cells = [variant.label, _guidance(variant, early), _milliseconds(variant, early)]
        cells.append(_ratio_cell(study, (variant, early), (reference, False)))
        cells.append(_ratio_cell(study, (variant, early), (variant, False)))
        if processor:
            cells.append(_ratio_cell(study, (variant, early), (reference, False), processor=True))
        rows.append(tuple(cells))
    title = f"{reference.label}, guidance {_guidance(reference, False)}"
    header = ["variant", "guidance", "ms a batch", f"time / {title}", "time / same variant, as configured"]
    header += [f"processor time / {title}"] if processor else []
    caption = (
        "Sampling time of the generator alone. Ratios are geometric means over pairs with 95 % intervals; below 1 is "
        "faster."
    )
    blocks: list[Block] = [Table(tuple(header), tuple(rows), caption, frozenset({0, 1, 3, 4, 5}))]
    if reasons := _refusals(study):
        blocks.append(Text(f"Not compared – {'; '.join(reasons)}.", "warning"))
    return [*blocks, _how_timed(study), *_by_scale(study, ways)]


def _ways(study: Study) -> list[Way]:
    """(variant, stopped early?) for everything that any run has been timed with."""
    return [
        (variant, early)
        for variant in study.variants
        for early in (False, True)
        if any(timing(run, early) for run in variant.runs)
    ]


def timing(run: Run, early: bool) -> Sampling | None:
    """Timing with guidance as configured, or stopped early; None if it was not measured."""
    if run.evaluation is None:
        return None
    timed = run.evaluation.stopped_early if early else run.evaluation.sampling
    return timed if timed and timed.seconds_total else None


def _guidance(variant: Variant, early: bool) -> str:
    stops = {timed.guidance_stop for run in variant.runs if (timed := timing(run, early))}
    if len(stops) != 1:
        return "stopped early" if early else "as configured"
    stop = stops.pop()
    return "everywhere" if stop is None else f"off from scale {stop} on"


def _milliseconds(variant: Variant, early: bool) -> str:
    seconds = [timed.seconds_total for run in variant.runs if (timed := timing(run, early))]
    times = [1000 * value for value in seconds if value is not None]
    return plus_minus(spread(times)) if times else DASH


def time_ratio(a: Sampling, b: Sampling, processor: bool = False) -> float:
    """Time of `a` over that of `b`: the median over rounds if both were timed in turn, else of the totals."""
    if processor:
        return median(a.processor) / median(b.processor)
    if timed_in_turn(a, b):
        return median(x / y for x, y in zip(a.rounds, b.rounds, strict=True))
    return (a.seconds_total or 0.0) / (b.seconds_total or 1.0)


def timed_in_turn(a: Sampling, b: Sampling) -> bool:
    return bool(a.together) and a.together == b.together and len(a.rounds) == len(b.rounds) > 0


def _timings(study: Study) -> list[Sampling]:
    return [timed for run in study.runs for early in (False, True) if (timed := timing(run, early))]


def _pairs(study: Study, way: Way, other: Way) -> list[tuple[Sampling, Sampling]]:
    """Timings of runs with one pairing value that may be compared: (of `way`, of `other`)."""
    partners = {str(run.setting(study.pair_by)): run for run in other[0].runs}
    pairs = []
    for run in way[0].runs:
        partner = partners.get(str(run.setting(study.pair_by)))
        if partner is None or _obstacle(partner, run):
            continue
        a, b = timing(run, way[1]), timing(partner, other[1])
        if a and b:
            pairs.append((a, b))
    return pairs


def _obstacle(a: Run, b: Run) -> str | None:
    batches = {timed.batch for run in (a, b) if (timed := timing(run, False))}
    if len(batches) > 1:
        return "sampled with different batch sizes"
    return obstacle(_COST, a, b)


def _refusals(study: Study) -> list[str]:
    reasons = {
        reason
        for variant in study.variants[1:]
        for _, a, b in study.pairs(variant)
        if timing(a, False) and timing(b, False) and (reason := _obstacle(a, b))
    }
    return sorted(reasons)


def ratio(study: Study, way: Way, other: Way, processor: bool = False) -> Ratio | None:
    """Sampling time of one way over that of another, paired; None where nothing pairs."""
    pairs = _pairs(study, way, other)
    return paired_ratio([time_ratio(a, b, processor) for a, b in pairs]) if pairs else None


def _ratio_cell(study: Study, way: Way, other: Way, processor: bool = False) -> str:
    if way == other:
        return "1"
    paired = ratio(study, way, other, processor)
    if paired is None:
        return "not compared"
    pairs = "" if paired.count == 1 else f", {plural(paired.count, 'pair')}"
    return ratio_interval(paired) + pairs


def _how_timed(study: Study) -> Text:
    timed = _timings(study)
    if all(timed_in_turn(timed[0], other) for other in timed):
        text = (
            "All were timed in turn, round by round in one process; a ratio is the median over rounds, which other "
            "load on the machine disturbs little. Milliseconds are as loaded as the machine was."
        )
        return Text(text, "note")
    text = (
        "Not all were timed in turn: ratios and milliseconds hold only if nothing else ran on the machine. "
        f"`python -m experiments.evaluate {study.name}` measures all runs of a study in turn."
    )
    return Text(text, "warning")


def _by_scale(study: Study, ways: Sequence[Way]) -> list[Block]:
    """Milliseconds at each scale, mean over the runs of a variant; only if all have the same scales."""
    columns = []
    for variant, early in ways:
        timings = [timing(run, early) for run in variant.runs]
        columns.append([timed.seconds_per_scale for timed in timings if timed and timed.seconds_per_scale])
    counts = {len(times) for column in columns for times in column}
    if len(counts) != 1 or not all(columns):
        return []
    sides = scale_sides(study.runs[0])
    rows = []
    for k in range(counts.pop()):
        cells = [plus_minus(spread([1000 * times[k] for times in column])) for column in columns]
        rows.append((str(k), f"{sides[k]}×{sides[k]}" if k < len(sides) else DASH, *cells))
    header = (
        "scale",
        "tokens",
        *(f"{variant.label}, {_guidance(variant, early)}" for variant, early in ways),
    )
    return [Table(header, tuple(rows), "Milliseconds of sampling at each scale, for one batch.")]
