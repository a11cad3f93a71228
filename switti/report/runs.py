"""Run folders into dataclasses. This is the only place of the report that opens a run's files."""

import csv
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from switti.errors import UserError

RECORD_FORMAT = 1
_RECORD, _CONFIG, _METRICS, _EVALUATION = "record.json", "config.yaml", "metrics.csv", "evaluation.json"
_SAMPLES = Path("samples") / "latest"


@dataclass(frozen=True)
class Series:
    """One logged metric: strictly increasing steps (int64) and their values (float64), same length."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """What the evaluation measured while sampling one batch. Seconds are wall-clock for the whole batch.

    rounds: seconds of each repetition; those with the same `together` were measured in turn, round by round.
    processor: processor time of each repetition (all threads); empty on a GPU.
    """

    seconds_per_scale: tuple[float, ...] = ()
    seconds_total: float | None = None
    batch: int | None = None
    guidance_stop: int | None = None
    cache_bytes: float | None = None
    rounds: tuple[float, ...] = ()
    processor: tuple[float, ...] = ()
    together: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: metric names are without the prefix `metrics/`.

    stopped_early, metrics_stopped_early: the same with guidance left out at the last scales. pictures, captions: how
    many were measured, of which split. settings: of the sampler, as they were for the evaluation.
    """

    step: int | None
    metrics: dict[str, float]
    sampling: Sampling | None
    stopped_early: Sampling | None = None
    pictures: int | None = None
    captions: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics_stopped_early: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """samples/latest: one entry of `prompts`, `seeds` and `files` per picture."""

    step: int | None
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    files: tuple[Path, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run folder. `config` is flat: dotted key → value; lists are kept whole."""

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    series: dict[str, Series]
    evaluation: Evaluation | None
    samples: Samples | None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    def setting(self, key: str) -> Any:
        """Value of a dotted config key; a wrong name is the user's (it came from --vary or --pair-by)."""
        if key not in self.config:
            near = difflib.get_close_matches(key, self.config, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"run {self.path} has no setting '{key}'{hint}")
        return self.config[key]


def find_runs(targets: list[str], runs_dir: str | Path = "runs") -> list[Path]:
    """Run folders meant by `targets`: runs, folders of runs, or names of either below `runs_dir`; sorted, unique."""
    found: list[Path] = []
    for target in targets:
        folder = next((path for path in (Path(target), Path(runs_dir) / target) if path.is_dir()), None)
        if folder is None:
            raise UserError(f"'{target}' is neither a folder nor a study below '{runs_dir}'")
        inside = (
            [folder]
            if (folder / _RECORD).is_file()
            else [path.parent for path in folder.glob(f"*/{_RECORD}")]
        )
        if not inside:
            raise UserError(f"no runs found in '{folder}': neither it nor a folder in it holds a {_RECORD}")
        found += inside
    return sorted({path.resolve(): path for path in found}.values(), key=lambda path: path.as_posix())


def read_run(path: str | Path) -> Run:
    """Read one run folder. Raises UserError for another record format and for files that are not what they claim."""
    path = Path(path)
    record = _read_json(path / _RECORD)
    if record.get("format") != RECORD_FORMAT:
        raise UserError(
            f"{path / _RECORD} has format {record.get('format')!r}; this version reads format {RECORD_FORMAT} only: "
            "compare it with the version that made it, or name the runs without it"
        )
    return Run(
        path,
        _read_config(path / _CONFIG),
        record,
        _read_series(path / _METRICS),
        _evaluation(path),
        _samples(path),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: a run folder needs the resolved config to be compared")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return flatten(value or {})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_series(path: Path) -> dict[str, Series]:
    """metrics.csv in long format. A later value for a step replaces the earlier; a cut last line is left out."""
    points: dict[str, dict[int, float]] = {}
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]  # a run in progress may be in the middle of writing a line
    reader = csv.DictReader(complete.splitlines())
    if missing := {"step", "metric", "value"} - set(reader.fieldnames or ()):
        raise UserError(f"{path} lacks the columns {sorted(missing)}")
    for row in reader:
        try:
            points.setdefault(row["metric"], {})[int(row["step"])] = float(row["value"])
        except (TypeError, ValueError):
            raise UserError(f"{path}, line {reader.line_num}: step or value is not a number") from None
    return {name: _series(by_step) for name, by_step in points.items()}


def _series(by_step: dict[int, float]) -> Series:
    steps = sorted(by_step)
    return Series(np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64))


def _evaluation(path: Path) -> Evaluation | None:
    if not (path / _EVALUATION).is_file():
        return None
    value = _read_json(path / _EVALUATION)
    return Evaluation(
        value.get("step"),
        _numbers(value.get("metrics")),
        _sampling(value.get("sampling")),
        _sampling(value.get("sampling_stopped_early")),
        value.get("pictures"),
        value.get("captions"),
        value.get("settings") or {},
        _numbers(value.get("metrics_stopped_early")),
    )


def _numbers(metrics: dict[str, Any] | None) -> dict[str, float]:
    return {
        name.removeprefix("metrics/"): float(number)
        for name, number in (metrics or {}).items()
        if isinstance(number, int | float)
    }


def _sampling(value: dict[str, Any] | None) -> Sampling | None:
    if not value:
        return None
    return Sampling(
        seconds_per_scale=tuple(value.get("seconds_per_scale") or ()),
        seconds_total=value.get("seconds_total"),
        batch=value.get("batch"),
        guidance_stop=value.get("guidance_stop"),
        cache_bytes=value.get("cache_bytes"),
        rounds=tuple(value.get("seconds_by_round") or ()),
        processor=tuple(value.get("processor_seconds_by_round") or ()),
        together=value.get("timed_together"),
    )


def _samples(path: Path) -> Samples | None:
    index = path / _SAMPLES / "index.json"
    if not index.is_file():
        return None
    value = _read_json(index)
    prompts, seeds, files = (value.get(key) or [] for key in ("prompts", "seeds", "files"))
    if not len(prompts) == len(seeds) == len(files):
        raise UserError(
            f"{index}: prompts ({len(prompts)}), seeds ({len(seeds)}) and files ({len(files)}) must match"
        )
    return Samples(
        value.get("step"),
        tuple(prompts),
        tuple(seeds),
        tuple(path / _SAMPLES / name for name in files),
        value.get("sampling") or {},
    )
