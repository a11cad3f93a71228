"""python -m experiments.sweep STUDY [key=value …] [--jobs N] [--dry-run]

Runs a study: every combination of the settings that configs/studies/STUDY.yaml varies, each as a process of its own.
All runs are checked before the first one starts. The same command again skips what is finished, resumes what was
interrupted, retries what failed and starts the rest; a failing run does not stop the others.

    python -m experiments.sweep demo
    python -m experiments.sweep demo trainer.max_steps=50 study=demo_short --jobs 2

Exit code 0 when every run is finished (or is running elsewhere), 1 when a run failed, 130 after Ctrl-C.
"""

import argparse
import signal
import sys
from types import FrameType

from configs.loading import from_run
from configs.study import PlannedRun, Study, load_study
from experiments.command import run
from experiments.launch import Outcome, launch_all
from experiments.train import check_resumable
from switti.errors import UserError
from switti.files import read_json, write_json
from switti.studies import State, state_of

TRAIN = [sys.executable, "-m", "experiments.train"]
_ACTIONS: dict[State, str] = {
    "new": "start",
    "failed": "retry",
    "interrupted": "resume",
    "killed": "resume",
    "finished": "skip",
    "running": "skip",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", help="a YAML file, or a name below configs/studies/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for all runs")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs; start nothing")
    options = parser.parse_intermixed_args(arguments)

    study = load_study(options.study, options.settings)
    states = {planned.name: state_of(planned.config.run_dir) for planned in study.runs}
    for planned in study.runs:
        check_same(planned, states[planned.name])
    _print_plan(study, states)
    if options.dry_run:
        return 0
    write_json(study.folder / "study.json", study.as_dict())
    todo = [planned for planned in study.runs if _ACTIONS[states[planned.name]] != "skip"]
    signal.signal(signal.SIGTERM, _interrupt)
    outcomes = launch_all([(planned.name, [*TRAIN, *planned.arguments]) for planned in todo], options.jobs)
    return _summarise(study, {planned.name: planned for planned in todo}, outcomes)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def check_same(planned: PlannedRun, state: State) -> None:
    """UserError if the run's folder holds a run with other settings, which must not be taken for this one."""
    folder = planned.config.run_dir
    if not (folder / "config.yaml").is_file():
        return
    check_resumable(planned.config, folder)
    before, now = from_run(folder).trainer.max_steps, planned.config.trainer.max_steps
    if state == "finished" and before != now:
        raise UserError(
            f"{folder} is finished with trainer.max_steps={before}, not {now}: give the study another name (study=…) "
            "or remove the folder"
        )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _print_plan(study: Study, states: dict[str, State]) -> None:
    width = max(len(planned.name) for planned in study.runs)
    print(f"study {study.name}: {len(study.runs)} runs in {study.folder}")
    for planned in study.runs:
        state = states[planned.name]
        print(f"  {planned.name:<{width}}  {state:<11}  {_ACTIONS[state]}")
    sys.stdout.flush()


def _summarise(study: Study, todo: dict[str, PlannedRun], outcomes: list[Outcome]) -> int:
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    for outcome in failed:
        record = read_json(todo[outcome.name].config.run_dir / "record.json", default={})
        reason = record.get("error") or f"exit code {outcome.code}"
        verb = "was interrupted" if record.get("status") == "interrupted" else "failed"
        print(f"\n{outcome.name} {verb}: {reason}")
        print("\n".join(f"    {line}" for line in outcome.tail))
    done, skipped = len(outcomes) - len(failed), len(study.runs) - len(todo)
    print(
        f"\nstudy {study.name}: {done} finished now, {skipped} skipped, {len(failed)} not finished"
        + ("; the same command again retries or resumes them" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
