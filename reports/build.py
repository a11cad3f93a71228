"""Report of a study or a search: numbers, sections, then files."""

from datetime import datetime
from pathlib import Path
from typing import Any

from reports.data.comparison import Comparison, compare_variants
from reports.data.search import Search
from reports.data.study import Study, show, sort_values
from reports.render import html, markdown, plots, tables
from reports.render import image_sheet as sheets
from reports.render.document import Block, Document, Figure, ImageGrid, Text, cleaned, code
from reports.render.forest import forest_figure
from reports.render.formatting import plural
from reports.sections.images import (
    caption_section,
    conventions_section,
    first_images,
    samples_section,
)
from reports.sections.metrics import cost_section, curves_section, metrics_section
from reports.sections.norms import norms_section
from reports.sections.runs import runs_section, settings_section
from reports.sections.scales import scales_section
from reports.sections.search import compare_trials, search_document, search_rows
from reports.sections.summary import label_variants, leader, learning, verdict
from switti.errors import UserError
from switti.files import atomic_write, writing
from switti.run_folder import RECORD
from switti.tables import write_csv

# Characters of variants' labels in a heading.
_TITLE = 70
# Occurs in every report's page.
_MARK = '<section id="conventions">'
# Summaries above the first plot.
_SUMMARIES = 2
# Pairing values in a sentence.
_VALUES = 12


def document(comparison: Comparison) -> Document:
    """The report's content, independent of its format."""
    study, images = comparison.study, samples_section(comparison.study)
    lead: list[Block] = [*learning(comparison)]
    summaries, sentences = _split(comparison, verdict(comparison))
    lead += summaries
    if unfinished := [run for run in study.runs if not run.finished]:
        text = f"Preliminary: {plural(len(unfinished), 'run')} of {len(study.runs)} not finished (see Runs)."
        lead.append(Text(text, "warning"))
    if study.skipped:
        text = f"{plural(len(study.skipped), 'run folder')} could not be read (see Runs)."
        lead.append(Text(text, "warning"))
    if forest := forest_figure(comparison):
        lead.append(forest)
    lead += [*first_images(images), *sentences, Text(_subject(study), "note")]
    sections = [
        metrics_section(comparison),
        curves_section(comparison),
        norms_section(comparison),
        scales_section(comparison),
        cost_section(comparison),
        images,
        caption_section(comparison),
        runs_section(study),
        settings_section(study),
        conventions_section(comparison),
    ]
    if study.runs[0].record.get("task") in ("tokenizer", "decoder"):
        # Sections on generated tokens do not apply.
        sections = [section for section in sections if section.anchor not in ("norms", "scales", "captions")]
    labels = label_variants(study.variants)
    title = labels if len(labels) <= _TITLE else f"{len(study.variants)} variants"
    if len(study.runs) == 1:
        title = study.runs[0].name
    return cleaned(Document(f"{study.name}: {title}", lead, sections))


def _split(comparison: Comparison, texts: list[Text]) -> tuple[list[Text], list[Text]]:
    """(texts above the plot, texts below it); a summary for each of many variants would hide the plot."""
    above = [text for text in texts if text.kind != "verdict"]
    below = [text for text in texts if text.kind == "verdict"]
    if len(above) <= _SUMMARIES:
        return above, below
    return leader(comparison), [Text(text.text, "verdict") for text in above]


def _subject(study: Study) -> str:
    varied = ", ".join(code(key) for key in study.vary)
    counts = ", ".join(f"{variant.label} ({plural(len(variant.runs), 'run')})" for variant in study.variants)
    what = f"Compared by {varied}: {counts}" if varied else f"One variant: {plural(len(study.runs), 'run')}"
    if len(study.vary) > 2:
        what += "; names give only what differs from the most frequent settings (all are under Settings that differ)"
    made = f"Made {datetime.now():%Y-%m-%d %H:%M} from the run folders alone."
    return f"{what}; paired by {code(study.pair_by)} ({_pairs(study)}). {made}"


def _pairs(study: Study) -> str:
    """The pairing values, and whether one pair is too few for an interval."""
    values = [show(value) for value in sort_values({run.setting(study.pair_by) for run in study.runs})]
    listed = ", ".join(values[:_VALUES]) + (f" … ({len(values)})" if len(values) > _VALUES else "")
    if len(study.variants) < 2:
        return listed
    counts = {len(study.pairs(variant)) for variant in study.variants[1:]}
    if counts == {1}:
        return f"{listed}; one pair, hence no intervals"
    least, most = min(counts), max(counts)
    return f"{listed}; {plural(least, 'pair')}" + (f" to {most}" if most > least else "")


def check_folder(folder: Path) -> None:
    """UserError if a report cannot or must not be written there: nothing but an earlier report is overwritten."""
    page = folder / "index.html"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder for the report (--out)")
    if (folder / RECORD).exists():
        raise UserError(f"{folder} is a run's folder; give another one for the report (--out)")
    if page.exists() and _MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{page} is not a report and would be overwritten; give another folder (--out)")


def write_report(study: Study, folder: str | Path) -> Path:
    """Write index.html, report.md, rows.csv, paired.csv and every plot as SVG and PNG; return the page's path."""
    comparison = compare_variants(study)
    files = {
        "rows.csv": tables.rows(comparison),
        "paired.csv": (list(tables.PAIRED_COLUMNS), tables.paired_rows(comparison)),
    }
    return _write(document(comparison), files, Path(folder))


def write_search_report(search: Search, folder: str | Path) -> Path:
    """The same for a search; its rows.csv has a row a trial, and nothing is paired."""
    trials = compare_trials(search)
    report = cleaned(search_document(search, trials))
    return _write(report, {"rows.csv": search_rows(search, trials)}, Path(folder))


def _write(report: Document, files: dict[str, tuple[list[str], list[list[Any]]]], folder: Path) -> Path:
    check_folder(folder)
    for stale in {"rows.csv", "paired.csv"} - set(files):  # of an earlier report of another kind
        with writing(folder / stale):
            (folder / stale).unlink(missing_ok=True)
    for name, (header, rows) in files.items():
        write_csv(folder / name, [header, *rows])
    for block in [*report.lead, *(block for section in report.sections for block in section.blocks)]:
        if isinstance(block, Figure):
            plots.save_figure(block, folder)
        elif isinstance(block, ImageGrid):
            sheets.save_sheet(block, folder)
    for name, text in (("report.md", markdown.render(report)), ("index.html", html.render(report))):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / "index.html"
