"""Run folders read into dataclasses: the only place of the report that opens a run's files."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from reports.data import json_fields as fields
from reports.data.metric_catalogue import learn
from switti.errors import UserError
from switti.files import read_bytes, read_json_object
from switti.run_folder import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    LATEST_SAMPLES,
    LOG,
    MAX_METRICS,
    METRICS,
    RECORD,
    SAMPLES_INDEX,
    read_metrics,
    read_record,
)
from switti.suggestions import did_you_mean, not_found

_MAX_CONFIG_BYTES = 4 << 20
_MAX_CONFIG_VALUES = 100_000
# An integer beyond it is not a float.
_LARGEST = 1e300


@dataclass(frozen=True)
class Series:
    """One logged metric: strictly increasing steps (int64) and their values (float64), same length."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Sampling:
    """What the evaluation measured while sampling one batch. Seconds are wall-clock for the entire batch.

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

    stopped_early, metrics_stopped_early: the same with guidance skipped at the last scales. images, captions: how
    many were measured, of which split. settings: of the sampler, as they were for the evaluation.
    """

    step: int | None
    metrics: dict[str, float]
    sampling: Sampling | None
    stopped_early: Sampling | None = None
    images: int | None = None
    captions: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics_stopped_early: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """samples/latest: one entry of `prompts`, `seeds` and `files` per image."""

    step: int | None
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    files: tuple[Path, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run folder. `config` is flat: dotted key → value; lists stay lists."""

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

    def contents(self, split: str) -> str | None:
        """Digest of what the split's shards held; with a + if that changed while the run lasted. None: not noted."""
        digest: str | None = (self.record.get("data") or {}).get(split, {}).get("digest")
        return digest

    def setting(self, key: str) -> Any:
        """Value of a dotted config key; a wrong name is the user's (it came from --vary or --pair-by)."""
        if key not in self.config:
            raise UserError(f"run {self.path} has no setting '{key}'{did_you_mean(key, self.config)}")
        return self.config[key]


def find_runs(targets: list[str], runs_dir: str | Path = "runs") -> list[Path]:
    """Run folders meant by `targets`: runs, folders of runs, or names of either below `runs_dir`; sorted, unique."""
    found: list[Path] = []
    for target in targets:
        # False for what cannot be the name of a folder, too.
        folder = next((path for path in (Path(target), Path(runs_dir) / target) if os.path.isdir(path)), None)
        if folder is None:
            known = sorted(path.name for path in Path(runs_dir).glob("*") if path.is_dir())
            raise UserError(not_found("study", target, f"below {runs_dir}/", known))
        inside = (
            [folder] if (folder / RECORD).is_file() else [path.parent for path in folder.glob(f"*/{RECORD}")]
        )
        if not inside:
            raise UserError(f"no runs found in '{folder}': neither it nor a folder in it holds a {RECORD}")
        found += inside
    return sorted({path.resolve(): path for path in found}.values(), key=lambda path: path.as_posix())


def read_run(path: str | Path) -> Run:
    """Read one run folder. Raises UserError for another record format and for files that are not what they claim."""
    path = Path(path)
    record = read_record(path)
    if record is None:
        raise UserError(f"{path} is not a run folder: it has no {RECORD}")
    learn(record.get("metrics"))
    return Run(
        path,
        _read_config(path / CONFIG),
        record,
        _read_series(path),
        _evaluation(path),
        _samples(path),
    )


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, _MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8") from None


def _is_endless(tree: Any) -> bool:
    """Whether it has more values than any config: a short text can repeat its parts by aliases any number of times."""
    waiting, count = [tree], 0
    while waiting and count < _MAX_CONFIG_VALUES:
        value = waiting.pop()
        count += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(waiting)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing: a run folder needs the resolved config to be compared")
    try:
        value = yaml.safe_load(_read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a number of thousands of digits, a date out of range.
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    if _is_endless(value):
        raise UserError(f"{path} holds more than {_MAX_CONFIG_VALUES} values, which is not a config")
    if not isinstance(value, dict | None):
        raise UserError(f"{path} must hold settings by name, not {type(value).__name__}")
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


def _read_series(folder: Path) -> dict[str, Series]:
    """A later value for a step replaces the earlier."""
    points: dict[str, dict[int, float]] = {}
    for row in read_metrics(folder):
        points.setdefault(row.metric, {})[row.step] = row.value
    return {name: _series(by_step) for name, by_step in points.items()}


def _series(by_step: dict[int, float]) -> Series:
    steps = sorted(by_step)
    return Series(np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64))


def _evaluation(folder: Path) -> Evaluation | None:
    path = folder / EVALUATION
    if not path.exists():
        return None
    value = read_json_object(path)
    learn(value.get("about"))
    return Evaluation(
        fields.integer(value, "step", path),
        _numbers(value, "metrics", path),
        _sampling(value, "sampling", path),
        _sampling(value, "sampling_stopped_early", path),
        fields.integer(value, "pictures", path),
        fields.text(value, "captions", path),
        fields.mapping(value, "settings", path),
        _numbers(value, "metrics_stopped_early", path),
    )


def _numbers(tree: dict[str, Any], key: str, path: Path) -> dict[str, float]:
    """Finite numbers; other values are skipped."""
    if len(found := fields.mapping(tree, key, path)) > MAX_METRICS:
        raise UserError(f"{path}: {key} has {len(found)} entries; at most {MAX_METRICS} can be shown")
    return {
        name.removeprefix("metrics/"): float(number)
        for name, number in found.items()
        if isinstance(number, int | float) and abs(number) < _LARGEST
    }


def _sampling(tree: dict[str, Any], key: str, path: Path) -> Sampling | None:
    value = fields.mapping(tree, key, path)
    if not value:
        return None
    batch = fields.seconds(value, "batch", path)
    return Sampling(
        seconds_per_scale=fields.many_seconds(value, "seconds_per_scale", path),
        seconds_total=fields.seconds(value, "seconds_total", path),
        batch=None if batch is None else int(batch),
        guidance_stop=fields.integer(value, "guidance_stop", path),
        cache_bytes=fields.number(value, "cache_bytes", path),
        rounds=fields.many_seconds(value, "seconds_by_round", path),
        processor=fields.many_seconds(value, "processor_seconds_by_round", path),
        together=fields.text(value, "timed_together", path),
    )


def _samples(folder: Path) -> Samples | None:
    index = folder / LATEST_SAMPLES / SAMPLES_INDEX
    if not index.exists():
        return None
    value = read_json_object(index)
    kinds = {"prompts": str, "seeds": int, "files": str}
    prompts, seeds, files = (fields.items(value, key, index, kind) for key, kind in kinds.items())
    if not len(prompts) == len(seeds) == len(files):
        raise UserError(
            f"{index}: prompts ({len(prompts)}), seeds ({len(seeds)}) and files ({len(files)}) must match"
        )
    return Samples(
        fields.integer(value, "step", index),
        tuple(prompts),
        tuple(seeds),
        tuple(index.parent / name for name in files),
        fields.mapping(value, "sampling", index),
    )


def folders_without_record(study: Path) -> list[Path]:
    """Folders of runs that have begun, or are about to, and have no record; sorted."""
    begun = (CONFIG, METRICS, LOG, CHECKPOINTS)
    return sorted(
        folder
        for folder in study.iterdir()
        if folder.is_dir()
        and not folder.name.startswith(".")
        and folder.name != "report"
        and not (folder / RECORD).exists()
        and (any((folder / name).exists() for name in begun) or not any(folder.iterdir()))
    )
