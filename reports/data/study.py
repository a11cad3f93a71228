"""Runs sorted into the variants and pairs of a study."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from reports.data.runs import Run
from switti.errors import UserError

# Of a run's record, in the tables of all runs.
RECORD_COLUMNS = (
    "status",
    "step",
    "max_steps",
    "commit",
    "dirty",
    "device",
    "world_size",
    "started",
    "ended",
)

MISSING = "not set"
_WORD = re.compile(r"[A-Za-z][\w+-]*")
_IDENTITY = {"name", "study", "runs_dir", "seed"}


@dataclass(frozen=True)
class Variant:
    """Runs that differ in the pairing key alone. number: its place among the study's variants, and its colour."""

    label: str
    runs: tuple[Run, ...]
    number: int = 0


@dataclass(frozen=True)
class Study:
    """What is compared. `variants[0]` is the reference: differences are variant − reference.

    skipped: (name, why) of run folders that could not be read.
    """

    name: str
    runs: tuple[Run, ...]
    variants: tuple[Variant, ...]
    vary: tuple[str, ...]
    pair_by: str
    skipped: tuple[tuple[str, str], ...] = ()

    def pairs(self, variant: Variant) -> list[tuple[Any, Run, Run]]:
        """(pair value, reference run, variant run) for every value of `pair_by` that both have."""
        reference = {run.setting(self.pair_by): run for run in self.variants[0].runs}
        partners = {run.setting(self.pair_by): run for run in variant.runs}
        return [
            (value, reference[value], partners[value])
            for value in sort_values(reference)
            if value in partners
        ]

    def variant_of(self, run: Run) -> Variant:
        return next(variant for variant in self.variants if run in variant.runs)

    @property
    def unpaired(self) -> list[Run]:
        """Runs without a partner in the reference (or, for the reference's, in any other variant)."""
        if len(self.variants) < 2:
            return []
        paired = {run.path for variant in self.variants[1:] for _, *two in self.pairs(variant) for run in two}
        return [run for run in self.runs if run.path not in paired]


def group(runs: list[Run], pair_by: str = "seed", vary: list[str] | None = None) -> Study:
    """Sort runs into variants.

    vary: dotted keys that make a variant; None takes every key that differs, but for names and the pairing key.
    Raises UserError for mixed tasks and for two runs of one variant with the same pairing value.
    """
    tasks = sorted({str(run.record.get("task")) for run in runs})
    if len(tasks) > 1:
        raise UserError(
            f"runs of different tasks ({', '.join(tasks)}) cannot be compared: give runs of one task"
        )
    for run in runs:
        for key in [pair_by, *(vary or [])]:
            run.setting(key)
        if isinstance(run.setting(pair_by), list):
            raise UserError(f"run {run.path}: {pair_by} is a list; --pair-by needs a setting with one value")
    keys = tuple(vary) if vary else _varied(runs, pair_by)
    common = _common(keys, runs)
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(show(run.config.get(key, MISSING)) for key in keys), []).append(run)
    variants: list[Variant] = []
    for values in sorted(members, key=lambda values: [_sort_key(value) for value in values]):
        own = sorted(members[values], key=lambda run: _sort_key(run.setting(pair_by)))
        name_of = label(keys, values, common)
        _refuse_twins(own, pair_by, name_of)
        variants.append(Variant(name_of, tuple(own), len(variants)))
    ordered = tuple(run for variant in variants for run in variant.runs)
    return Study(_study_name(runs), ordered, tuple(variants), keys, pair_by)


def differing(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Dotted keys whose values are not the same in all runs, with one value a run; without names and folders."""
    runs = list(runs)
    keys = sorted({key for run in runs for key in run.config})
    table = {
        key: [run.config.get(key, MISSING) for run in runs] for key in keys if key not in _IDENTITY - {"seed"}
    }
    return {key: values for key, values in table.items() if len({show(value) for value in values}) > 1}


def _varied(runs: list[Run], pair_by: str) -> tuple[str, ...]:
    """Keys that make the variants; of a setting that others repeat by interpolation only one."""
    chosen: dict[str, list[str]] = {}
    candidates = [key for key in differing(runs) if key not in _IDENTITY and key != pair_by]
    for key in sorted(candidates, key=lambda key: (not key.startswith("model."), key)):
        values = [show(run.config.get(key, MISSING)) for run in runs]
        last = key.rpartition(".")[2]
        if not any(other.endswith(last) and same == values for other, same in chosen.items()):
            chosen[key] = values
    return tuple(chosen)


def _refuse_twins(runs: list[Run], pair_by: str, variant: str) -> None:
    seen: dict[str, Run] = {}
    for run in runs:
        value = show(run.setting(pair_by))
        if value in seen:
            raise UserError(
                f"runs {seen[value].path} and {run.path} are both '{variant}' with {pair_by}={value}: leave one out, "
                "or name the setting in which they differ with --vary"
            )
        seen[value] = run


def _common(keys: tuple[str, ...], runs: list[Run]) -> tuple[str, ...]:
    """The most frequent value of each key, of those equally frequent the first to come."""
    return tuple(
        Counter(show(run.config.get(key, MISSING)) for run in runs).most_common(1)[0][0] for key in keys
    )


def label(keys: tuple[str, ...], values: tuple[str, ...], common: tuple[str, ...] = ()) -> str:
    """Short name of a variant: words as they are, numbers and booleans with their key's last part.

    common: where three keys or more are varied, only values that differ from these are named.
    """
    if not keys:
        return "all runs"
    named = list(zip(keys, values, strict=True))
    if len(keys) > 2 and common:
        named = [pair for pair, usual in zip(named, common, strict=True) if pair[1] != usual]
    words = [] if named else ["common settings"]
    for key, value in named:
        plain = _WORD.fullmatch(value) and value not in {"true", "false", "null"}
        words.append(value if plain else f"{key.rpartition('.')[2]}={value}")
    return ", ".join(words)


def show(value: Any) -> str:
    """A setting as text, as YAML would give it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sort_key(value: Any) -> tuple[int, float, str]:
    try:
        return (0, float(value), "")
    except (TypeError, ValueError, OverflowError):
        return (1, 0.0, str(value))


def sort_values(values: Iterable[Any]) -> list[Any]:
    """Numbers by size, then words by alphabet."""
    return sorted(values, key=_sort_key)


def _study_name(runs: list[Run]) -> str:
    names = {str(run.record.get("study") or "") for run in runs}
    return names.pop() if len(names) == 1 and "" not in names else "Runs"
