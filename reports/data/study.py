"""Runs into variants and pairs, and the rules of what may be compared with what."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reports.data.metric_catalogue import Metric, describe
from reports.data.runs import Run
from switti.errors import UserError

MISSING = "not set"
_WORD = re.compile(r"[A-Za-z][\w+-]*")
_IDENTITY = {"name", "study", "runs_dir", "seed"}
# Settings that change how batches are read, never which images and captions there are.
_DATA_MECHANICS = {"workers", "batch_size", "shuffle_window_shards", "max_bad_fraction", "embeddings"}
# Of no concern to what is measured on validation data.
_TRAINING_DATA = {"train", "crop", "caption_dropout"}
_TOKEN_KEYS = ("tokenizer_weights", "model.scales", "model.codebook_size")
_TOKEN_MECHANICS = {"tokenizer.commitment"}
# Doublings of the side in any tokenizer.
_MOST_STEPS = 32
_MACHINE_KEYS = ("device", "world_size")


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


def group(
    runs: list[Run], pair_by: str = "seed", vary: list[str] | None = None, name: str | None = None
) -> Study:
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
    return Study(name or _study_name(runs), ordered, tuple(variants), keys, pair_by)


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


def overlapping(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pairs of runs that were being trained at the same time on one host."""

    def span(run: Run) -> tuple[str, str, str]:
        record = run.record
        end = record.get("ended") or record.get("updated") or ""
        return str(record.get("host") or ""), str(record.get("started") or ""), str(end)

    known = [(run, *span(run)) for run in runs if all(span(run))]
    return [
        (first, second)
        for i, (first, host, begun, ended) in enumerate(known)
        for second, other_host, other_begun, other_ended in known[i + 1 :]
        if host == other_host and begun < other_ended and other_begun < ended
    ]


def obstacle(metric: Metric, a: Run, b: Run) -> str | None:
    """Why `metric` of two runs must not be subtracted, as a clause for the page; None if it may."""
    if metric.needs in ("tokens", "images") and (keys := _unlike(a, b, _data_keys(a, b, metric))):
        return f"the data differ ({', '.join(keys)})"
    if metric.needs in ("tokens", "images") and (splits := _unlike_contents(a, b, metric)):
        return f"the data differ (contents of {', '.join(splits)})"
    sides = sorted({side for run in (a, b) if (side := image_size(run))})
    if metric.needs == "images" and len(sides) > 1:
        return f"the images differ in size ({' and '.join(f'{side} px' for side in sides)})"
    if metric.needs == "images" and (keys := _unlike(a, b, _measurement_keys(metric))):
        return f"they were measured differently ({', '.join(keys)})"
    if metric.needs == "tokens" and (keys := token_differences(a, b)):
        return f"the token spaces differ ({', '.join(keys)})"
    if (
        metric.needs == "tokens"
        and "loss" in metric.name
        and (keys := _unlike(a, b, ["loss.label_smoothing"]))
    ):
        return f"the losses are defined differently ({', '.join(keys)})"
    if metric.needs == "cost":
        machine = [key for key in _MACHINE_KEYS if a.record.get(key) != b.record.get(key)]
        if machine:
            return f"the machines differ ({', '.join(machine)})"
    return None


def token_differences(a: Run, b: Run) -> list[str]:
    """Keys that make the tokens of two runs mean different things: their losses then have no common scale."""
    tokenizer = {
        key for run in (a, b) for key in run.config if key.startswith("tokenizer.")
    } - _TOKEN_MECHANICS
    return _unlike(a, b, [*sorted(tokenizer), *_TOKEN_KEYS])


def _shows_training_captions(metric: Metric, *runs: Run) -> bool:
    return metric.needs == "images" and "train" in (run.config.get("metrics.captions") for run in runs)


def _unlike_contents(a: Run, b: Run, metric: Metric) -> list[str]:
    """Splits that `metric` is measured on and that held something else under the same paths; as far as was noted."""
    splits = ["train"] if metric.name.startswith("train/") else ["validation"]
    if _shows_training_captions(metric, a, b):
        splits = ["train", "validation"]
    return [f"data.{split}" for split in splits if len({a.contents(split), b.contents(split)} - {None}) > 1]


def exchanged_contents(runs: Sequence[Run]) -> list[tuple[str, list[list[Run]]]]:
    """("data.train", runs by what it held) wherever one setting has meant several contents."""
    exchanged = []
    for key in ("data.train", "data.validation"):
        groups: dict[str, dict[str, list[Run]]] = {}
        for run in runs:
            if digest := run.contents(key.removeprefix("data.")):
                setting = show(run.config.get(key, MISSING))
                groups.setdefault(setting, {}).setdefault(digest, []).append(run)
        exchanged += [(key, list(by_digest.values())) for by_digest in groups.values() if len(by_digest) > 1]
    return exchanged


def _data_keys(a: Run, b: Run, metric: Metric) -> list[str]:
    """Data settings that must agree: for what is measured on validation pairs, only those that concern them."""
    idle = _DATA_MECHANICS | _TRAINING_DATA
    if metric.name.startswith("train/"):
        idle = _DATA_MECHANICS
    elif _shows_training_captions(metric, a, b):
        # Training captions are drawn, training images are compared with.
        idle = idle - {"train"}
    keys = {key for run in (a, b) for key in run.config if key.startswith("data.")}
    return sorted(key for key in keys if key.rpartition(".")[2] not in idle)


def _measurement_keys(metric: Metric) -> list[str]:
    """Settings that change what a number about images means; an evaluation records its own number and captions."""
    keys = ["metrics.mini_clip"] if "mini_clip" in metric.name else []
    return keys + (["metrics.captions", "metrics.prompts"] if metric.name.startswith("metrics/") else [])


def _unlike(a: Run, b: Run, keys: list[str]) -> list[str]:
    return [key for key in keys if show(a.config.get(key, MISSING)) != show(b.config.get(key, MISSING))]


def scale_sides(run: Run) -> list[int]:
    """Token-map sides of the run, [] if its config has none."""
    return _integers(run.config.get("model.scales")) or _integers(run.config.get("tokenizer.scales"))


def image_size(run: Run) -> int | None:
    """Pixels of a side of what the tokenizer decodes; None if the config does not say."""
    sides, steps = (_integers(run.config.get(f"tokenizer.{key}")) for key in ("scales", "multipliers"))
    return sides[-1] * 2 ** (len(steps) - 1) if sides and 0 < len(steps) < _MOST_STEPS else None


def _integers(value: Any) -> list[int]:
    """A list of integers as it is, [] for anything else."""
    is_list = isinstance(value, list) and all(type(item) is int for item in value)
    return list(value) if is_list else []


def loss_groups(study: Study) -> list[tuple[Variant, ...]]:
    """Variants in groups within which losses have a common scale (tokens, data, definition), in the study's order."""
    loss = describe("validation/loss")
    groups: list[list[Variant]] = []
    for variant in study.variants:
        for members in groups:
            if not obstacle(loss, members[0].runs[0], variant.runs[0]):
                members.append(variant)
                break
        else:
            groups.append([variant])
    return [tuple(members) for members in groups]
