"""Trials of a search from its run folders: parameters, objective, state, and the best one."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reports.data import json_fields as fields
from reports.data.metric_catalogue import Metric, describe
from reports.data.runs import Run
from reports.data.study import MISSING
from switti.errors import UserError
from switti.files import read_json_object
from switti.run_folder import PRUNE, STUDY

State = Literal["finished", "pruned", "failed", "interrupted", "running"]
STATES: tuple[State, ...] = get_args(State)
_TRIAL = re.compile(r"trial_([0-9]{1,9})(,.*)?")


@dataclass(frozen=True)
class Parameter:
    """A setting that the search varies: one of `choices`, or a number from low to high."""

    name: str
    label: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 1.0
    step: float | None = None
    log: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether its numbers are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Trial:
    """One run of the search. value: the objective, last logged; of a finished trial always finite, else maybe None."""

    number: int
    run: Run
    state: State
    value: float | None
    parameters: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.run.record.get("step") or 0)


@dataclass(frozen=True)
class Search:
    """Trials by number. others: runs beside them that are not trials. skipped: (name, reason) of unreadable folders."""

    name: str
    metric: Metric
    minimize: bool
    parameters: tuple[Parameter, ...]
    trials: tuple[Trial, ...]
    planned: int | None
    sampler: str
    pruner: str
    others: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    def of(self, *states: State) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]

    @property
    def ranked(self) -> list[Trial]:
        """Finished trials, the best first; of equal ones the earlier."""
        return sorted(self.of("finished"), key=self.badness)

    @property
    def best(self) -> Trial | None:
        return next(iter(self.ranked), None)

    def badness(self, trial: Trial) -> float:
        """The objective, turned so that less is better; what has none is last."""
        if trial.value is None:
            return math.inf
        return trial.value if self.minimize else -trial.value


def search_of(folder: Path) -> dict[str, Any] | None:
    """The description of the search that a study's folder holds; None if it holds something else."""
    content = read_json_object(folder / STUDY)
    return fields.mapping(content, "search", folder / STUDY) or None


def read_search(folder: Path, runs: Sequence[Run], skipped: Sequence[tuple[str, str]] = ()) -> Search:
    """The search in a study's folder from its study.json and the runs that were read from it.

    Raises UserError if study.json is not what a search writes, or if none of the runs is a trial.
    """
    path, content = folder / STUDY, search_of(folder)
    if content is None:
        raise UserError(f"{path} describes no search")
    metric, direction = (fields.text(content, key, path) for key in ("metric", "direction"))
    if not metric or direction not in ("minimize", "maximize"):
        raise UserError(f"{path}: search needs a metric, and a direction that is minimize or maximize")
    space = fields.mapping(content, "space", path)
    if not space:
        raise UserError(f"{path}: search.space must name at least one setting")
    parameters = tuple(_parameter(key, space, path) for key in space)
    parameters = tuple(_labelled(parameter, parameters) for parameter in parameters)
    found = [(int(match[1]), run) for run in runs if (match := _TRIAL.fullmatch(run.name))]
    if not found:
        raise UserError(f"no trial of the search in {folder} has started: none of its runs is called trial_…")
    trials = tuple(
        _trial(number, run, metric, parameters) for number, run in sorted(found, key=lambda item: item[0])
    )
    planned = fields.number(content, "trials", path)
    return Search(
        folder.resolve().name,
        describe(metric),
        direction == "minimize",
        parameters,
        trials,
        None if planned is None else int(planned),
        fields.text(content, "sampler", path) or "unknown",
        fields.text(content, "pruner", path) or "none",
        tuple(run.name for run in runs if not _TRIAL.fullmatch(run.name)),
        tuple(skipped),
    )


def _parameter(name: str, space: dict[str, Any], path: Path) -> Parameter:
    axis = fields.mapping(space, name, path)
    if isinstance(choices := axis.get("choices"), list):
        return Parameter(name, name, tuple(choices))
    low, high = fields.number(axis, "low", path), fields.number(axis, "high", path)
    if low is None or high is None or low > high:
        raise UserError(f"{path}: search.space.{name} needs choices, or low and high")
    log = axis.get("log") is True and low > 0
    return Parameter(name, name, None, low, high, fields.number(axis, "step", path), log)


def _labelled(parameter: Parameter, all_of_them: Sequence[Parameter]) -> Parameter:
    """Called by the last part of its name where that is enough."""
    short = parameter.name.rpartition(".")[2]
    unique = sum(other.name.rpartition(".")[2] == short for other in all_of_them) == 1
    return Parameter(**{**vars(parameter), "label": short if unique else parameter.name})


def _trial(number: int, run: Run, metric: str, parameters: Sequence[Parameter]) -> Trial:
    series = run.series.get(metric)
    logged = [] if series is None else [float(value) for value in series.values]
    value = next((value for value in reversed(logged) if math.isfinite(value)), None)
    state = _state(run)
    if state == "finished" and not (logged and math.isfinite(logged[-1])):
        state, value = "failed", None
    return Trial(number, run, state, value, {p.name: run.config.get(p.name, MISSING) for p in parameters})


def _state(run: Run) -> State:
    """Status in the record, but a run that the search has stopped is pruned, not interrupted."""
    status = run.record.get("status")
    if status == "finished":
        return "finished"
    if status != "failed" and (run.path / PRUNE).is_file():
        return "pruned"
    return status if status in STATES else "running"
