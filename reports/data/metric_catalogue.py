"""What each metric's name means: title, which direction is better, what it may be compared across, its convention."""

import re
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any, Literal

from switti.metrics.catalogue import Better, MetricInfo, find_info, from_record

# tokens: only in one token space and on one data set; images: on one data set; cost: on one machine; any: always.
Needs = Literal["tokens", "images", "cost", "any"]
# How a curve becomes one number: last value, mean of the last tenth, median, largest.
Reduction = Literal["last", "tail", "median", "max"]


@dataclass(frozen=True)
class Metric:
    """`description` is empty for a metric this version does not know: it is then shown by its name alone."""

    name: str
    title: str
    better: Better = None
    needs: Needs = "any"
    reduction: Reduction = "last"
    description: str = ""
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title, unit and arrow, as the head of a row or a plot."""
        return f"{self.title}{', ' if self.unit else ''}{self.unit} {self.arrow}".strip()

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", None: ""}[self.better]


# Ends the title of a metric of images sampled without guidance at the last scales.
EARLY = ", guidance stopped early"
# Ends the title of a metric that was taken during training, not by an evaluation.
ONLINE = " in training"
_KNOWN: dict[str, tuple[str, Better, Needs, Reduction, str]] = {
    "train/loss": (
        "training loss",
        "lower",
        "tokens",
        "tail",
        "minimized by training; for a generator the mean cross-entropy over all tokens, nats a token",
    ),
    "validation/loss": (
        "validation loss",
        "lower",
        "tokens",
        "last",
        "mean cross-entropy over all tokens of held-out pairs, nats a token",
    ),
    "objective_dynamics/loss": (
        "objective of the fixed batch",
        "lower",
        "tokens",
        "last",
        "the training loss of one fixed batch of training images, evaluated without gradients",
    ),
    "objective_dynamics/ratio": (
        "variance ratio of the objective",
        None,
        "any",
        "last",
        "variance of the last evaluations of the fixed batch over that of all (DVAR): a small one ends the run",
    ),
    "objective_dynamics/ema_change": (
        "change of the objective's moving average",
        None,
        "any",
        "last",
        "relative change over the last evaluations of the fixed batch: a small one ends the run",
    ),
    "objective_dynamics/hall": (
        "range of the objective over its mean",
        None,
        "any",
        "last",
        "over the last evaluations of the fixed batch: a small one ends the run",
    ),
    "objective_dynamics/trend": (
        "slope of the objective",
        None,
        "any",
        "last",
        "per evaluation, over the last ones of the fixed batch: a small one ends the run",
    ),
    "objective_dynamics/checks_without_gain": (
        "scores without a gain",
        None,
        "any",
        "last",
        "how many in a row have not exceeded the best one before them by a margin (CLIP-s): many end the run",
    ),
    "train/gradient_norm": ("gradient norm", None, "any", "tail", "global norm before clipping"),
    "train/learning_rate": ("learning rate", None, "any", "last", "of the first parameter group"),
    "norms/last/mean": (
        "last block's activation norm, mean",
        None,
        "any",
        "last",
        "mean over tokens (Figure 3)",
    ),
    "norms/last/max": (
        "last block's activation norm, max",
        None,
        "any",
        "last",
        "largest over tokens (Figure 3)",
    ),
    "time/step_seconds": ("time of a step", "lower", "cost", "median", "median over the run"),
    "time/samples_per_second": (
        "samples a second",
        "higher",
        "cost",
        "median",
        "median over the run, all devices",
    ),
    "memory/peak_gib": ("peak memory, logged", "lower", "cost", "max", "largest of the devices, as logged"),
    "training/seconds": (
        "training time",
        "lower",
        "cost",
        "last",
        "time inside training, resumed parts added",
    ),
    "training/peak_gib": (
        "peak memory",
        "lower",
        "cost",
        "last",
        "peak over the entire run, from the record",
    ),
    "sampling/seconds_total": (
        "sampling time of a batch",
        "lower",
        "cost",
        "last",
        "generator, all scales, entire batch",
    ),
    "sampling/seconds_total_stopped_early": (
        "sampling time of a batch, guidance stopped early",
        "lower",
        "cost",
        "last",
        "the same without guidance at the last two scales, where only the conditional half is computed",
    ),
    "sampling/seconds_per_picture": (
        "sampling time of an image",
        "lower",
        "cost",
        "last",
        "batch time over batch size",
    ),
    "sampling/cache_mib": (
        "key/value cache",
        "lower",
        "any",
        "last",
        "image tokens' keys and values of the batch",
    ),
}
_UNITS = {
    "time/step_seconds": "s",
    "memory/peak_gib": "GiB",
    "training/seconds": "s",
    "training/peak_gib": "GiB",
    "sampling/seconds_total": "s",
    "sampling/seconds_total_stopped_early": "s",
    "sampling/seconds_per_picture": "s",
    "sampling/cache_mib": "MiB",
}
# Metrics of the users' own, as the run folders that were read describe them.
_extra: dict[str, MetricInfo] = {}
_SCALE = re.compile(r"(train|validation|objective_dynamics)/(\w+)_by_scale/(\d+)")
# Of one of several validation splits: validation/pairs/loss.
_SPLIT = re.compile(r"validation/([a-z][a-z0-9_]{0,39})/(\w+(_by_scale/\d+)?)")
_DISTANCE = re.compile(r"(metrics|evaluation|stopped_early)/(fid|kid|fd|kd|c?mmd)(_.+)?")
_BLOCK = re.compile(r"norms/block_(\d+)/(mean|max)")


def learn(facts: Any) -> None:
    """Remember what a run folder says about metrics of the user's own. Built-in ones keep their facts."""
    for label, info in from_record(facts).items():
        _extra.setdefault(label, info)


def describe(name: str) -> Metric:
    """Everything the report knows about a metric; unknown names come back as they are, with no direction."""
    if split := split_of(name):
        overall = describe(name.replace(f"/{split}/", "/", 1))
        return replace(overall, name=name, title=f"{overall.title}, {split}")
    if name in _KNOWN:
        title, better, needs, reduction, text = _KNOWN[name]
        return Metric(name, title, better, needs, reduction, text, _UNITS.get(name, ""))
    for prefix, suffix in (
        ("metrics/", ONLINE),
        ("evaluation/", ""),
        ("stopped_early/", EARLY),
        ("validation/", ""),
        ("train/", ONLINE),
        ("objective_dynamics/", ", fixed captions"),
    ):
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and (
            prefix in ("metrics/", "evaluation/", "stopped_early/") or find_info(short) is not None
        ):
            return _image_metric(name, short, suffix, "tail" if prefix == "train/" else "last")
    if match := _SCALE.fullmatch(name):
        part, kind, scale = match.groups()
        direction: dict[str, Better] = {"loss": "lower", "accuracy": "higher", "codebook_use": "higher"}
        reduction = "tail" if part == "train" else "last"
        title = f"{part.replace('_', ' ')} {kind.replace('_', ' ')}, scale {scale}"
        return Metric(
            name, title, direction.get(kind), "tokens", reduction, "mean over the tokens of one scale"
        )
    if match := _BLOCK.fullmatch(name):
        return Metric(name, f"block {match[1]}, {match[2]} activation norm", description="over tokens")
    return _unknown(name)


def split_of(name: str) -> str:
    """The validation split of a metric such as validation/pairs/loss; "" of one of all validation images."""
    match = _SPLIT.fullmatch(name)
    return match[1] if match and not match[1].endswith("_by_scale") else ""


def _image_metric(name: str, short: str, suffix: str, reduction: Reduction) -> Metric:
    if (info := find_info(short) or _extra.get(short)) is not None:
        return Metric(name, info.title + suffix, info.better, "images", reduction, info.meaning, info.unit)
    return Metric(name, short + suffix, needs="images")


def _unknown(name: str) -> Metric:
    """A name of another version: losses still need one token space, and noisy training curves are still smoothed."""
    about_tokens = any(word in name for word in ("loss", "accuracy", "entropy"))
    return Metric(
        name,
        name,
        "lower" if "loss" in name else None,
        "tokens" if about_tokens else "cost" if name.startswith(("time/", "memory/")) else "any",
        "tail" if name.startswith("train/") else "last",
    )


def is_detail(name: str) -> bool:
    """Names that have a table or a figure of their own and would flood the main table."""
    if split := split_of(name):
        return is_detail(name.replace(f"/{split}/", "/", 1))
    return bool(_SCALE.fullmatch(name) or _BLOCK.fullmatch(name)) or name == "train/learning_rate"


def is_distance(name: str) -> bool:
    """Distances of two sets of images, which need many of them."""
    return bool(_DISTANCE.fullmatch(name))


def is_cost(name: str) -> bool:
    """Time and memory of training and sampling."""
    return name.startswith(("time/", "memory/", "training/", "sampling/"))


def is_repeated(name: str, names: Container[str]) -> bool:
    """Whether a metric taken during training was also evaluated, or taken on validation data."""
    for online, better in (("metrics/", "evaluation/"), ("train/codebook_use", "validation/codebook_use")):
        if name.startswith(online):
            return f"{better}{name.removeprefix(online)}" in names
    return False
