"""Rules of what may be compared with what: data, tokens, measurements and machines of two runs."""

from collections.abc import Sequence
from typing import Any

from reports.data.metric_catalogue import Metric, describe
from reports.data.runs import Run
from reports.data.study import MISSING, Study, Variant, show

# Settings that change how batches are read, never which images and captions there are.
_DATA_MECHANICS = {"workers", "batch_size", "shuffle_window_shards", "max_bad_fraction", "embeddings"}
# Of no concern to what is measured on validation data.
_TRAINING_DATA = {"train", "crop", "caption_dropout"}
_TOKEN_KEYS = ("tokenizer_weights", "model.scales", "model.codebook_size")
_TOKEN_MECHANICS = {"tokenizer.commitment"}
# Doublings of the side in any tokenizer.
_MOST_STEPS = 32
_MACHINE_KEYS = ("device", "world_size")


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
