"""A study: one base config, a grid of settings, one run for each point. Imports no torch.

name: demo                      # folder below runs/
base: generator/demo            # a config as `experiments.train` takes it
vary:                           # every combination is a run
  model.visibility: [causal, non_causal]
  seed: [0, 1, 2]
pair_by: seed                   # runs that agree in it share data order and noise: compared as pairs
overrides: {trainer.max_steps: 500}   # for all runs; optional
runs:                           # named points instead of, or times, the grid; optional
  - {name: basic, set: {model.norms: pre, model.ffn: gelu}}
  - {name: sandwich, set: {model.norms: sandwich, model.ffn: gelu}}
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loading import CONFIGS, check_name, find, load, read_yaml
from configs.schema import RunConfig
from switti.errors import UserError

_KEYS = ("name", "base", "vary", "pair_by", "overrides", "runs")


@dataclass(frozen=True)
class PlannedRun:
    """One point of the grid. arguments: what follows `experiments.train`; config: the same, loaded and checked."""

    name: str
    varied: dict[str, Any]
    arguments: list[str]
    config: RunConfig


@dataclass(frozen=True)
class Study:
    """A study with all its runs. folder: runs/<study>."""

    name: str
    base: str
    vary: dict[str, list[Any]]
    pair_by: str | None
    runs: list[PlannedRun]

    @property
    def folder(self) -> Path:
        return self.runs[0].config.run_dir.parent

    def as_dict(self) -> dict[str, Any]:
        """For study.json, from which reports learn what was varied and how runs pair."""
        runs = [{"name": run.name, "varied": run.varied} for run in self.runs]
        return {
            "name": self.name,
            "base": self.base,
            "vary": self.vary,
            "pair_by": self.pair_by,
            "runs": runs,
        }


def load_study(study: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study and check every run of it.

    study: a path, or a name below configs/studies/. overrides: `key=value` for all runs; `study=` renames the study.
    Raises UserError for an empty grid, a duplicate, an unknown setting, a run whose settings are not valid.
    """
    path = find(study, CONFIGS / "studies")
    content = read_yaml(path)
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}; a study has {', '.join(_KEYS)}")
    base = content.get("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base must name a config, such as generator/demo")
    name = str(content.get("name") or path.stem)
    named = content.get("runs")
    vary = _check_grid(content.get("vary", {} if named else None), path, bool(named))
    points = _check_points(named, vary, path)
    shared = [*_as_overrides(content.get("overrides"), path), *overrides]
    for item in shared:
        field = item.partition("=")[0]
        if field in vary or any(field in point for point in points.values()):
            raise UserError(f"{item}: {field} is varied by {path}; change it there")
        if field == "name":
            raise UserError(
                f"{item}: the names of a study's runs follow from what is varied; study=… renames it"
            )
    pair_by = content.get("pair_by")
    if pair_by is not None and pair_by not in vary:
        raise UserError(f"{path}: pair_by={pair_by} is not among the varied settings ({', '.join(vary)})")
    source = str(find(base).resolve() if not (CONFIGS / f"{base}.yaml").is_file() else base)
    runs = [
        _plan(source, label, point | dict(zip(vary, values, strict=True)), vary, [f"study={name}", *shared])
        for label, point in (points or {"": {}}).items()
        for values in itertools.product(*vary.values())
    ]
    _check_names(runs, path)
    return Study(runs[0].config.study or name, base, vary, pair_by, runs)


def _check_points(runs: Any, vary: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Name → settings of each named point."""
    points: dict[str, dict[str, Any]] = {}
    for run in [] if runs is None else runs if isinstance(runs, list) else [runs]:
        if not isinstance(run, dict) or set(run) != {"name", "set"} or not isinstance(run["set"], dict):
            raise UserError(f"{path}: runs must be a list of {{name: …, set: {{setting: value}}}}")
        label = _folder_text(run["name"])
        if label in points:
            raise UserError(f"{path}: runs names {label!r} twice")
        for name in run["set"]:
            _check_variable(name, path)
            if name in vary:
                raise UserError(f"{path}: {name} is in vary and in runs ({label}); it can be in one of them")
        points[label] = {check_name(str(name), f"{path}: "): value for name, value in run["set"].items()}
    return points


def _check_grid(vary: Any, path: Path, optional: bool) -> dict[str, list[Any]]:
    if not isinstance(vary, dict) or not (vary or optional):
        raise UserError(f"{path}: vary must hold at least one `setting: [values]`")
    for name, values in vary.items():
        check_name(str(name), f"{path}: ")
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: vary.{name} must be a list of at least one value, such as [0, 1]")
        texts = [_text(value) for value in values]
        if len(set(texts)) != len(texts):
            raise UserError(f"{path}: vary.{name}={texts} names a value twice")
        _check_variable(name, path)
    return vary


def _check_variable(name: str, path: Path) -> None:
    if name in ("name", "study", "runs_dir"):
        raise UserError(f"{path}: {name} cannot be varied, it says where runs are kept")


def _as_overrides(overrides: Any, path: Path) -> list[str]:
    if overrides is None:
        return []
    if not isinstance(overrides, dict):
        raise UserError(f"{path}: overrides must hold `setting: value`, such as {{trainer.max_steps: 500}}")
    return [f"{check_name(str(name), f'{path}: ')}={_text(value)}" for name, value in overrides.items()]


def _plan(
    base: str, label: str, varied: dict[str, Any], vary: dict[str, list[Any]], shared: list[str]
) -> PlannedRun:
    """label: the point's own name; only what is varied besides is written behind it."""
    shortest = {name: short if _is_unique(short := name.rpartition(".")[2], vary) else name for name in vary}
    parts = [f"{short}={_folder_text(varied[name])}" for name, short in shortest.items()]
    name = ",".join([label] * bool(label) + parts)
    settings = [f"{setting}={_text(value)}" for setting, value in varied.items()]
    arguments = [base, *shared, *settings, f"name={name}"]
    try:
        config = load(base, arguments[1:])
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error
    return PlannedRun(name, varied, arguments, config)


def _is_unique(short: str, vary: dict[str, list[Any]]) -> bool:
    return sum(name.rpartition(".")[2] == short for name in vary) == 1


def _text(value: Any) -> str:
    """A value as it is written on the command line; JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def _folder_text(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", _text(value)).strip("-") or "empty"


def _check_names(runs: list[PlannedRun], path: Path) -> None:
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise UserError(
                f"{path}: two runs would be kept in the folder {run.name!r}; make their values differ"
            )
        seen.add(run.name)
