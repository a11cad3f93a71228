"""Studies: one base config and a grid of settings with one run for each point, or a search. Imports no torch.

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
search: …                       # instead of vary and runs: see sweeps/search_space.py

On the command line `base=…`, `vary.<setting>=[…]`, `search.<key>=…` and `pair_by=…` say the same, without a file or
over one.
"""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loading import CONFIGS, check_name, find, load
from configs.schema import RunConfig, get
from configs.yaml_values import parse_yaml_or_text, read_yaml, text_of
from sweeps.run_names import folder_text, run_name
from sweeps.search_space import MOST_RUNS, Search, check_variable, read_search
from switti.errors import UserError
from switti.suggestions import did_you_mean, shortened

# Of study.json.
FORMAT = 1
KEYS = ("name", "base", "vary", "pair_by", "overrides", "runs", "search")
# What other sweepers call these keys.
_FOREIGN = {
    **dict.fromkeys(("grid", "matrix", "parameters", "params", "sweep", "sweeps", "product"), "vary"),
    **dict.fromkeys(("config", "defaults", "program", "from"), "base"),
    **dict.fromkeys(("settings", "common", "shared", "fixed", "set", "override"), "overrides"),
    **dict.fromkeys(("points", "experiments", "variants", "configs"), "runs"),
    **dict.fromkeys(("pair", "paired_by", "block_by", "group_by"), "pair_by"),
    **dict.fromkeys(("study", "title", "id"), "name"),
    **dict.fromkeys(("optuna", "tune", "hpo"), "search"),
}
_GROUPS = ("vary", "search")
COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class StudyRun:
    """One point of the grid. arguments: what follows `experiments.train`; config: the same, loaded and checked."""

    name: str
    varied: dict[str, Any]
    arguments: list[str]
    config: RunConfig


@dataclass(frozen=True)
class Study:
    """A study with all its runs; those of a search are made one by one."""

    name: str
    """Folder of the runs below runs/."""
    base: str
    """Config of all runs, as `experiments.train` takes it."""
    vary: dict[str, list[Any]]
    """Settings with the values that they take: every combination is a run."""
    pair_by: str | None
    """Varied setting by which runs are compared in pairs; runs of one seed share data order and noise."""
    points: dict[str, dict[str, Any]]
    """Named points, {name: …, set: {setting: value}}: alone, or combined with every point of the grid."""
    runs: list[StudyRun]
    """All runs of the grid; none of a search."""
    folder: Path
    """The study's folder, runs/<study>."""
    source: str
    """`base` as `experiments.train` takes it from any working directory."""
    shared: list[str]
    """Settings of all runs, from the file and the command line."""
    search: Search | None = None
    """The search that takes the place of `vary` and `runs`."""

    def as_dict(self) -> dict[str, Any]:
        """For study.json, from which reports read what was varied and how runs pair."""
        return {
            "format": FORMAT,
            "name": self.name,
            "base": self.base,
            "vary": self.vary,
            "pair_by": self.pair_by,
            "points": self.points,
            "search": None if self.search is None else self.search.as_dict(),
            "runs": [{"name": run.name, "varied": run.varied} for run in self.runs],
        }

    def trial_run(self, label: str, values: dict[str, Any], more: Sequence[str] = ()) -> StudyRun:
        """One trial of a search, named by `label` and its values."""
        return make_run(self.source, label, values, list(values), [*self.shared, *more], brief=True)


def load_study(study: str | Path | None, overrides: Sequence[str] = ()) -> Study:
    """Read a study and check every run of it.

    study: a path, a name below configs/studies/, or None for one that the overrides alone define. overrides:
    `key=value` for all runs, besides those that define the study; `study=` (re)names it.
    Raises UserError for an empty grid, a duplicate, an unknown setting, a run whose settings are not valid.
    """
    path: Path | str = find(study, CONFIGS / "studies", "study") if study is not None else COMMAND_LINE
    content, overrides = _define(read_yaml(path) if isinstance(path, Path) else {}, overrides)
    source, name = _check_head(content, overrides, path)
    named, search = content.get("runs"), None
    vary = _check_grid(
        content.get("vary", {} if named or "search" in content else None), path, "vary" in content
    )
    points = _check_points(named, vary, path)
    shared = [
        *([f"study={name}"] if name else []),
        *_as_overrides(content.get("overrides"), path),
        *overrides,
    ]
    if "search" in content:
        if vary or points:
            raise UserError(f"{path}: a study has either search, or vary and runs, not both")
        search = read_search(content["search"], path, source, shared)
    varied = {
        *vary,
        *(field for point in points.values() for field in point),
        *(search.space if search else {}),
    }
    _check_shared(shared, varied, path)
    pair_by = content.get("pair_by")
    if pair_by is not None and pair_by not in vary:
        raise UserError(
            f"{path}: pair_by={shortened(pair_by)} is not among the varied settings ({', '.join(vary)})"
        )
    count = max(1, len(points)) * math.prod(map(len, vary.values()))
    if count > MOST_RUNS:
        raise UserError(f"{path}: a study of {count} runs; {MOST_RUNS} are the most, make it several studies")
    runs = [] if search else _grid_runs(source, points, vary, shared)
    _check_names(runs, path)
    _check_values(runs, vary, path)
    config = runs[0].config if runs else load(source, shared)
    if not config.study:
        raise UserError(f"{path}: study= is empty; it names the folder of the runs")
    folder, name = config.run_dir.parent, config.study
    return Study(name, content["base"], vary, pair_by, points, runs, folder, source, shared, search)


def _check_head(content: dict[str, Any], overrides: list[str], path: Path | str) -> tuple[str, str]:
    """(base as `experiments.train` takes it from anywhere, name of the study or "" if an override gives it)."""
    for key in content:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS, _FOREIGN) or f"; a study has {', '.join(KEYS)}"
            raise UserError(f"{path}: unknown key {shortened(key)!r}{hint}")
    base = content.get("base")
    if not isinstance(base, str):
        raise UserError(f"{path}: base must name a config, such as generator/demo")
    name = str(content.get("name") or (path.stem if isinstance(path, Path) else ""))
    if not name and not any(item.startswith("study=") for item in overrides):
        raise UserError("study=… is missing: it names the folder of the runs")
    return base if os.path.isfile(CONFIGS / f"{base}.yaml") else str(find(base).resolve()), name


def _grid_runs(
    source: str, points: dict[str, dict[str, Any]], vary: dict[str, list[Any]], shared: list[str]
) -> list[StudyRun]:
    """Every named point, or the only one without a name, with every combination of values."""
    return [
        make_run(source, label, point | dict(zip(vary, values, strict=True)), list(vary), shared)
        for label, point in (points or {"": {}}).items()
        for values in itertools.product(*vary.values())
    ]


def _define(content: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(definition with what the command line says of it, the overrides that are settings of the runs)."""
    content = dict(content)
    settings = []
    for item in overrides:
        key, _, text = item.partition("=")
        group, dot, name = key.partition(".")
        if key in ("base", "pair_by"):
            content[key] = text
        elif group in _GROUPS and dot:
            inner = content.get(group) or {}
            if not isinstance(inner, dict):
                raise UserError(f"{item}: the study's {group} does not hold `key: value`")
            content[group] = inner | {name: parse_yaml_or_text(text)}
        elif group in _GROUPS:
            raise UserError(f"{item}: say which, {group}.<{'setting' if group == 'vary' else 'key'}>=…")
        else:
            settings.append(item)
    if "pair_by" not in content and "seed" in (content.get("vary") or {}):
        content["pair_by"] = "seed"
    return content, settings


def _check_shared(shared: list[str], varied: set[str], path: Path | str) -> None:
    for item in shared:
        field = item.partition("=")[0]
        if field in varied:
            raise UserError(f"{item}: {field} is varied by {path}; change it there, or with vary.{field}=[…]")
        if field == "name":
            raise UserError(
                f"{item}: the names of a study's runs follow from what is varied; study=… renames it"
            )


def _check_points(runs: Any, vary: Any, path: Path | str) -> dict[str, dict[str, Any]]:
    """Name → settings of each named point."""
    points: dict[str, dict[str, Any]] = {}
    for run in [] if runs is None else runs if isinstance(runs, list) else [runs]:
        if not isinstance(run, dict) or set(run) != {"name", "set"} or not isinstance(run["set"], dict):
            raise UserError(f"{path}: runs must be a list of {{name: …, set: {{setting: value}}}}")
        label = folder_text(run["name"]).strip("-") or "empty"
        if label in points:
            raise UserError(f"{path}: runs names {label!r} twice")
        for name in run["set"]:
            check_variable(name, path)
            if name in vary:
                raise UserError(f"{path}: {name} is in vary and in runs ({label}); it can be in one of them")
        points[label] = {check_name(str(name), f"{path}: "): value for name, value in run["set"].items()}
    return points


def _check_grid(vary: Any, path: Path | str, given: bool) -> dict[str, list[Any]]:
    if not isinstance(vary, dict) or (given and not vary):
        raise UserError(f"{path}: vary must hold at least one `setting: [values]`")
    for name, values in vary.items():
        check_name(str(name), f"{path}: ")
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{path}: vary.{name}={shortened(values)} must be a list of at least one value, such as [0, 1]"
            )
        texts = [text_of(value) for value in values]
        if len(set(texts)) != len(texts):
            raise UserError(f"{path}: vary.{name}={texts} names a value twice")
        check_variable(name, path)
    return vary


def _as_overrides(overrides: Any, path: Path | str) -> list[str]:
    if overrides is None:
        return []
    if not isinstance(overrides, dict):
        raise UserError(f"{path}: overrides must hold `setting: value`, such as {{trainer.max_steps: 500}}")
    return [f"{check_name(str(name), f'{path}: ')}={text_of(value)}" for name, value in overrides.items()]


def make_run(
    source: str,
    label: str,
    varied: dict[str, Any],
    shown: Sequence[str],
    shared: Sequence[str],
    brief: bool = False,
) -> StudyRun:
    """A run named and checked.

    Args:
        label: the point's own name.
        varied: settings in which the runs differ.
        shown: those of them that the run's name tells.
        shared: settings of all runs.
        brief: whether numbers in the name may be rounded, because the label is unique.

    Raises:
        UserError: for settings that are not valid.
    """
    name = run_name(label, {setting: varied[setting] for setting in shown}, brief)
    settings = [f"{setting}={text_of(value)}" for setting, value in varied.items()]
    arguments = [source, *shared, *settings, f"name={name}"]
    try:
        config = load(source, arguments[1:])
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error
    return StudyRun(name, varied, arguments, config)


def _check_names(runs: list[StudyRun], path: Path | str) -> None:
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise UserError(
                f"{path}: two runs would be kept in the folder {run.name!r}; make their values differ"
            )
        seen.add(run.name)


def _check_values(runs: list[StudyRun], vary: dict[str, list[Any]], path: Path | str) -> None:
    """Two ways to write one value, such as 1 and 1.0, would train the same run twice."""
    for name in vary:
        meant: dict[str, str] = {}
        for run in runs:
            text = text_of(run.varied[name])
            if (other := meant.setdefault(repr(get(run.config, name)), text)) != text:
                raise UserError(f"{path}: vary.{name} names a value twice: {other} and {text} are the same")
