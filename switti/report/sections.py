"""The report's sections of numbers and curves: metrics, curves, scales, cost."""

from switti.report.comparison import comparison_tables, refusals
from switti.report.document import Figure, Section, Table, Text
from switti.report.figures import (
    by_scale_figure,
    curves_figure,
    entropy,
    norms_figure,
    other_names,
    sampling_figure,
    scale_kinds,
    scales,
)
from switti.report.formatting import DASH, interval, number, plus_minus, signed
from switti.report.study import Study, Variant, scale_sides, show, token_spaces
from switti.report.values import cost_names, difference, main_names, metric_names, summary
from switti.report.verdict import pairs_note

_MAIN_FIGURES = (
    "train/loss",
    "validation/loss",
    "train/gradient_norm",
    "train/learning_rate",
    "train/codebook_use",
)


def metrics_section(study: Study) -> Section:
    names = main_names(study.runs)
    if not names:
        text = "No metrics yet: `python -m experiments.train` writes `metrics.csv` into a run's folder."
        return Section("metrics", "Final metrics", [Text(text, "missing")])
    section = Section("metrics", "Final metrics", [*comparison_tables(study, names, ratio=False)])
    last = max(run.record.get("step") or 0 for run in study.runs)
    if early := [
        f"`{run.name}` ({run.record.get('step')})" for run in study.runs if run.record.get("step") != last
    ]:
        text = f"Ended before step {last}: {', '.join(early)}. Means take each run at its own end, differences do not."
        section.blocks.append(Text(text, "warning"))
    if len(study.variants) > 1:
        section.blocks += [Text(pairs_note(study), "note"), *refusals(study, names)]
    settings = [run.evaluation.settings for run in study.runs if run.evaluation]
    keys = sorted({key for chosen in settings for key in chosen})
    if unlike := [key for key in keys if len({show(chosen.get(key)) for chosen in settings}) > 1]:
        text = f"The evaluations sampled with different settings: {', '.join(unlike)}."
        section.blocks.append(Text(text, "warning"))
    if not any(run.evaluation for run in study.runs) and not _of_tokenizers(study):
        section.blocks.append(_no_evaluation("Metrics on the whole validation set"))
    return section


def _of_tokenizers(study: Study) -> bool:
    """Tokenizer runs sample nothing, and their validation is the evaluation."""
    return study.runs[0].record.get("task") in ("tokenizer", "decoder")


def _no_evaluation(what: str) -> Text:
    return Text(
        f"{what}: no run has an `evaluation.json`. `python -m experiments.evaluate RUN` makes it.", "missing"
    )


def curves_section(study: Study) -> Section:
    """Every logged curve; losses in one figure only where they share a scale."""
    spaces, figures = token_spaces(study), list[Figure | None]()
    for i, variants in enumerate(spaces):
        suffix = f"_{i + 1}" if len(spaces) > 1 else ""
        figures += [
            curves_figure(study, variants, f"loss{suffix}", ("train/loss", "validation/loss")),
            *(
                by_scale_figure(study, variants, f"{kind}_by_scale{suffix}", kind)
                for kind in scale_kinds(variants)
            ),
        ]
    names = metric_names(study.runs)
    pictures = [name for name in names if name.startswith("metrics/")]
    figures += [curves_figure(study, study.variants, "metrics", pictures, "Metrics during training.")]
    figures += [norms_figure(study)]
    figures += [curves_figure(study, study.variants, "optimisation", _MAIN_FIGURES[2:])]
    rest = other_names(study, {*_MAIN_FIGURES, *pictures, "norms/last/mean", "norms/last/max"})
    figures += [curves_figure(study, study.variants, "other", rest, "Other logged curves.")]
    drawn = [figure for figure in figures if figure]
    section = Section("curves", "Curves", list(drawn))
    if len(spaces) > 1:
        text = "Token spaces differ between variants: their losses have no common scale and are drawn apart."
        section.blocks.insert(0, Text(text, "warning"))
    if not drawn:
        section.blocks.append(Text("No curves yet: no run has a `metrics.csv` with values.", "missing"))
    return section


def scales_section(study: Study) -> Section:
    """Final validation loss of each scale against what knowing only the token frequencies would give."""
    section = Section("scales", "Loss of each scale")
    for variants in token_spaces(study):
        sides = scale_sides(variants[0].runs[0])
        others = [v for v in variants if v is not study.variants[0]] if study.variants[0] in variants else []
        rows = []
        for k in scales(variants, "validation/loss_by_scale"):
            level = entropy(variants, k)
            means = [summary(variant, f"validation/loss_by_scale/{k}") for variant in variants]
            row = [str(k), f"{sides[k]}×{sides[k]}" if k < len(sides) else DASH, number(level)]
            row += [plus_minus(mean) for mean in means]
            row += [signed(mean.mean - level) if mean and level is not None else DASH for mean in means]
            row += _scale_differences(study, others, k)
            rows.append(tuple(row))
        if rows:
            header = ["scale", "tokens", "unigram entropy", *(variant.label for variant in variants)]
            header += [f"{variant.label} − entropy" for variant in variants]
            header += [f"{variant.label} − {study.variants[0].label}, paired" for variant in others]
            section.blocks.append(Table(tuple(header), tuple(rows), "Final validation loss, nats a token."))
    if section.blocks:
        text = (
            "The unigram entropy is the loss of a model that knows how often each token occurs at a scale and "
            "nothing else. A difference near 0 means that the scale has not been learnt beyond that."
        )
        section.blocks.append(Text(text, "note"))
    else:
        section.blocks.append(Text("No validation loss by scale in any `metrics.csv`.", "missing"))
    return section


def _scale_differences(study: Study, others: list[Variant], scale: int) -> list[str]:
    found = [difference(study, variant, f"validation/loss_by_scale/{scale}").paired for variant in others]
    return [f"{signed(paired.mean)} {interval(paired)}" if paired else DASH for paired in found]


def cost_section(study: Study) -> Section:
    """Time and memory of training and sampling."""
    section, names = Section("cost", "Time and memory"), cost_names(study.runs)
    if names:
        section.blocks += comparison_tables(study, names, ratio=True)
        section.blocks += refusals(study, names)
    if figure := sampling_figure(study):
        section.blocks.append(figure)
    measured = [run.evaluation.sampling for run in study.runs if run.evaluation and run.evaluation.sampling]
    if not measured and not _of_tokenizers(study):
        section.blocks.append(_no_evaluation("Sampling time and cache"))
    if len(stops := {show(sampling.guidance_stop) for sampling in measured}) > 1:
        text = f"Guidance stops at different scales ({', '.join(sorted(stops))}), which is part of the difference."
        section.blocks.append(Text(text, "warning"))
    if len(hosts := {run.record.get("host") for run in study.runs}) > 1:
        text = f"The runs were timed on {len(hosts)} hosts; equal device names do not make equal speed."
        section.blocks.append(Text(text, "note"))
    return section
