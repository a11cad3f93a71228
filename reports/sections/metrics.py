"""Sections of numbers and curves: final metrics, curves, time and memory."""

from reports.data.comparability import overlapping
from reports.data.comparison import Comparison
from reports.data.metric_catalogue import split_of
from reports.data.study import Study, show
from reports.render.document import Figure, Section, Text, code
from reports.render.figures import (
    by_scale_figure,
    curves_figure,
    other_names,
    sampling_figure,
    scale_kinds,
)
from reports.sections.guidance import guidance_blocks
from reports.sections.paired_tables import comparison_tables, refusals
from reports.sections.summary import pairs_note
from switti.metrics.config import ENOUGH_IMAGES

_MAIN_FIGURES = (
    "train/loss",
    "validation/loss",
    "train/gradient_norm",
    "train/learning_rate",
    "train/codebook_use",
)


def metrics_section(comparison: Comparison) -> Section:
    """Final values of the results of training, and the limits of their comparison."""
    study, names = comparison.study, comparison.main_names
    if not names:
        text = "No metrics yet: `python -m experiments.train` writes `metrics.csv` into a run's folder."
        return Section("metrics", "Final metrics", [Text(text, "missing")])
    section = Section("metrics", "Final metrics", [*comparison_tables(comparison, names, ratio=False)])
    last = max(run.record.get("step") or 0 for run in study.runs)
    if early := [
        f"{code(run.name)} ({run.record.get('step')})" for run in study.runs if run.record.get("step") != last
    ]:
        text = f"Ended before step {last}: {', '.join(early)}. Means take each run at its own end, differences do not."
        section.blocks.append(Text(text, "warning"))
    if len(study.variants) > 1:
        section.blocks += [Text(pairs_note(study), "note"), *refusals(comparison, names)]
    section.blocks += [*_evaluated(study), *_too_few(comparison)]
    settings = [run.evaluation.settings for run in study.runs if run.evaluation]
    keys = sorted({key for chosen in settings for key in chosen})
    if unlike := [key for key in keys if len({show(chosen.get(key)) for chosen in settings}) > 1]:
        text = f"The evaluations sampled with different settings: {', '.join(unlike)}."
        section.blocks.append(Text(text, "warning"))
    if not any(run.evaluation for run in study.runs) and not _of_tokenizers(study):
        section.blocks.append(_no_evaluation("Distances and scores of many generated images"))
    return section


def _evaluated(study: Study) -> list[Text]:
    """Captions and step that the evaluated numbers were taken at."""
    found = {
        f"{run.evaluation.images} captions of the {run.evaluation.captions} split, step {run.evaluation.step}"
        for run in study.runs
        if run.evaluation and run.evaluation.images
    }
    text = f"Evaluated on {'; on '.join(sorted(found))}."
    return [Text(text, "note")] if found else []


def _too_few(comparison: Comparison) -> list[Text]:
    """Which distances were taken over so few images that they say little."""
    found: dict[int, list[str]] = {}
    for row in (comparison.rows[name] for name in comparison.main_names):
        if row.few_images:
            found.setdefault(row.few_images, []).append(row.metric.title)
    return [
        Text(
            f"{', '.join(titles)}: over {few} images, fewer than {ENOUGH_IMAGES}. A Fréchet distance is then far too "
            "high and a kernel distance noisy; compare them at equal numbers only, never with published ones.",
            "warning",
        )
        for few, titles in found.items()
    ]


def _of_tokenizers(study: Study) -> bool:
    """Tokenizer runs sample nothing, and their validation is the evaluation."""
    return study.runs[0].record.get("task") in ("tokenizer", "decoder")


def _no_evaluation(what: str) -> Text:
    text = f"{what}: no run has an `evaluation.json`. `python -m experiments.evaluate STUDY|RUN …` makes it."
    return Text(text, "missing")


def curves_section(comparison: Comparison) -> Section:
    """Every logged curve; losses in one figure only where they share a scale."""
    study, spaces, figures = comparison.study, comparison.loss_groups, list[Figure | None]()
    splits = [name for name in comparison.names if split_of(name) and name.endswith("/loss")]
    for i, variants in enumerate(spaces):
        suffix = f"_{i + 1}" if len(spaces) > 1 else ""
        figures += [
            curves_figure(comparison, variants, f"loss{suffix}", ("train/loss", "validation/loss", *splits)),
            *(
                by_scale_figure(comparison, variants, f"{kind}_by_scale{suffix}", kind)
                for kind in scale_kinds(variants)
            ),
        ]
    images = [name for name in comparison.names if name.startswith("metrics/")]
    figures += [curves_figure(comparison, study.variants, "metrics", images, "Metrics during training.")]
    figures += [curves_figure(comparison, study.variants, "optimization", _MAIN_FIGURES[2:])]
    rest = other_names(comparison, {*_MAIN_FIGURES, *splits, *images, "norms/last/mean", "norms/last/max"})
    figures += [curves_figure(comparison, study.variants, "other", rest, "Other logged curves.")]
    drawn = [figure for figure in figures if figure]
    section = Section("curves", "Curves", list(drawn))
    if len(spaces) > 1:
        text = (
            "Tokens or data differ between variants: their losses have no common scale and are drawn apart."
        )
        section.blocks.insert(0, Text(text, "warning"))
    if not drawn:
        section.blocks.append(Text("No curves yet: no run has a `metrics.csv` with values.", "missing"))
    return section


def cost_section(comparison: Comparison) -> Section:
    """Time and memory of training and sampling."""
    study, section = comparison.study, Section("cost", "Time and memory")
    if names := comparison.cost_names:
        section.blocks += comparison_tables(comparison, names, ratio=True)
        section.blocks += refusals(comparison, names)
    section.blocks += [*_clocks(study), *guidance_blocks(study)]
    if figure := sampling_figure(study):
        section.blocks.append(figure)
    measured = [run.evaluation.sampling for run in study.runs if run.evaluation and run.evaluation.sampling]
    if not measured and not _of_tokenizers(study):
        section.blocks.append(_no_evaluation("Sampling time and cache"))
    if len(stops := {show(sampling.guidance_stop) for sampling in measured}) > 1:
        text = f"Guidance stops at different scales ({', '.join(sorted(stops))}), which is part of the difference."
        section.blocks.append(Text(text, "warning"))
    return section


def _clocks(study: Study) -> list[Text]:
    """Limits of these runs' wall-clock times."""
    notes = [
        Text(
            "Times of training are wall-clock: they compare only if nothing else ran on the machine.",
            "note",
        )
    ]
    together = overlapping(study.runs)
    if together:
        names = "; ".join(f"{code(a.name)} and {code(b.name)}" for a, b in together[:3])
        more = f" and {len(together) - 3} more pairs" if len(together) > 3 else ""
        text = f"Trained at the same time on one host, so that their times are not their own: {names}{more}."
        notes.append(Text(text, "warning"))
    if len(hosts := {run.record.get("host") for run in study.runs}) > 1:
        text = f"The runs were timed on {len(hosts)} hosts; equal device names do not make equal speed."
        notes.append(Text(text, "note"))
    return notes
