"""The report's sections of text and tables: runs, settings, metrics, scales, cost, conventions."""

import math

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
from switti.report.formatting import DASH, duration, interval, moment, number, plus_minus, signed
from switti.report.metric_names import describe
from switti.report.runs import Run
from switti.report.study import MISSING, Study, Variant, differing, scale_sides, show, token_spaces
from switti.report.values import Difference, cost_names, difference, main_names, metric_names, summary
from switti.report.verdict import pairs_note

_MAIN_FIGURES = (
    "train/loss",
    "validation/loss",
    "train/gradient_norm",
    "train/learning_rate",
    "train/codebook_use",
)


def runs_section(study: Study) -> Section:
    """Provenance of every run, with what is unfinished or not reproducible flagged."""
    header = ("run", "variant", study.pair_by, "status", "step", "commit", "device", "started", "trained for")
    rows = []
    for run in study.runs:
        record = run.record
        commit = str(record.get("commit") or "unknown")[:10] + (" (dirty)" if record.get("dirty") else "")
        step = f"{record.get('step', DASH)} / {record.get('max_steps', DASH)}"
        world = record.get("world_size") or 1
        device = f"{record.get('device') or 'unknown'}" + (f" × {world}" if world > 1 else "")
        variant = study.variant_of(run).label
        times = (moment(record.get("started")), duration(record.get("train_seconds")))
        pair = show(run.setting(study.pair_by))
        rows.append((run.name, variant, pair, _status(run), step, commit, device, *times))
    table = Table(header, tuple(rows), words=frozenset({0, 1, 3, 5, 6, 7}))
    return Section("runs", "Runs", [*_flags(study), table, _versions(study)])


def _status(run: Run) -> str:
    status = str(run.record.get("status") or "unknown")
    return status if run.finished else f"⚠ {status}"


def _flags(study: Study) -> list[Text]:
    flags = []
    for run in study.runs:
        if not run.finished:
            reason = f": {run.record['error']}" if run.record.get("error") else ""
            flags.append(
                f"`{run.name}` is {run.record.get('status') or 'of unknown status'}, not finished{reason}."
            )
        if diverged := [
            n for n, s in run.series.items() if n.endswith("/loss") and not math.isfinite(s.values[-1])
        ]:
            flags.append(f"`{run.name}` diverged: the last {' and '.join(diverged)} is not a finite number.")
    if dirty := [f"`{run.name}`" for run in study.runs if run.record.get("dirty")]:
        flags.append(f"Uncommitted changes were in the code of {', '.join(dirty)}.")
    if len({run.record.get("commit") for run in study.runs}) > 1:
        flags.append("The runs come from different commits.")
    if unpaired := [f"`{run.name}`" for run in study.unpaired]:
        flags.append(f"Without a partner, hence not in any difference: {', '.join(unpaired)}.")
    return [Text(flag, "warning") for flag in flags]


def _versions(study: Study) -> Text:
    """Versions once if all runs agree, otherwise each library's different ones."""
    names = sorted({name for run in study.runs for name in (run.record.get("versions") or {})})
    parts = []
    for name in names:
        used = sorted({str((run.record.get("versions") or {}).get(name, MISSING)) for run in study.runs})
        parts.append(f"{name} {' | '.join(used)}")
    hosts = sorted({str(run.record.get("host")) for run in study.runs if run.record.get("host")})
    return Text(
        "Versions: " + (", ".join(parts) or "not recorded") + f". Hosts: {', '.join(hosts) or 'unknown'}.",
        "note",
    )


def settings_section(study: Study) -> Section:
    """Only the settings that differ, the varied ones first."""
    table = differing(study.runs)
    if not table:
        return Section("settings", "Settings that differ", [Text("None: all runs have one config.", "note")])
    keys = sorted(table, key=lambda key: (key not in study.vary, key != study.pair_by, key))
    rows = tuple((key, *map(show, table[key])) for key in keys)
    header = ("setting", *(run.name for run in study.runs))
    section = Section(
        "settings", "Settings that differ", [Table(header, rows, words=frozenset(range(len(header))))]
    )
    loose = [key for key in keys if key not in (*study.vary, study.pair_by) and _within_variants(study, key)]
    if loose:
        names = ", ".join(f"`{key}`" for key in loose)
        section.blocks.insert(0, Text(f"{names} differ within a variant: its mean mixes them.", "warning"))
    return section


def _within_variants(study: Study, key: str) -> bool:
    return any(
        len({show(run.config.get(key, MISSING)) for run in variant.runs}) > 1 for variant in study.variants
    )


def metrics_section(study: Study) -> Section:
    names = main_names(study.runs)
    if not names:
        text = "No metrics yet: `python -m experiments.train` writes `metrics.csv` into a run's folder."
        return Section("metrics", "Final metrics", [Text(text, "missing")])
    section = Section("metrics", "Final metrics", [comparison_table(study, names, ratio=False)])
    if early := [run for run in study.runs if run.record.get("step") != study.runs[-1].record.get("step")]:
        stops = ", ".join(
            f"`{run.name}` at {run.record.get('step', DASH)}" for run in (*early, study.runs[-1])
        )
        text = f"Runs ended at different steps ({stops}); means take each at its own end, differences do not."
        section.blocks.append(Text(text, "warning"))
    if len(study.variants) > 1:
        section.blocks += [Text(pairs_note(study), "note"), *refusals(study, names)]
    if not any(run.evaluation for run in study.runs):
        section.blocks.append(_no_evaluation("Metrics on the whole validation set"))
    return section


def _no_evaluation(what: str) -> Text:
    return Text(
        f"{what}: no run has an `evaluation.json`. `python -m experiments.evaluate RUN` makes it.", "missing"
    )


def comparison_table(study: Study, names: list[str], ratio: bool) -> Table:
    """A row a metric: mean ± deviation of each variant, then the paired difference of each against the reference."""
    many = len(study.variants) > 2
    header = ["metric", *(f"{variant.label} (n = {len(variant.runs)})" for variant in study.variants)]
    for variant in study.variants[1:]:
        prefix = f"{variant.label}: " if many else ""
        header += [f"{prefix}difference", "95 % interval", "pairs"]
        header += [f"{study.variants[0].label} / {variant.label}"] if ratio else []
    rows = []
    for name in names:
        metric = describe(name)
        row = [metric.heading]
        row += [plus_minus(summary(variant, name)) for variant in study.variants]
        for variant in study.variants[1:]:
            row += _difference_cells(difference(study, variant, name), ratio)
        rows.append(tuple(row))
    words = frozenset({0} | {i for i, title in enumerate(header) if title == "95 % interval"})
    return Table(
        tuple(header), tuple(rows), "↓ lower is better, ↑ higher is better. Mean ± standard deviation.", words
    )


def _difference_cells(d: Difference, ratio: bool) -> list[str]:
    if d.paired is None:
        return [DASH, "not compared", "0"] + ([DASH] if ratio else [])
    cells = [signed(d.paired.mean), interval(d.paired), str(d.paired.count)]
    if ratio:
        both = d.reference_mean is not None and d.variant_mean
        cells.append(
            f"{number((d.reference_mean or 0) / d.variant_mean, 3)}×" if both and d.variant_mean else DASH
        )
    return cells


def refusals(study: Study, names: list[str]) -> list[Text]:
    """Which metrics were not subtracted: one text for each reason and the variants that it concerns."""
    found: dict[tuple[str, str], list[str]] = {}
    for variant in study.variants[1:]:
        titles: dict[str, list[str]] = {}
        for d in (difference(study, variant, name) for name in names):
            if d.reason:
                some = "some pairs only: " if d.paired else ""
                titles.setdefault(some + d.reason, []).append(d.metric.title)
        for reason, metrics in titles.items():
            found.setdefault((reason, ", ".join(metrics)), []).append(variant.label)
    return [
        Text(f"Not compared – {reason}. Variants: {'; '.join(labels)}. Metrics: {metrics}.", "warning")
        for (reason, metrics), labels in found.items()
    ]


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
        section.blocks.append(comparison_table(study, names, ratio=True))
        section.blocks += refusals(study, names)
    if figure := sampling_figure(study):
        section.blocks.append(figure)
    measured = [run.evaluation.sampling for run in study.runs if run.evaluation and run.evaluation.sampling]
    if not measured:
        section.blocks.append(_no_evaluation("Sampling time and cache"))
    if len(stops := {show(sampling.guidance_stop) for sampling in measured}) > 1:
        text = f"Guidance stops at different scales ({', '.join(sorted(stops))}), which is part of the difference."
        section.blocks.append(Text(text, "warning"))
    if len(hosts := {run.record.get("host") for run in study.runs}) > 1:
        text = f"The runs were timed on {len(hosts)} hosts; equal device names do not make equal speed."
        section.blocks.append(Text(text, "note"))
    return section
