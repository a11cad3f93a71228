"""The answer in sentences, each computed from the paired differences of one metric."""

from switti.report.document import Text, code
from switti.report.formatting import interval, number, percent, plural, signed
from switti.report.statistics import RESAMPLES, Paired
from switti.report.study import Study, Variant
from switti.report.values import Difference, difference, metric_names

# What a reader asks first: quality of the model, its stability, quality of the pictures, their fit to the text, cost.
_HEADLINES = (
    ("validation/loss",),
    ("validation/psnr",),
    ("validation/lpips",),
    ("norms/last/mean",),
    ("evaluation/fid", "evaluation/fid_inception", "evaluation/fid_alexnet", "metrics/fid_alexnet"),
    (
        "evaluation/pick_score_v1",
        "evaluation/mini_clip_score",
        "metrics/pick_score_v1",
        "metrics/mini_clip_score",
    ),
    ("time/step_seconds", "time/samples_per_second"),
    ("sampling/seconds_per_picture",),
    ("training/peak_gib", "memory/peak_gib"),
)


def verdict(study: Study) -> list[Text]:
    """For each variant against the reference: one sentence that sums up, then one for each headline metric."""
    if len(study.variants) < 2:
        text = f"Nothing to compare: {plural(len(study.runs), 'run')} of one variant. The page shows "
        return [
            Text(
                text + "the runs alone; give runs that differ in a setting for paired differences.", "summary"
            )
        ]
    known = set(metric_names(study.runs))
    names = [name for choices in _HEADLINES if (name := next((c for c in choices if c in known), None))]
    sentences: list[Text] = []
    for variant in study.variants[1:]:
        found = [difference(study, variant, name) for name in names]
        if found:
            sentences.append(Text(_summary(found), "summary"))
        if len(study.variants) == 2:  # with more the table below is the better place
            sentences += [Text(_sentence(d), "verdict") for d in found]
    return sentences or [Text("No metric that this report can judge has been logged yet.", "missing")]


def _summary(found: list[Difference]) -> str:
    """Which way each headline metric went, and how much weight that can bear."""
    judged: dict[str, list[str]] = {}
    for d in found:
        judged.setdefault(_judgement(d), []).append(d.metric.title)
    parts = [f"{word} in {_listed(judged[word])}" for word in ("better", "worse") if word in judged]
    others = ("lower", "higher", "not told apart", "equal", "not compared")
    parts += [f"{word}: {_listed(judged[word])}" for word in others if word in judged]
    return f"{found[0].variant} against {found[0].reference}: {'; '.join(parts)}.{_weight(found)}"


def _judgement(d: Difference) -> str:
    if d.paired is None:
        return "not compared"
    if d.paired.mean == 0:
        return "equal"
    if not d.paired.one_sided:
        return "not told apart"
    way = "higher" if d.paired.mean > 0 else "lower"
    if d.metric.better is None:  # neither way is
        return way
    return "better" if way == d.metric.better else "worse"


def _weight(found: list[Difference]) -> str:
    """The odds that chance alone makes all pairs agree, where pairs are too few for a firm statement."""
    counts = [d.paired.count for d in found if d.paired and d.paired.one_sided and not d.paired.firm]
    if not counts:
        return ""
    if min(counts) == 1:
        return " One pair shows which way it went once, not that it would again."
    chance = min(1.0, 2.0 * 0.5 ** min(counts))
    return f" With {min(counts)} pairs chance alone makes all agree in {percent(chance)} of studies: a hint only."


def _sentence(d: Difference) -> str:
    if d.paired is None:
        return f"{d.metric.title}: not compared – {d.reason}."
    both = d.reference_mean is not None and d.reference_mean > 0 and (d.variant_mean or 0) > 0
    relative = (
        f" ({signed(100 * d.paired.mean / d.reference_mean, 2)} %)" if both and d.reference_mean else ""
    )
    unit = f" {d.metric.unit}" if d.metric.unit else ""
    return (
        f"{d.metric.title}: {number(d.variant_mean)} against {number(d.reference_mean)}{unit}, difference "
        f"{signed(d.paired.mean)}{relative}, {_evidence(d.paired)}."
    )


def _evidence(paired: Paired) -> str:
    if paired.count == 1:
        return interval(paired)
    apart = "" if paired.one_sided or not any(paired.differences) else ", which do not agree"
    return f"95 % interval {interval(paired)} over {plural(paired.count, 'pair')}{apart}"


def _listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def pairs_note(study: Study) -> str:
    """How differences are made, with the warning that few pairs deserve."""
    counts = [len(study.pairs(variant)) for variant in study.variants[1:]]
    shared = "share data order, caption dropping, sampling noise and, where the architectures agree, initial weights"
    seeds = f" Runs of one seed {shared}." if study.pair_by == "seed" else ""
    text = (
        f"Differences are variant − {study.variants[0].label}, paired by {code(study.pair_by)}.{seeds} "
        f"Intervals: percentile bootstrap over pairs, {RESAMPLES} resamples, 95 %. A curve's final value is its last "
        "one; training curves use the mean of the last tenth, speed the median. Runs of unequal length are compared "
        "at their last common step."
    )
    if counts and min(counts) < 6:
        text += (
            " With fewer than six pairs such an interval is too narrow: it cannot reach beyond the differences seen. "
            "Read it as their range; only six or more agreeing pairs make chance alone less likely than 5 %."
        )
    return text


def label_variants(variants: tuple[Variant, ...]) -> str:
    """The variants in one phrase, for the title."""
    return _listed(
        [variant.label if "," not in variant.label else f"({variant.label})" for variant in variants]
    )
