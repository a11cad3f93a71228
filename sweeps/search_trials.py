"""Trials of a search as Optuna keeps them: attributes, counts, states, and their list for --dry-run."""

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from sweeps.run_selection import ACTIONS
from sweeps.run_state import state_of
from sweeps.search_objects import open_search
from sweeps.storage import storage_exists
from sweeps.study import Study
from switti.errors import UserError

# Attributes of a trial.
RUN, RETRY_OF, ERROR = "run", "retry_of", "error"

# How a trial that has ended, or waits, is counted.
ENDED = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.WAITING: "not started",
}


def state_word(study: Study, trial: FrozenTrial) -> str:
    """State of the run of a trial that has begun and not ended."""
    try:
        state = state_of(study.folder / trial.user_attrs[RUN])
    except UserError:
        return "failed"
    return state if state in ("running", "queued") else "interrupted"


def label_of(run: str) -> str:
    """ "trial_0007" of a run's name."""
    return run.partition(",")[0]


def settings_text(params: dict[str, Any]) -> str:
    return " ".join(
        f"{name}={f'{value:.4g}' if isinstance(value, float) else value}" for name, value in params.items()
    )


def counts(trial: FrozenTrial) -> bool:
    """Whether it is one of the search's trials: not a second attempt, and not lost before it had a name."""
    lost = trial.state == TrialState.FAIL and RUN not in trial.user_attrs and ERROR not in trial.user_attrs
    return RETRY_OF not in trial.user_attrs and not lost


def print_trials(study: Study) -> None:
    """The trials so far, and what the same command without --dry-run would do."""
    assert study.search is not None
    trials = open_search(study)[0].get_trials(deepcopy=False) if storage_exists(study) else []
    retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    for trial in (trial for trial in trials if RUN in trial.user_attrs and trial.number not in retried):
        state = state_of(study.folder / trial.user_attrs[RUN])
        action = {TrialState.FAIL: "retry", TrialState.RUNNING: ACTIONS[state], TrialState.WAITING: "retry"}
        value = "" if trial.value is None else f"  {trial.value:.5g}"
        print(f"  {trial.user_attrs[RUN]}  {state:<11}  {action.get(trial.state, 'skip')}{value}")
    wanted = (
        len(study.search.grid()[: study.search.trials])
        if study.search.sampler == "grid"
        else study.search.trials
    )
    print(f"  {max(0, wanted - sum(map(counts, trials)))} of {wanted} trials are still to be proposed")
