"""python -m experiments.compare STUDY|RUN_DIR … [--out DIR] [--pair-by seed] [--vary model.visibility]

Compare runs: one self-contained page (index.html), report.md, rows.csv (a row for each run), paired.csv (paired
differences with intervals), every plot as SVG and PNG and the images as sheets. Reads run folders only; no torch, no
network. Overwrites nothing but an earlier report.

For a search the page gives the best trial and the command that repeats it, the history, the objective
against each parameter and the ranking; --vary or --pair-by compare its trials as runs instead.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from experiments.cli import argument_parser, run
from reports.data.runs import Run, find_runs, folders_without_record, read_run
from reports.data.search import read_search, search_of
from reports.data.study import group
from reports.render.formatting import plural
from switti.errors import UserError
from switti.escape import printable
from switti.run_folder import RECORD

RUNS_DIR, PAIR_BY = "runs", "seed"


def parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="STUDY|RUN_DIR", help="a study below runs/, or folders of runs"
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (default: runs/<study>/report)")
    parser.add_argument("--pair-by", metavar="KEY", help="setting that pairs runs (default: seed)")
    parser.add_argument(
        "--vary",
        action="append",
        metavar="KEY",
        help="setting that makes a variant; repeatable (default: all that differ)",
    )
    return parser


def default_folder(paths: list[Path]) -> Path:
    """<study's folder>/report; for a single run inside the run, for runs from several places runs/report."""
    if len(paths) == 1:
        return paths[0] / "report"
    folders = {path.resolve().parent for path in paths}
    return (paths[0].parent if len(folders) == 1 else Path(RUNS_DIR)) / "report"


def read_runs(paths: list[Path], named: set[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """(runs, (folder, why) of those that cannot be read). One that the user has named must be readable.

    Raises UserError if there is nothing to compare.
    """
    runs, skipped = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except (UserError, OSError) as error:
            if path.resolve() in named:
                raise
            skipped.append((path, str(error)))
    for folder in sorted({path.parent for path in paths if path.resolve() not in named}):
        skipped += [(path, f"it has no {RECORD}") for path in folders_without_record(folder)]
    if not runs:
        raise UserError(skipped[0][1])
    return runs, skipped


def searched_folder(options: argparse.Namespace) -> Path | None:
    """The folder of a search, if that is what is to be reported; None where the user asks for a comparison."""
    if len(options.runs) > 1 or options.pair_by or options.vary:
        return None
    folders = (Path(options.runs[0]), Path(RUNS_DIR) / options.runs[0])
    folder = next((path for path in folders if path.is_dir()), None)
    return folder if folder and search_of(folder) else None


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    paths = find_runs(options.runs, RUNS_DIR)
    named = {path.resolve() for text in options.runs for path in (Path(text), Path(RUNS_DIR) / text)}
    runs, unreadable = read_runs(paths, named)
    skipped = tuple((path.name, reason) for path, reason in unreadable)

    # Only now: it takes a second.
    from reports.build import write_report, write_search_report

    if folder := searched_folder(options):
        search = read_search(folder, runs, skipped)
        page = write_search_report(search, options.out or folder / "report")
        counts = plural(len(search.trials), "trial")
    else:
        study = replace(group(runs, options.pair_by or PAIR_BY, options.vary), skipped=skipped)
        page = write_report(study, options.out or default_folder(paths))
        counts = f"{plural(len(study.runs), 'run')}, {plural(len(study.variants), 'variant')}"
    for path, reason in unreadable:
        print(printable(f"skipped {path}: {reason}"), file=sys.stderr)
    print(printable(f"{counts}: {page}"))


if __name__ == "__main__":
    run(main)
