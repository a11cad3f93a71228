"""python -m experiments.compare STUDY|RUN_DIR … [--out DIR] [--pair-by seed] [--vary model.visibility]

Compare runs: one self-contained page (index.html), report.md, rows.csv (a row a run), paired.csv (paired differences
with intervals), every plot as SVG and PNG and the pictures as sheets. Reads run folders only; no torch, no network.
Overwrites nothing but an earlier report.
"""

import argparse
from pathlib import Path

from experiments.command import run
from switti.report.build import write_report
from switti.report.formatting import plural
from switti.report.runs import find_runs, read_run
from switti.report.study import group

RUNS_DIR = "runs"


def parser() -> argparse.ArgumentParser:
    _, _, description = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=description.strip())
    parser.add_argument(
        "runs", nargs="+", metavar="STUDY|RUN_DIR", help="a study below runs/, or folders of runs"
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (default: runs/<study>/report)")
    parser.add_argument(
        "--pair-by", default="seed", metavar="KEY", help="setting that pairs runs (default: seed)"
    )
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


def main(arguments: list[str]) -> None:
    options = parser().parse_args(arguments)
    paths = find_runs(options.runs, RUNS_DIR)
    study = group([read_run(path) for path in paths], options.pair_by, options.vary)
    page = write_report(study, options.out or default_folder(paths))
    print(f"{plural(len(study.runs), 'run')}, {plural(len(study.variants), 'variant')}: {page}")


if __name__ == "__main__":
    run(main)
