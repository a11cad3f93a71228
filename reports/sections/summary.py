"""Summary in sentences, each computed from the paired differences of one metric."""

from reports.data.comparison import Comparison
from reports.data.differences import Difference
from reports.data.final_values import scale_numbers
from reports.data.statistics import RESAMPLES, Paired
from reports.data.study import Study, Variant
from reports.render.document import Text, code
from reports.render.formatting import gap, interval, number, percent, plural, signed


def learning(comparison: Comparison) -> list[Text]:
    """A warning first of all if a variant has not learned anything yet."""
    variants = comparison.study.variants
    untrained = [variant for variant in variants if learned_scales(comparison, variant) == []]
    if not untrained:
        return []
    reason = "no scale is below its unigram entropy yet (nothing has been learned)"
    if len(untrained) < len(variants):
        return [Text(f"{_listed([v.label for v in untrained])}: {reason}.", "summary")]
    rest = ": differences between variants are those of untrained models" if len(variants) > 1 else ""
    return [Text(f"{reason[0].upper()}{reason[1:]}{rest}.", "summary")]


def leader(comparison: Comparison) -> list[Text]:
    """Which of many variants has the best mean of the first headline metric, among those that compare."""
    reference, *others = comparison.study.variants
    for name in comparison.headline_names:
        metric = comparison.rows[name].metric
        compared = [v for v in others if comparison.difference(v, name).paired]
        means = [(s.mean, v.label) for v in (reference, *compared) if (s := comparison.spread(v, name))]
        if metric.better is None or len(means) < 2:
            continue
        mean, label = (min if metric.better == "lower" else max)(means)
        text = f"Of {len(means)} variants {label} has the best {metric.title}: {number(mean)}"
        text += "" if label == reference.label else f" against {number(means[0][0])} of {reference.label}"
        return [Text(f"{text}. The plot shows the differences, the list below their uncertainty.", "summary")]
    return []


def learned_scales(comparison: Comparison, variant: Variant) -> list[int] | None:
    """Scales whose final validation loss is below their unigram entropy; None where that was not logged."""
    learned, known = list[int](), False
    for k in scale_numbers([variant], "validation/loss_by_scale"):
        loss = comparison.spread(variant, f"validation/loss_by_scale/{k}")
        entropy = comparison.spread(variant, f"validation/unigram_entropy_by_scale/{k}")
        if loss and entropy:
            known = True
            learned += [k] if loss.mean < entropy.mean else []
    return learned if known else None


def verdict(comparison: Comparison) -> list[Text]:
    """For each variant against the reference: one sentence that sums up, then one for each headline metric."""
    study = comparison.study
    if len(study.variants) < 2:
        text = f"Nothing to compare: {plural(len(study.runs), 'run')} of one variant. The page shows "
        return [
            Text(
                text + "the runs alone; give runs that differ in a setting for paired differences.", "summary"
            )
        ]
    sentences: list[Text] = []
    for variant in study.variants[1:]:
        differences = [comparison.difference(variant, name) for name in comparison.headline_names]
        if differences:
            sentences.append(Text(_summary(comparison, differences), "summary"))
        if len(study.variants) == 2:  # with more the table below is the better place
            sentences += [Text(_sentence(comparison, d), "verdict") for d in differences]
    return sentences or [Text("No metric that this report can summarize has been logged yet.", "missing")]


def _title(comparison: Comparison, d: Difference) -> str:
    few = comparison.rows[d.metric.name].few_images
    return f"{d.metric.title} (over {few} images only)" if few else d.metric.title


def _summary(comparison: Comparison, differences: list[Difference]) -> str:
    """Direction in which each headline metric went, with a caution where pairs are few."""
    judged: dict[str, list[str]] = {}
    for d in differences:
        judged.setdefault(_judgement(d), []).append(_title(comparison, d))
    parts = [f"{word} in {_listed(judged[word])}" for word in ("better", "worse") if word in judged]
    others = ("lower", "higher", "no clear difference", "equal", "not compared")
    parts += [f"{word}: {_listed(judged[word])}" for word in others if word in judged]
    return f"{differences[0].variant} against {differences[0].reference}: {'; '.join(parts)}.{_weight(differences)}"


def _judgement(d: Difference) -> str:
    if d.paired is None:
        return "not compared"
    if d.paired.mean == 0:
        return "equal"
    if not d.paired.one_sided:
        return "no clear difference"
    way = "higher" if d.paired.mean > 0 else "lower"
    if d.metric.better is None:  # neither way is
        return way
    return "better" if way == d.metric.better else "worse"


def _weight(differences: list[Difference]) -> str:
    """The odds that chance alone makes all pairs agree, where pairs are too few for a firm statement."""
    counts = [d.paired.count for d in differences if d.paired and d.paired.one_sided and not d.paired.firm]
    if not counts:
        return ""
    if min(counts) == 1:
        return " One pair shows which way it went once, not that it would again."
    chance = min(1.0, 2.0 * 0.5 ** min(counts))
    return f" With {min(counts)} pairs chance alone makes all agree in {percent(chance)} of studies: a hint only."


def _sentence(comparison: Comparison, d: Difference) -> str:
    title = _title(comparison, d)
    if d.paired is None:
        return f"{title}: not compared – {d.reason}."
    both = d.reference_mean is not None and d.reference_mean > 0 and (d.variant_mean or 0) > 0
    relative = (
        f" ({signed(100 * d.paired.mean / d.reference_mean, 2)} %)" if both and d.reference_mean else ""
    )
    unit = f" {d.metric.unit}" if d.metric.unit else ""
    return (
        f"{title}: {number(d.variant_mean)} against {number(d.reference_mean)}{unit}, difference "
        f"{gap(d.paired)}{relative}, {_evidence(d.paired)}."
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
    """How differences are computed, with a warning where pairs are few."""
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
