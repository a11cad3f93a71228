"""A search as a source of jobs: Optuna proposes, runs are trained, their values are told. Not a command itself.

A trial's run is `trial_0007,…`. Trials that a stopped driver left running are taken up again, in their folder; failed
ones are tried once more by the next command. Any number of drivers work on one storage, each under the study's lock.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.loading import text_of
from configs.search import Axis, Search, without_password
from configs.study import PlannedRun, Study
from experiments.launch import Job, Outcome, job_of
from experiments.planning import ACTIONS
from switti.errors import UserError
from switti.files import write_json
from switti.run_folder import PRUNE, metric_values
from switti.studies import alone, claim, state_of

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import FrozenTrial, TrialState

    from experiments.search_storage import StorageErrors, open_storage, reason, storage_exists
except ImportError as error:
    raise UserError("a search needs Optuna 5: pip install 'optuna>=5,<6' (or -e '.[sweep]')") from error

_RUN, _RETRY_OF, _ERROR = "run", "retry_of", "error"  # attributes of a trial
_WATCH_SECONDS = 0.5


class SearchSource:
    """Asks for trials while there are any left, watches those that run, tells how they ended."""

    def __init__(self, study: Study) -> None:
        assert study.search is not None
        self.study = study
        self.search: Search = study.search
        self._distributions = {name: distribution(axis) for name, axis in self.search.space.items()}
        self._mine: dict[str, int] = {}  # run → trial, of those that run here
        self._over: set[str] = (
            set()
        )  # runs that have ended here: what did not finish waits for the next command
        self._watched = 0.0
        with alone(study.folder):  # two drivers would both make the database's tables
            self.optuna = open_study(study)
            self._prepare()

    def next(self) -> Job | None:
        with self._told_in_a_line(), alone(self.study.folder):  # no other driver asks at the same time
            for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if job := self._take_up(trial):
                    return job
            while self._is_more():
                if job := self._ask():
                    return job
        return None

    def ended(self, outcome: Outcome) -> None:
        number = self._mine.pop(outcome.job.name)
        self._over.add(outcome.job.name)
        with self._told_in_a_line():
            self._tell(number, outcome.job.folder)

    def watch(self, running: list[Job]) -> None:
        """Report new values of the metric; write the file on which a run that is not worth it stops."""
        if self.search.pruner == "none" or time.monotonic() - self._watched < _WATCH_SECONDS:
            return
        self._watched = time.monotonic()
        with suppress(*StorageErrors):  # a server that is away for a moment stops nobody
            self._prune(running)

    def _prune(self, running: list[Job]) -> None:
        for job in running:
            number = self._mine[job.name]
            if not (job.folder / PRUNE).is_file() and self._report(number, job.folder):
                step, value = list(metric_values(job.folder, self.search.metric).items())[-1]
                write_json(
                    job.folder / PRUNE,
                    {"trial": number, "step": step, "metric": self.search.metric, "value": value},
                )

    @contextmanager
    def _told_in_a_line(self) -> Iterator[None]:
        """A server that goes away is no fault of the code."""
        try:
            yield
        except StorageErrors as error:
            raise UserError(
                f"search.storage={without_password(self.search.storage)} fails: {reason(self.search, error)}; runs "
                "that have been started go on, the same command again goes on with the search"
            ) from error

    def describe_best(self) -> str:
        """A line on the best whole trial so far."""
        if not self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return "no trial is finished"
        best = self.optuna.best_trial
        settings = " ".join(f"{name}={value}" for name, value in best.params.items())
        return f"best: {self.search.metric} {best.value:.5g} by {best.user_attrs[_RUN]} ({settings})"

    def _prepare(self) -> None:
        """Queue the points of a grid, once, and what failed before, once more."""
        trials = self.optuna.get_trials(deepcopy=False)
        if self.search.sampler == "grid" and not trials:
            for point in self.search.grid()[: self.search.trials]:
                self.optuna.enqueue_trial({name: _stored(value) for name, value in point.items()})
        retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
        for trial in trials:
            again = (
                trial.state == TrialState.FAIL and _RUN in trial.user_attrs and trial.number not in retried
            )
            if again and _ERROR not in trial.user_attrs:
                attributes = {_RETRY_OF: trial.number, _RUN: trial.user_attrs[_RUN]}
                self.optuna.enqueue_trial(trial.params, user_attrs=attributes)

    def _is_more(self) -> bool:
        trials = self.optuna.get_trials(deepcopy=False)
        if any(trial.state == TrialState.WAITING for trial in trials):
            return True
        if self.search.sampler == "grid":
            return False
        return sum(_counts(trial) for trial in trials) < self.search.trials

    def _ask(self) -> Job | None:
        """A new trial with its run; None if its settings do not go together, or if its run is busy elsewhere."""
        self.optuna.sampler = sampler(self.search, len(self.optuna.get_trials(deepcopy=False)))
        trial = self.optuna.ask(fixed_distributions=self._distributions)
        try:
            planned = self._plan(trial.user_attrs.get(_RUN), trial.number, trial.params)
        except UserError as error:
            trial.set_user_attr(_ERROR, str(error))
            self.optuna.tell(trial.number, state=TrialState.FAIL)
            print(f"trial {trial.number} is left out: {error}", flush=True)
            return None
        trial.set_user_attr(_RUN, planned.name)
        return self._start(trial.number, planned)

    def _take_up(self, trial: FrozenTrial) -> Job | None:
        """The job of a trial that is said to run and that nobody works on; tells at once if it has ended."""
        name = trial.user_attrs.get(_RUN)
        if name in self._mine or name in self._over:
            return None
        if name is None:  # a driver was killed between asking and naming
            self.optuna.tell(trial.number, state=TrialState.FAIL)
            return None
        planned = self._plan(name, trial.number, trial.params)
        return self._start(trial.number, planned)

    def _start(self, number: int, planned: PlannedRun) -> Job | None:
        folder = planned.config.run_dir
        lock = claim(folder)
        if lock is None:
            return None
        # Whoever tells holds the lock; while it was waited for another driver may have told.
        if self.optuna.get_trials(deepcopy=False)[number].state != TrialState.RUNNING:
            os.close(lock)
            return None
        state = state_of(folder, held=True)
        if state in ("running", "queued"):
            os.close(lock)
            return None
        if state in ("finished", "pruned"):
            self._tell(number, folder)
            os.close(lock)
            return None
        self._mine[planned.name] = number
        return job_of(planned, lock)

    def _plan(self, run: str | None, number: int, params: dict[str, Any]) -> PlannedRun:
        """run: the one that this trial goes on with; otherwise it is named by its number."""
        values = {name: _meant(self.search.space[name], value) for name, value in params.items()}
        more = [] if self.search.pruner == "none" else ["callbacks.prunable=true"]
        label = run.split(",")[0] if run else f"trial_{number:04d}"
        return self.study.plan_trial(label, values, more)

    def _report(self, number: int, folder: Path) -> bool:
        """Tell the storage of values that it does not know; whether the pruner gives the trial up."""
        values = metric_values(folder, self.search.metric)
        known = self.optuna.get_trials(deepcopy=False)[number]
        new = [step for step in values if step not in known.intermediate_values]
        if not new:
            return False
        trial = optuna.trial.Trial(self.optuna, known._trial_id)
        for step in new:
            if math.isfinite(values[step]):
                trial.report(values[step], step)
        return bool(trial.should_prune())

    def _tell(self, number: int, folder: Path) -> None:
        """Finished: its last value; given up: pruned; failed: failed. Anything else goes on with the next command."""
        state = state_of(folder, held=True)
        values = list(metric_values(folder, self.search.metric).values())
        if state == "finished" and values and math.isfinite(values[-1]):
            self.optuna.tell(number, values[-1])
        elif state == "finished":
            print(f"trial {number} has no finite {self.search.metric}: it counts as failed", flush=True)
            self.optuna.tell(number, state=TrialState.FAIL)
        elif state == "pruned":
            self._report(number, folder)
            self.optuna.tell(number, state=TrialState.PRUNED)
        elif state == "failed":
            self.optuna.tell(number, state=TrialState.FAIL)


def _counts(trial: FrozenTrial) -> bool:
    """Whether it is one of the study's trials: not a second attempt, and not lost before it had a name."""
    lost = trial.state == TrialState.FAIL and _RUN not in trial.user_attrs and _ERROR not in trial.user_attrs
    return _RETRY_OF not in trial.user_attrs and not lost


def _stored(value: Any) -> Any:
    """A choice as a storage can keep it."""
    return value if value is None or isinstance(value, bool | int | float | str) else text_of(value)


def _meant(axis: Axis, stored: Any) -> Any:
    return next((choice for choice in axis.choices or [] if _stored(choice) == stored), stored)


def distribution(axis: Axis) -> BaseDistribution:
    """Optuna's word for an axis."""
    if axis.choices is not None:
        return CategoricalDistribution([_stored(choice) for choice in axis.choices])
    assert axis.low is not None and axis.high is not None
    if isinstance(axis.low, int):
        return IntDistribution(axis.low, int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def sampler(search: Search, trials: int) -> "optuna.samplers.BaseSampler":
    """What proposes the next trial; a function of the seed and of the trials so far, whichever driver asks."""
    seed = search.seed * 100_003 + trials
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=search.startup_trials, constant_liar=True
        )
    return optuna.samplers.RandomSampler(seed=seed)


def pruner(search: Search) -> "optuna.pruners.BasePruner":
    """What decides that a trial is not worth its end."""
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(search.startup_trials, search.warmup_steps)
    if search.pruner == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    return optuna.pruners.HyperbandPruner() if search.pruner == "hyperband" else optuna.pruners.NopPruner()


def open_study(study: Study) -> "optuna.Study":
    """The storage's study of this name, made if need be. UserError if the storage cannot be opened."""
    search = study.search
    assert search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            study_name=study.name,
            storage=open_storage(study),
            direction=search.direction,
            sampler=sampler(search, 0),
            pruner=pruner(search),
            load_if_exists=True,
        )
    except Exception as error:  # whatever a database driver raises
        raise UserError(
            f"search.storage={without_password(search.storage) or 'null'} cannot be opened: {reason(search, error)}"
        ) from error


def show(study: Study) -> None:
    """The trials so far, and what the same command without --dry-run would do."""
    assert study.search is not None
    trials = open_study(study).get_trials(deepcopy=False) if storage_exists(study) else []
    print(f"study {study.name}: search over {', '.join(study.search.space)} in {study.folder}")
    retried = {trial.user_attrs.get(_RETRY_OF) for trial in trials}
    for trial in (trial for trial in trials if _RUN in trial.user_attrs and trial.number not in retried):
        state = state_of(study.folder / trial.user_attrs[_RUN])
        action = {TrialState.FAIL: "retry", TrialState.RUNNING: ACTIONS[state], TrialState.WAITING: "retry"}
        value = "" if trial.value is None else f"  {trial.value:.5g}"
        print(f"  {trial.user_attrs[_RUN]}  {state:<11}  {action.get(trial.state, 'skip')}{value}")
    wanted = (
        len(study.search.grid()[: study.search.trials])
        if study.search.sampler == "grid"
        else study.search.trials
    )
    print(f"  {max(0, wanted - sum(map(_counts, trials)))} of {wanted} trials are still to be proposed")
