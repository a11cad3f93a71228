"""python -m experiments.sweep STUDY [key=value …] [--jobs N] [--launcher local|slurm] [--dry-run]

Runs a study: every combination of the settings that configs/studies/STUDY.yaml varies, or the trials of its search,
each as a process of its own (torchrun or srun for several ranks). All runs are checked before the first one starts:
settings, shards, embeddings, tokenizer and first weights.
The same command again skips what is finished, resumes what was interrupted, retries what failed and starts the rest;
a failing run does not stop the others. Several such commands may work on one study at the same time.

    python -m experiments.sweep demo
    python -m experiments.sweep demo trainer.max_steps=50 study=demo_short --jobs 2
    python -m experiments.sweep base=generator/demo vary.seed=[0,1] vary.model.visibility=[causal,non_causal] study=mine
    python -m experiments.sweep search_smoke search.trials=40 --dry-run
    python -m experiments.sweep demo --launcher slurm --partition gpu --time 4:00:00 --jobs 8

On a terminal each run in progress has a live line, and the study its time left. What a run printed is in its
output.log. Ctrl-C lets the runs save and stop; a second one stops them at once.
Exit code 0 when every run is finished (or running elsewhere), 1 when one failed or was interrupted, 130 after Ctrl-C.
"""

import argparse
import sys

from configs.loading import CONFIGS, names_below
from experiments import cli
from experiments.cli import argument_parser
from sweeps.launchers.base import Launcher, Source, drive
from sweeps.launchers.jobs import Job, Outcome, count, describe, job_of, steps_left, why
from sweeps.launchers.local import LocalLauncher
from sweeps.preflight import check_files
from sweeps.run_lock import claim
from sweeps.run_selection import ACTIONS, check_same, check_study, print_preflight, save_study
from sweeps.run_state import State, state_of
from sweeps.screen import screen_for
from sweeps.study import Study, StudyRun, load_study
from switti.errors import UserError


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    study = _load(options.words)
    states = {run.name: state_of(run.config.run_dir) for run in study.runs}
    for run in study.runs:
        check_same(run, states[run.name])
    check_study(study)
    launcher = _launcher(study, options)
    for run in study.runs or [study.trial_run("trial", {})]:
        launcher.check(run)
    if study.search is None:
        print_preflight(study, states)
    else:
        print(
            f"study {study.name}: search over {', '.join(study.search.space)} in {study.folder}", flush=True
        )
    _check_files(study, states, options.launcher)
    if options.dry_run:
        return 0 if study.search is None else _show_search(study)
    source: Source = _Grid(study) if study.search is None else _search(study)
    # Only now: a storage that cannot be opened has stopped the command.
    save_study(study)
    outcomes, stopped = drive(source, launcher, screen_for(study.name, _places(options)))
    if options.detach:
        print(
            f"study {study.name}: submitted; python -m experiments.status {study.name} shows how the runs do"
        )
        return 0
    _summarise(study, source, outcomes)
    if stopped:
        raise KeyboardInterrupt
    return 1 if any(outcome.end in ("failed", "interrupted") for outcome in outcomes) else 0


def _check_files(study: Study, states: dict[str, State], launcher: str) -> None:
    """Check shards, embeddings and weights of the runs that would start, or of the corners of a search's space."""
    if study.search is None:
        runs = [run for run in study.runs if ACTIONS[states[run.name]] != "skip"]
    else:
        runs = [study.trial_run("trial", values) for values in study.search.corners()]
    try:
        check_files(runs)
    except UserError as error:
        if launcher == "local":
            raise
        # A cluster's nodes may see more.
        print(f"warning: as seen from this machine, {error}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    form = argument_parser(
        __doc__, epilog=f"configs/studies/ holds {', '.join(names_below(CONFIGS / 'studies'))}."
    )
    add = form.add_argument
    add("words", nargs="+", metavar="STUDY|key=value",
        help="a YAML file, or a name below configs/studies/; then settings for all runs, and base=, vary.…=, "
             "search.…=, pair_by=, study=")  # fmt: skip
    add("--jobs", type=_positive, metavar="N", help="runs at a time (local: 1; slurm: all, of a search 1)")
    add("--dry-run", action="store_true", help="check and list the runs; start nothing")
    add(
        "--launcher", choices=("local", "slurm"), default="local", help="where runs are started (%(default)s)"
    )
    slurm = form.add_argument_group(
        "with --launcher slurm (nodes and tasks are trainer.num_nodes and .devices)"
    )
    slurm.add_argument("--partition", help="sbatch's")
    slurm.add_argument("--time", default="1:00:00", help="[days-]hours:minutes:seconds a run (%(default)s)")
    slurm.add_argument("--cpus", type=_positive, metavar="N", help="cores a task")
    slurm.add_argument("--memory", metavar="GB", type=_positive, help="GiB a node")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="key=value",
                       help="any other option of sbatch, such as account=me; repeatable")  # fmt: skip
    slurm.add_argument("--detach", action="store_true", help="submit and leave; not with a search")
    return form


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return int(text)


def _load(words: list[str]) -> Study:
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UserError(f"one study at a time, not {', '.join(names)}; settings are key=value")
    return load_study(names[0] if names else None, [word for word in words if "=" in word])


def _launcher(study: Study, options: argparse.Namespace) -> Launcher:
    if options.launcher == "local":
        for name in ("partition", "cpus", "memory", "sbatch", "detach"):
            if getattr(options, name):
                raise UserError(f"--{name} needs --launcher slurm")
        return LocalLauncher(options.jobs or 1)
    from sweeps.launchers.slurm import SlurmLauncher, resources

    if options.detach and study.search is not None:
        raise UserError("--detach is not for a search: its driver must learn how trials end")
    return SlurmLauncher(
        study.folder, resources(options), options.jobs, search=study.search is not None, detach=options.detach
    )


class _Grid:
    """The runs of a grid as a source of jobs: those that are not finished and that no other process works on."""

    def __init__(self, study: Study) -> None:
        self._runs = study.runs
        self._left = {f"run {number} of {len(study.runs)}": run for number, run in enumerate(study.runs, 1)}
        self._steps: dict[str, int] = {}

    def next(self) -> Job | None:
        while self._left:
            place = next(iter(self._left))
            run = self._left.pop(place)
            folder = run.config.run_dir
            if (lock := claim(folder)) is None:
                continue
            job = job_of(run, lock, place)
            if ACTIONS[state_of(folder, held=True)] != "skip":
                return job
            job.release()
        return None

    def watch(self, running: list[Job]) -> None:
        """No-op: a grid's runs are never pruned."""

    def ended(self, outcome: Outcome) -> str:
        return describe(outcome)

    def waiting(self) -> list[int]:
        """Remaining steps of the runs that have not been given out; a finished one has none."""
        return [self._steps_of(run) for run in self._left.values() if self._steps_of(run)]

    def _steps_of(self, run: StudyRun) -> int:
        if run.name not in self._steps:
            self._steps[run.name] = steps_left(run)
        return self._steps[run.name]

    def total(self) -> int:
        return len(self._runs)

    def summary(self, outcomes: list[Outcome]) -> str:
        """Count of the study's runs by state, by whichever driver."""
        ends = {outcome.job.name: outcome.end for outcome in outcomes}
        words = [ends.get(run.name) or _standing(run) for run in self._runs]
        before = sum(
            word == "finished" and run.name not in ends for word, run in zip(words, self._runs, strict=True)
        )
        text = count(sorted(words, key=_ORDER.index))
        if before:
            text = text.replace(" finished", f" finished ({before} before)", 1)
        todo = [_AGAIN[word] for word in dict.fromkeys(words) if word in _AGAIN]
        return text + (f"; the same command again {' and '.join(dict.fromkeys(todo))}" if todo else "")


# The states that the summary counts, in its order, and what the same command would do about them.
_ORDER = ["finished", "pruned", "running", "queued", "interrupted", "failed", "not started"]
_AGAIN = {
    "interrupted": "resumes what was interrupted",
    "failed": "retries what failed",
    "not started": "starts what was not",
}


def _standing(run: StudyRun) -> str:
    """State of a run that this command has not worked on."""
    try:
        state = state_of(run.config.run_dir)
    except UserError:
        return "failed"
    return {"new": "not started", "killed": "interrupted"}.get(state, state)


def _places(options: argparse.Namespace) -> int:
    """Runs at a time."""
    return options.jobs or (1 if options.launcher == "local" else sys.maxsize)


def _search(study: Study) -> Source:
    from sweeps.search import SearchSource

    return SearchSource(study)


def _show_search(study: Study) -> int:
    from sweeps.search import print_trials

    print_trials(study)
    return 0


def _summarise(study: Study, source: Source, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.end == "failed":
            print(f"\n{outcome.job.name} failed: {why(outcome)}")
            print("\n".join(f"    {line}" for line in outcome.tail))
    print(f"\nstudy {study.name}: {source.summary(outcomes)}")
    # Ahead of what follows on stderr.
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
