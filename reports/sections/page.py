"""The report's sections of numbers and curves: metrics, curves, cost."""

from reports.data.differences import cost_names, few_images, main_names, metric_names
from reports.data.metric_catalogue import describe
from reports.data.study import Study, loss_groups, overlapping, show
from reports.render.document import Figure, Section, Text, code
from reports.render.figures import (
    by_scale_figure,
    curves_figure,
    other_names,
    sampling_figure,
    scale_kinds,
)
from reports.sections.comparison import comparison_tables, refusals
from reports.sections.guidance import guidance_blocks
from reports.sections.summary import pairs_note
from switti.metrics.config import ENOUGH_IMAGES

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
        f"{code(run.name)} ({run.record.get('step')})" for run in study.runs if run.record.get("step") != last
    ]:
        text = f"Ended before step {last}: {', '.join(early)}. Means take each run at its own end, differences do not."
        section.blocks.append(Text(text, "warning"))
    if len(study.variants) > 1:
        section.blocks += [Text(pairs_note(study), "note"), *refusals(study, names)]
    section.blocks += [*_evaluated(study), *_too_few(study, names)]
    settings = [run.evaluation.settings for run in study.runs if run.evaluation]
    keys = sorted({key for chosen in settings for key in chosen})
    if unlike := [key for key in keys if len({show(chosen.get(key)) for chosen in settings}) > 1]:
        text = f"The evaluations sampled with different settings: {', '.join(unlike)}."
        section.blocks.append(Text(text, "warning"))
    if not any(run.evaluation for run in study.runs) and not _of_tokenizers(study):
        section.blocks.append(_no_evaluation("Distances and scores of many generated images"))
    return section


def _evaluated(study: Study) -> list[Text]:
    """Of what the evaluated numbers were taken."""
    found = {
        f"{run.evaluation.pictures} captions of the {run.evaluation.captions} split, step {run.evaluation.step}"
        for run in study.runs
        if run.evaluation and run.evaluation.pictures
    }
    text = f"Evaluated on {'; on '.join(sorted(found))}."
    return [Text(text, "note")] if found else []


def _too_few(study: Study, names: list[str]) -> list[Text]:
    """Which distances were taken over so few images that they say little."""
    found: dict[int, list[str]] = {}
    for name in names:
        if few := few_images(study.runs, name):
            found.setdefault(few, []).append(describe(name).title)
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


def curves_section(study: Study) -> Section:
    """Every logged curve; losses in one figure only where they share a scale."""
    spaces, figures = loss_groups(study), list[Figure | None]()
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
    figures += [curves_figure(study, study.variants, "optimisation", _MAIN_FIGURES[2:])]
    rest = other_names(study, {*_MAIN_FIGURES, *pictures, "norms/last/mean", "norms/last/max"})
    figures += [curves_figure(study, study.variants, "other", rest, "Other logged curves.")]
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


def cost_section(study: Study) -> Section:
    """Time and memory of training and sampling."""
    section, names = Section("cost", "Time and memory"), cost_names(study.runs)
    if names:
        section.blocks += comparison_tables(study, names, ratio=True)
        section.blocks += refusals(study, names)
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
    """What wall-clock times of these runs cannot bear."""
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
