"""Search as a source of jobs: Optuna proposes trials; each is trained as a run and its metric is reported back.

A trial's run is `trial_0007,…`. Trials that a stopped driver left running are resumed, in their folder; failed ones are
retried once by the next command. Any number of drivers work on one storage, each under the study's lock.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from sweeps.launchers.jobs import Job, Outcome, count, describe, job_of
from sweeps.run_lock import claim, study_lock
from sweeps.run_state import state_of
from sweeps.search_space import Search, without_password
from sweeps.study import Study, StudyRun
from switti.errors import UserError
from switti.files import write_json
from switti.run_folder import PRUNE, metric_values

try:
    from optuna.trial import FrozenTrial, TrialState

    from sweeps.search_objects import distribution, meant, open_search, sampler, stored
    from sweeps.search_trials import (
        ENDED,
        ERROR,
        RETRY_OF,
        RUN,
        counts,
        label_of,
        print_trials,
        settings_text,
        state_word,
    )
    from sweeps.storage import StorageErrors, reason
except ImportError as error:
    raise UserError("a search needs Optuna 5: pip install 'optuna>=5,<6' (or -e '.[sweep]')") from error

__all__ = ["SearchSource", "print_trials"]
_WATCH_SECONDS = 0.5


class SearchSource:
    """Asks for trials while there are any left, watches those that run, reports how they ended."""

    def __init__(self, study: Study) -> None:
        assert study.search is not None
        self.study = study
        self.search: Search = study.search
        self._distributions = {name: distribution(axis) for name, axis in self.search.space.items()}
        # Run → trial, of those that run here.
        self._mine: dict[str, int] = {}
        # Runs that have ended here: what did not finish waits for the next command.
        self._over: set[str] = set()
        self._watched = 0.0
        # Of a trial.
        self._steps = 0
        # Without the lock two drivers would both make the database's tables.
        with study_lock(study.folder):
            self.optuna, self._storage = open_search(study)
            self._search_id = self._storage.get_study_id_from_name(study.name)
            self._prepare()

    def next(self) -> Job | None:
        # No other driver asks at the same time.
        with self._storage_errors(), study_lock(self.study.folder):
            for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if job := self._resume(trial):
                    return job
            while self._is_more():
                if job := self._ask():
                    return job
        return None

    def ended(self, outcome: Outcome) -> str:
        """The trial's value or why it has none, its settings, and the best one so far."""
        number = self._mine.pop(outcome.job.name)
        self._over.add(outcome.job.name)
        with self._storage_errors():
            self._report_end(number, outcome.job.folder)
            trials = self.optuna.get_trials(deepcopy=False)
        trial = trials[number]
        head = f"{outcome.job.place}: {label_of(outcome.job.name)}"
        settings = settings_text(trial.params)
        last = trial.intermediate_values.get(max(trial.intermediate_values, default=-1))
        if trial.state == TrialState.COMPLETE:
            said = f"{head}: {self.search.metric} {trial.value:.5g} ({settings})"
        elif trial.state == TrialState.PRUNED:
            value = "" if last is None else f" with {self.search.metric} {last:.5g}"
            said = f"{head}: pruned at step {max(trial.intermediate_values, default=0)}{value} ({settings})"
        else:
            said = f"{describe(outcome)} ({settings})"
        best = self._best(trials)
        if best is None:
            return said
        name = "this one" if best is trial else label_of(best.user_attrs[RUN])
        return f"{said}; best so far {best.value:.5g}, {name}"

    def _best(self, trials: list[FrozenTrial]) -> FrozenTrial | None:
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        sign = 1 if self.search.direction == "minimize" else -1
        return min(complete, key=lambda trial: sign * cast(float, trial.value), default=None)

    def waiting(self) -> list[int]:
        """Steps of each trial that is still to be proposed, as many as of the first one."""
        with suppress(*StorageErrors):
            if self.search.sampler != "grid":
                begun = sum(map(counts, self.optuna.get_trials(deepcopy=False)))
                return [self._steps] * max(0, self.search.trials - begun)
            return [self._steps] * len(self.optuna.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        return []

    def total(self) -> int:
        """Trials of the whole study."""
        return (
            min(self.search.trials, len(self.search.grid()))
            if self.search.sampler == "grid"
            else self.search.trials
        )

    def summary(self, outcomes: list[Outcome]) -> str:
        """Count of the trials by state, by all drivers together, and the best one."""
        with self._storage_errors():
            trials = self.optuna.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        ends = {outcome.job.name: outcome.end for outcome in outcomes}
        words = [
            ENDED.get(trial.state) or ends.get(trial.user_attrs[RUN]) or state_word(self.study, trial)
            for trial in trials
            if trial.number not in retried and (RUN in trial.user_attrs or ERROR in trial.user_attrs)
        ]
        words += ["not started"] * max(0, self.total() - len(words))
        again = "; the same command again resumes" if set(words) - {"finished", "pruned"} else ""
        best = self._best(trials)
        best_line = (
            "no trial is finished"
            if best is None
            else (
                f"best: {self.search.metric} {best.value:.5g} by {best.user_attrs[RUN]} ({settings_text(best.params)})"
            )
        )
        return f"{count(words)}{again}\n{best_line}"

    def watch(self, running: list[Job]) -> None:
        """Report new values of the metric; write the file on which a pruned run stops."""
        if self.search.pruner == "none" or time.monotonic() - self._watched < _WATCH_SECONDS:
            return
        self._watched = time.monotonic()
        # A server that is away for a moment stops no run, and neither do metrics that cannot be read.
        with suppress(*StorageErrors, UserError):
            self._prune(running)

    def _prune(self, running: list[Job]) -> None:
        for job in running:
            number = self._mine[job.name]
            if not (job.folder / PRUNE).is_file() and self._report_values(number, job.folder):
                step, value = list(metric_values(job.folder, self.search.metric).items())[-1]
                write_json(
                    job.folder / PRUNE,
                    {"trial": number, "step": step, "metric": self.search.metric, "value": value},
                )

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """A server that goes away is a UserError in one line, not a traceback."""
        try:
            yield
        except StorageErrors as error:
            raise UserError(
                f"search.storage={without_password(self.search.storage)} fails: {reason(self.search, error)}; runs "
                "that have been started continue, the same command again resumes the search"
            ) from error

    def _prepare(self) -> None:
        """Queue the points of a grid, once, and what failed before, once more."""
        trials = self.optuna.get_trials(deepcopy=False)
        if self.search.sampler == "grid" and not trials:
            for point in self.search.grid()[: self.search.trials]:
                self.optuna.enqueue_trial({name: stored(value) for name, value in point.items()})
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        for trial in trials:
            again = trial.state == TrialState.FAIL and RUN in trial.user_attrs and trial.number not in retried
            if again and ERROR not in trial.user_attrs:
                attributes = {RETRY_OF: trial.number, RUN: trial.user_attrs[RUN]}
                self.optuna.enqueue_trial(trial.params, user_attrs=attributes)

    def _is_more(self) -> bool:
        trials = self.optuna.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        if self.search.sampler == "grid":
            return False
        return sum(counts(trial) for trial in trials) < self.search.trials

    def _ask(self) -> Job | None:
        """A new trial with its run; None if its settings do not go together, or if its run is busy elsewhere."""
        self.optuna.sampler = sampler(self.search, len(self.optuna.get_trials(deepcopy=False)))
        trial = self.optuna.ask(fixed_distributions=self._distributions)
        try:
            run = self._run_of(trial.user_attrs.get(RUN), trial.number, trial.params)
        except UserError as error:
            trial.set_user_attr(ERROR, str(error))
            self.optuna.tell(trial.number, state=TrialState.FAIL)
            print(f"trial {trial.number} is skipped: {error}", flush=True)
            return None
        trial.set_user_attr(RUN, run.name)
        return self._start(trial.number, run)

    def _resume(self, trial: FrozenTrial) -> Job | None:
        """The job of a trial that counts as running and that nobody works on; an ended one is reported at once."""
        name = trial.user_attrs.get(RUN)
        if name in self._mine or name in self._over:
            return None
        if name is None:
            # A driver was killed between asking and naming.
            self.optuna.tell(trial.number, state=TrialState.FAIL)
            return None
        run = self._run_of(name, trial.number, trial.params)
        return self._start(trial.number, run)

    def _start(self, number: int, run: StudyRun) -> Job | None:
        folder = run.config.run_dir
        lock = claim(folder)
        if lock is None:
            return None
        # Only the lock holder reports; another driver may have reported while we waited.
        if self.optuna.get_trials(deepcopy=False)[number].state != TrialState.RUNNING:
            os.close(lock)
            return None
        state = state_of(folder, held=True)
        if state in ("running", "queued"):
            os.close(lock)
            return None
        if state in ("finished", "pruned"):
            self._report_end(number, folder)
            os.close(lock)
            return None
        self._mine[run.name] = number
        self._steps = run.config.trainer.max_steps
        return job_of(run, lock, self._place(run.name))

    def _place(self, run: str) -> str:
        """ "trial 4 of 20", the same for another attempt."""
        first = int(label_of(run).removeprefix("trial_"))
        earlier = [trial for trial in self.optuna.get_trials(deepcopy=False) if trial.number <= first]
        return f"trial {sum(map(counts, earlier))} of {self.total()}"

    def _run_of(self, run: str | None, number: int, params: dict[str, Any]) -> StudyRun:
        """run: the one that this trial resumes; otherwise it is named by its number."""
        values = {name: meant(self.search.space[name], value) for name, value in params.items()}
        more = [] if self.search.pruner == "none" else ["callbacks.prunable=true"]
        label = label_of(run) if run else f"trial_{number:04d}"
        return self.study.trial_run(label, values, more)

    def _report_values(self, number: int, folder: Path) -> bool:
        """Report values that the storage does not have; whether the pruner stops the trial."""
        values = metric_values(folder, self.search.metric)
        known = self.optuna.get_trials(deepcopy=False)[number]
        new = [step for step in values if step not in known.intermediate_values]
        if not new:
            return False
        trial = self._storage.get_trial_id_from_study_id_trial_number(self._search_id, number)
        for step in new:
            if math.isfinite(values[step]):
                self._storage.set_trial_intermediate_value(trial, step, values[step])
        return self.optuna.pruner.prune(self.optuna, self.optuna.get_trials(deepcopy=False)[number])

    def _report_end(self, number: int, folder: Path) -> None:
        """Report a finished trial's last value, or that it was pruned or failed. Any other state is resumed by the next
        command."""
        state = state_of(folder, held=True)
        try:
            values = list(metric_values(folder, self.search.metric).values())
        except UserError as error:
            print(f"trial {number}: {error}", flush=True)
            values = []
        if state == "finished" and values and math.isfinite(values[-1]):
            self.optuna.tell(number, values[-1])
        elif state == "finished":
            print(f"trial {number} has no finite {self.search.metric}: it counts as failed", flush=True)
            self.optuna.tell(number, state=TrialState.FAIL)
        elif state == "pruned":
            self._report_values(number, folder)
            self.optuna.tell(number, state=TrialState.PRUNED)
        elif state == "failed":
            self.optuna.tell(number, state=TrialState.FAIL)
