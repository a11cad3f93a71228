"""The `search` part of a study: a space of settings that Optuna explores instead of a grid. Imports no torch.

search:
  space:
    optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}
    model.depth: {low: 2, high: 6, step: 2}
    model.norms: [sandwich, pre]
  metric: validation/loss
  trials: 20
  pruner: median
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from configs.loading import SETTINGS, check_name, load
from configs.yaml_values import text_of
from switti.errors import UserError
from switti.suggestions import did_you_mean, shortened

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["none", "median", "successive_halving", "hyperband"]
Direction = Literal["minimize", "maximize"]
# What Optuna's users and other sweepers call these keys.
FOREIGN = {
    **dict.fromkeys(("n_trials", "num_trials", "max_trials", "budget", "count"), "trials"),
    **dict.fromkeys(("objective", "monitor", "target", "goal_metric"), "metric"),
    **dict.fromkeys(("goal", "mode", "study_direction"), "direction"),
    **dict.fromkeys(("search_space", "params", "parameters", "distributions"), "space"),
    **dict.fromkeys(("n_startup_trials",), "startup_trials"),
    **dict.fromkeys(("n_warmup_steps",), "warmup_steps"),
    **dict.fromkeys(("algorithm", "method", "search_alg"), "sampler"),
    **dict.fromkeys(("early_stopping", "early_terminate", "scheduler"), "pruner"),
    **dict.fromkeys(("database", "url", "storage_url"), "storage"),
}
_METRIC = re.compile(r"(train|validation|metrics|norms|time|memory)/\S+")
_STORAGE = re.compile(r"(sqlite|postgresql|mysql)(\+\w+)?://.+")
# Runs of a study: each of them is made and checked before the first one starts.
MOST_RUNS = 10_000
# Values of an axis beyond which nobody counts.
_ENDLESS = 1e15
# Combinations of ends and choices that are checked before anything starts.
_CORNERS = 64
_RANGE_KEYS = ("low", "high", "step", "log")


@dataclass(frozen=True)
class Axis:
    """Values of one setting: a list of choices, or a range of numbers."""

    choices: list[Any] | None = None
    """One of these values; written as a plain list."""
    low: float | None = None
    """Smallest number of a range. An integer setting takes integers only."""
    high: float | None = None
    """Largest number of a range."""
    step: float | None = None
    """Distance between the numbers of a range. Null: any number, or any integer of an integer setting."""
    log: bool = False
    """Draw from the range on a logarithmic scale; needs a positive low and no step."""

    def ends(self) -> list[Any]:
        """The values at which a combination is most likely to be wrong."""
        return self.choices if self.choices is not None else [self.low, self.high]

    def grid(self) -> list[Any] | None:
        """All values, or None for a continuous range."""
        if self.choices is not None:
            return self.choices
        if self.size is None:
            return None
        assert self.low is not None
        return [self.low + i * (self.step or 1) for i in range(self.size)]

    @property
    def size(self) -> int | None:
        """The number of values, or None for a continuous range."""
        if self.choices is not None:
            return len(self.choices)
        assert self.low is not None and self.high is not None
        step = self.step or (1 if isinstance(self.low, int) and not self.log else None)
        if step is None:
            return None
        steps = (self.high - self.low) / step
        return math.floor(min(steps, _ENDLESS) + 1e-9) + 1


@dataclass(frozen=True)
class Search:
    """The `search` part of a study's file."""

    space: dict[str, Axis]
    """Settings that are searched over: each a list of choices, or {low: …, high: …} with step: … or log: true."""
    metric: str = "validation/loss"
    """Column of metrics.csv that is optimized; the value of a trial is the last one logged."""
    direction: Direction = "minimize"
    """Whether small or large values of the metric are better."""
    trials: int = 20
    """Number of trials of the study, by all its drivers together."""
    sampler: Sampler = "tpe"
    """How Optuna proposes values: the tree-structured Parzen estimator, at random, or all points of a grid."""
    seed: int = 0
    """Seed of the sampler."""
    pruner: Pruner = "none"
    """Optuna's rule by which hopeless trials are stopped early."""
    startup_trials: int = 5
    """Complete trials before the median pruner begins, and random trials before TPE does."""
    warmup_steps: int = 0
    """Optimizer steps before which the median pruner stops no trial."""
    storage: str | None = None
    """URL of a database, such as sqlite:///runs/search.db or postgresql+psycopg://user@host/database (password in
    ~/.pgpass or PGPASSWORD; driver: pip install -e '.[postgresql]'). Null: a journal in the study's folder."""

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for study.json; without a password."""
        return asdict(self) | {"storage": without_password(self.storage)}

    def grid(self) -> list[dict[str, Any]]:
        """All points, of a grid search."""
        axes = [axis.grid() or [] for axis in self.space.values()]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*axes)]

    def corners(self) -> list[dict[str, Any]]:
        """The combinations of ends and choices, as many as are looked at quickly."""
        points = itertools.product(*(axis.ends() for axis in self.space.values()))
        return [dict(zip(self.space, values, strict=True)) for values in itertools.islice(points, _CORNERS)]


def read_search(content: Any, path: Path | str, base: str, shared: Sequence[str]) -> Search:
    """The search that a study asks for, checked against the settings. UserError if it cannot be run."""
    known = [item.name for item in fields(Search)]
    if not isinstance(content, dict):
        raise UserError(f"{path}: search must hold {', '.join(known)}")
    for key in content:
        if key not in known:
            hint = did_you_mean(str(key), known, FOREIGN) or f"; there are {', '.join(known)}"
            raise UserError(f"{path}: unknown key {shortened(f'search.{key}')!r}{hint}")
    space = content.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(
            f"{path}: search.space must hold at least one `setting: [values]` or {{low: …, high: …}}"
        )
    axes = {name: _read_axis(name, value, path) for name, value in space.items()}
    search = Search(**{**content, "space": axes})
    _check_values(search, path)
    _check_corners(search, path, base, shared)
    return search


def without_password(url: str | None) -> str | None:
    """A storage's URL as it may be shown."""
    if url is None:
        return None
    # Up to the last @, which may stand in a password without being written as %40.
    url = re.sub(r"://([^:/?@]*):.*@", r"://\1:…@", url)
    return re.sub(r"([?&]\w*(?:password|passwd|pwd)=)[^&]*", r"\1…", url)


def check_variable(name: str, path: Path | str) -> None:
    """Some settings cannot differ between the runs of a study."""
    if name in ("name", "study", "runs_dir"):
        raise UserError(f"{path}: {name} cannot be varied, it says where runs are kept")


def _read_axis(name: Any, value: Any, path: Path | str) -> Axis:
    check_name(str(name), f"{path}: search.space: ")
    check_variable(name, path)
    where = f"{path}: search.space.{name}"
    if isinstance(value, list):
        if not value:
            raise UserError(f"{where} is empty; give at least one value")
        if len({text_of(item) for item in value}) != len(value):
            raise UserError(f"{where} names a value twice")
        return Axis(choices=value)
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) or set(value) - set(_RANGE_KEYS):
        raise UserError(f"{where} must be a list of values, or {{low: …, high: …}} with step: … or log: true")
    numbers = [value[key] for key in ("low", "high", "step") if value.get(key) is not None]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise UserError(f"{where}: low, high and step must be numbers (write 1.0e-3, with a point)")
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{where}: low, high and step must be finite")
    if SETTINGS[name].kind not in (int, float):
        raise UserError(f"{where}: {name} is {SETTINGS[name].words}, not a range of numbers; list its values")
    if SETTINGS[name].kind is int and any(isinstance(number, float) for number in numbers):
        raise UserError(f"{where}: {name} is an integer, and so must low, high and step be")
    axis = Axis(low=value["low"], high=value["high"], step=value.get("step"), log=bool(value.get("log")))
    if SETTINGS[name].kind is float:
        step = None if axis.step is None else float(axis.step)
        axis = Axis(low=float(value["low"]), high=float(value["high"]), step=step, log=axis.log)
    if value["low"] >= value["high"]:
        raise UserError(f"{where}: low={value['low']} must be less than high={value['high']}")
    if axis.log and (value["low"] <= 0 or axis.step is not None):
        raise UserError(f"{where}: log needs a positive low and no step")
    if axis.step is not None and axis.step <= 0:
        raise UserError(f"{where}: step={axis.step} must be positive")
    return axis


def _check_values(search: Search, path: Path | str) -> None:
    for key, choices in (("direction", Direction), ("sampler", Sampler), ("pruner", Pruner)):
        if (value := getattr(search, key)) not in get_args(choices):
            raise UserError(
                f"{path}: search.{key}={shortened(value)} is not one of {', '.join(get_args(choices))}"
            )
    for key, least in (("trials", 1), ("seed", 0), ("startup_trials", 0), ("warmup_steps", 0)):
        value = getattr(search, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{path}: search.{key}={shortened(value)} must be an integer of at least {least}")
    if not isinstance(search.metric, str) or not _METRIC.fullmatch(search.metric):
        raise UserError(
            f"{path}: search.metric={shortened(search.metric)} must be a name of metrics.csv, such as validation/loss"
        )
    if search.storage is not None and not _STORAGE.fullmatch(str(search.storage)):
        raise UserError(
            f"{path}: search.storage={shortened(without_password(str(search.storage)))} must be null (a journal) or "
            "a URL such as sqlite:///runs/search.db or postgresql://user@host/database"
        )
    if re.search(r"://[^/?]*@[^/?]*@", str(search.storage)):
        raise UserError(
            f"{path}: search.storage={without_password(str(search.storage))} has two @; write the one that belongs to "
            "the password as %40"
        )
    if search.sampler == "grid":
        for name, axis in search.space.items():
            if axis.size is None:
                raise UserError(f"{path}: search.sampler=grid needs a list or a step for {name}")
        points = math.prod(axis.size or 1 for axis in search.space.values())
        if points > MOST_RUNS:
            raise UserError(
                f"{path}: search.space has {points} points, and a grid takes {MOST_RUNS} at most; make steps larger, "
                "or choose another search.sampler"
            )


def _check_corners(search: Search, path: Path | str, base: str, shared: Sequence[str]) -> None:
    """Load the combinations of ends and choices: a space that is wrong is wrong before it runs."""
    for values in search.corners():
        settings = [f"{name}={text_of(value)}" for name, value in values.items()]
        try:
            config = load(base, [*shared, *settings, "name=trial"])
        except UserError as error:
            raise UserError(f"{path}: search.space with {', '.join(settings)}: {error}") from error
        if search.metric.startswith("metrics/") and not config.callbacks.metrics_every:
            raise UserError(f"{path}: search.metric={search.metric} needs callbacks.metrics_every above 0")
