"""Sections about images: the grid of samples, and how well images follow their captions."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from reports.data.comparison import Comparison
from reports.data.images import ABSENT, problem_of
from reports.data.metric_catalogue import EARLY, ONLINE, describe
from reports.data.runs import Run, Samples
from reports.data.statistics import paired_bootstrap
from reports.data.study import Study, Variant, show, sort_values
from reports.render.document import Block, Definitions, GridImage, ImageGrid, Section, Table, Text, code
from reports.render.formatting import DASH, gap, interval, number, plus_minus

_SCORE = "mini_clip_score"
# Characters of a pairing value in a file's name.
_NAME = 60
# Captions in the head of the page.
_FIRST = 2
# Images shown for one training seed.
_ROWS = 24
Key = tuple[str, int]


def samples_section(study: Study) -> Section:
    """For each training seed the same captions and image seeds under every variant."""
    section = Section("images", "Images")
    values = sort_values({run.setting(study.pair_by) for run in study.runs})
    for value in values:
        runs = [run for run in study.runs if run.setting(study.pair_by) == value]
        if len(runs) == 1 and len(study.variants) > 1 and len(values) > 1 and not runs[0].samples:
            continue
        section.blocks += _grid(study, runs, value, opened=value == values[0])
    if without := [code(run.name) for run in study.runs if not run.samples]:
        text = f'No samples in {", ".join(without)}: `python -m experiments.sample RUN "prompt"` or training with '
        section.blocks.append(Text(text + "`callbacks.samples_every` above 0 makes them.", "missing"))
    return section


def first_images(section: Section) -> list[ImageGrid]:
    """The first captions of the first training seed that has any, for the head of the page."""
    for block in section.blocks:
        if isinstance(block, ImageGrid):
            return [replace(block, name="images_first", rows=block.rows[:_FIRST], opened=True)]
    return []


def _grid(study: Study, runs: list[Run], value: Any, opened: bool) -> list[Block]:
    """The images that all runs with one pairing value have in common, and how their sampling differs."""
    title = f"Runs with {study.pair_by} {show(value)}"
    drawn = [(run, run.samples) for run in runs if run.samples and run.samples.files]
    if not drawn:
        return []
    tables = [_by_key(samples) for _, samples in drawn]
    common = [key for key in tables[0] if all(key in table for table in tables[1:])]
    notes = _notes([samples for _, samples in drawn], tables, common, title)
    columns = tuple(f"{study.variant_of(run).label}, step {samples.step}" for run, samples in drawn)
    rows, broken = [], list[str]()
    for prompt, seed in common[:_ROWS]:
        cells = []
        for (run, _), table in zip(drawn, tables, strict=True):
            place = table[prompt, seed]
            alt = f"{study.variant_of(run).label}, image seed {seed}: {prompt}"
            problem = problem_of(place, run.path)
            if problem and problem != ABSENT:
                broken.append(f"{code(run.name)}: {code(place.name)} {problem}")
            cells.append(GridImage(None if problem else place, alt))
        rows.append((prompt, seed, tuple(cells)))
    if len(common) > _ROWS:
        notes.append(Text(f"{title}: the first {_ROWS} of {len(common)} common images.", "note"))
    if broken:
        notes.append(Text(f"Not shown – {'; '.join(broken)}.", "warning"))
    name = "images_" + _slug(f"{study.pair_by}_{show(value)}")
    return [*notes, ImageGrid(name, title, columns, tuple(rows), opened)] if rows else notes


def _slug(text: str) -> str:
    """A part of a file name; different texts keep different ones."""
    slug = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    if slug == text and len(slug) <= _NAME:
        return slug
    return f"{slug[:_NAME]}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"


def _by_key(samples: Samples) -> dict[Key, Path]:
    return {(p, s): file for p, s, file in zip(samples.prompts, samples.seeds, samples.files, strict=True)}


def _notes(
    samples: list[Samples], tables: list[dict[Key, Path]], common: list[Key], title: str
) -> list[Block]:
    """Differences between the columns of a grid other than the variant."""
    notes: list[Block] = []
    if len(common) < max(map(len, tables)):
        text = (
            f"{title}: captions or image seeds differ between variants; {len(common)} are common and shown."
        )
        notes.append(Text(text, "warning"))
    if len({sample.step for sample in samples}) > 1:
        notes.append(Text(f"{title}: the images are from different steps.", "warning"))
    keys = sorted({key for sample in samples for key in sample.sampling})
    unlike = [key for key in keys if len({show(sample.sampling.get(key)) for sample in samples}) > 1]
    if unlike:
        notes.append(Text(f"{title}: the sampling settings differ ({', '.join(unlike)}).", "warning"))
    return notes


def caption_section(comparison: Comparison) -> Section:
    """The score with an image's own caption beside that with another's: only the gap speaks of following the text."""
    section, rows = Section("captions", "Following the caption"), list[tuple[str, ...]]()
    reference = comparison.study.variants[0]
    for prefix, source in (("evaluation/", "evaluated"), ("metrics/", "in training")):
        own, other = f"{prefix}{_SCORE}", f"{prefix}{_SCORE}_shuffled"
        if (
            rows or own not in comparison.rows or other not in comparison.rows
        ):  # in training only where it was not evaluated
            continue
        reference_gaps = _gaps(comparison, reference, own, other)
        for variant in comparison.study.variants:
            gaps = _gaps(comparison, variant, own, other)
            mean = sum(gaps.values()) / len(gaps) if gaps else None
            cells = [
                variant.label,
                source,
                plus_minus(comparison.spread(variant, own)),
                plus_minus(comparison.spread(variant, other)),
            ]
            rows.append((*cells, number(mean), _gap_difference(reference_gaps, gaps, variant is reference)))
    if rows:
        header = ("variant", "taken", "own caption", "another caption", "gap", "gap's paired difference")
        section.blocks.append(Table(header, tuple(rows), words=frozenset({0, 1, 5})))
        for name, title in ((_SCORE, "Own caption"), (f"{_SCORE}_shuffled", "Another caption")):
            section.blocks.append(Text(f"{title}: {describe(f'evaluation/{name}').description}.", "note"))
    else:
        text = (
            f"`{_SCORE}` and `{_SCORE}_shuffled` have not both been measured: `python -m experiments.evaluate RUN`, or "
            "training with `callbacks.metrics_every` above 0, makes them."
        )
        section.blocks.append(Text(text, "missing"))
    return section


def _gaps(comparison: Comparison, variant: Variant, own: str, other: str) -> dict[str, float]:
    """Own − other caption's score of each run, by its pairing value."""
    gaps = {}
    for run in variant.runs:
        a, b = comparison.final(run, own), comparison.final(run, other)
        if a is not None and b is not None:
            gaps[show(run.setting(comparison.study.pair_by))] = a - b
    return gaps


def _gap_difference(reference: dict[str, float], gaps: dict[str, float], is_reference: bool) -> str:
    common = [value for value in reference if value in gaps]
    if is_reference or not common:
        return "reference" if is_reference else DASH
    paired = paired_bootstrap([gaps[value] - reference[value] for value in common])
    return f"{gap(paired)} {interval(paired)}"


def conventions_section(comparison: Comparison) -> Section:
    """Definition of each metric on the page; one both evaluated and taken in training is defined once."""
    names_of: dict[tuple[str, str], list[str]] = {}
    for name, row in comparison.rows.items():
        if "_by_scale/" in name or "/block_" in name:
            continue
        metric = row.metric
        better = f" {metric.better.capitalize()} is better." if metric.better and not row.of_data else ""
        better = " Of the data and the tokenizer: not a result of these runs." if row.of_data else better
        text = (
            f"{metric.description}.{better}"
            if metric.description
            else "A name that this version does not know."
        )
        title = metric.title.removesuffix(ONLINE)
        title = title.removesuffix(EARLY) if name.startswith("stopped_early/") else title
        names_of.setdefault((title, text[:1].upper() + text[1:]), []).append(name)
    items = tuple((title, tuple(names), text) for (title, text), names in names_of.items())
    return Section(
        "conventions",
        "What the metrics are",
        [Definitions(items) if items else Text("No metrics.", "missing")],
    )
