"""The answer in sentences, each computed from the paired differences of one metric."""

from switti.report.formatting import interval, number, plural, signed
from switti.report.study import Study, Variant
from switti.report.values import Difference, difference, metric_names

# What a reader asks first: quality of the model, of the pictures, their fit to the text, and what it costs.
_HEADLINES = (
    ("validation/loss",),
    ("evaluation/fid", "evaluation/fid_inception", "evaluation/fid_alexnet", "metrics/fid_alexnet"),
    (
        "evaluation/pick_score_v1",
        "evaluation/mini_clip_score",
        "metrics/pick_score_v1",
        "metrics/mini_clip_score",
    ),
    ("time/step_seconds", "time/samples_per_second"),
    ("sampling/seconds_per_picture",),
    ("memory/peak_gib", "training/peak_gib"),
)


def verdict(study: Study) -> list[str]:
    """One sentence for each headline metric that exists and each variant against the reference."""
    if len(study.variants) < 2:
        return [
            f"Nothing to compare: {plural(len(study.runs), 'run')} of one variant. The page shows "
            "the runs alone; give runs that differ in a setting for paired differences."
        ]
    known = set(metric_names(study.runs))
    sentences = []
    for variant in study.variants[1:]:
        for choices in _HEADLINES:
            if name := next((name for name in choices if name in known), None):
                sentences.append(_sentence(difference(study, variant, name)))
    return sentences or ["No metric that this report can judge has been logged yet."]


def _sentence(d: Difference) -> str:
    if d.paired is None:
        return f"{d.metric.title}: {d.variant} and {d.reference} are not compared – {d.reason}."
    outcome = _outcome(d)
    numbers = (
        f"{number(d.variant_mean)} against {number(d.reference_mean)}, difference {signed(d.paired.mean)}"
    )
    return f"{d.metric.title}: {d.variant} {outcome} {d.reference} ({numbers}, {_evidence(d)})."


def _outcome(d: Difference) -> str:
    paired = d.paired
    if paired is None or paired.mean == 0:
        return "equals"
    word = "higher" if paired.mean > 0 else "lower"
    if d.metric.better:
        word += ", which is better," if word == d.metric.better else ", which is worse,"
    if paired.firm:
        return f"is {word} than"
    return (
        f"came out {word} than"
        if paired.one_sided
        else f"on average came out {word} but is not told apart from"
    )


def _evidence(d: Difference) -> str:
    """What the sentence rests on, with the odds that chance alone would do it where pairs are few."""
    paired = d.paired
    if paired is None or paired.count == 1:
        return "one pair, no interval"
    text = f"95 % interval {interval(paired)}, {plural(paired.count, 'pair')}"
    if paired.one_sided and not paired.firm:
        text += f"; all pairs agree, which chance alone gives in {paired.chance:.0%} of such studies"
    return text


def pairs_note(study: Study) -> str:
    """How differences are made, with the warning that few pairs deserve."""
    counts = [len(study.pairs(variant)) for variant in study.variants[1:]]
    text = (
        f"Differences are variant − {study.variants[0].label}, paired by `{study.pair_by}`: runs of one seed "
        "share data order, caption dropping, sampling noise and, where the architectures agree, initial weights. "
        "Intervals: percentile bootstrap over pairs, "
        "10 000 resamples, 95 %. A curve's final value is its last one; training curves use the mean of the last "
        "tenth, speed the median. Runs of unequal length are compared at their last common step."
    )
    if counts and min(counts) < 6:
        text += (
            " With fewer than six pairs such an interval is too narrow: it cannot reach beyond the differences seen. "
            "Read it as their range; only six or more agreeing pairs make chance alone less likely than 5 %."
        )
    return text


def label_variants(variants: tuple[Variant, ...]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *rest, last = [
        variant.label if "," not in variant.label else f"({variant.label})" for variant in variants
    ]
    return f"{', '.join(rest)} and {last}" if rest else last
