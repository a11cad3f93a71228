"""What each metric's name means: title, which direction is better, what it may be compared across, its convention."""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"] | None
# tokens: only in one token space and on one data set; pictures: on one data set; cost: on one machine; any: always.
Needs = Literal["tokens", "pictures", "cost", "any"]
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


EARLY = ", guidance stopped early"  # ends the title of a metric of pictures with guidance left out at the last scales
ONLINE = " in training"  # ends the title of a metric that was taken during training, not by an evaluation
_MINI = (
    "a small dual encoder (frozen MiniLM text encoder and frozen image trunk with two learned heads) trained on the "
    "embedded picture set; cosine. Comparable only with itself, never with a CLIPScore"
)
_KNOWN: dict[str, tuple[str, Better, Needs, Reduction, str]] = {
    "train/loss": (
        "training loss",
        "lower",
        "tokens",
        "tail",
        "what is minimised; for a generator the mean cross-entropy over all tokens, nats a token",
    ),
    "validation/loss": (
        "validation loss",
        "lower",
        "tokens",
        "last",
        "mean cross-entropy over all tokens of held-out pairs, nats a token",
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
        "peak over the whole run, from the record",
    ),
    "sampling/seconds_total": (
        "sampling time of a batch",
        "lower",
        "cost",
        "last",
        "generator, all scales, whole batch",
    ),
    "sampling/seconds_total_stopped_early": (
        "sampling time of a batch, guidance stopped early",
        "lower",
        "cost",
        "last",
        "the same with guidance left out at the last two scales, where only the conditional half is computed",
    ),
    "sampling/seconds_per_picture": (
        "sampling time of a picture",
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
    "psnr": "dB",
    "time/step_seconds": "s",
    "memory/peak_gib": "GiB",
    "training/seconds": "s",
    "training/peak_gib": "GiB",
    "sampling/seconds_total": "s",
    "sampling/seconds_total_stopped_early": "s",
    "sampling/seconds_per_picture": "s",
    "sampling/cache_mib": "MiB",
}
_PICTURES: dict[str, tuple[str, Better, str]] = {
    "fid_alexnet": (
        "FID (AlexNet)",
        "lower",
        "Fréchet distance of pooled AlexNet features (256 numbers, 128 px input). Never comparable with Inception FID",
    ),
    "kid_alexnet": (
        "KID (AlexNet)",
        "lower",
        "kernel distance (unbiased, cubic polynomial kernel) of the same AlexNet features; sounder than FID for few "
        "pictures; may be slightly negative",
    ),
    "fid": (
        "FID (Inception)",
        "lower",
        "Fréchet distance of Inception-v3 features, 2 048 numbers; not the published protocol",
    ),
    "fid_inception": ("FID (Inception)", "lower", "Fréchet distance of Inception-v3 features, 2 048 numbers"),
    "mini_clip_score": (
        "mini CLIP score (own caption)",
        "higher",
        f"picture against its own caption: {_MINI}",
    ),
    "mini_clip_score_shuffled": (
        "mini CLIP score (another caption)",
        None,
        "the same score with captions dealt to the wrong pictures: the level that knows nothing of the caption. Only "
        "the gap to the own caption's score speaks of following the text",
    ),
    "pick_score_v1": ("PickScore v1", "higher", "raw cosine under PickScore v1 (the paper's convention)"),
    "image_reward": (
        "ImageReward",
        "higher",
        "(MLP(BLIP [CLS]) − 0.16717) / 1.03334, prompts cut at 35 tokens",
    ),
    "geneval": (
        "GenEval",
        "higher",
        "unweighted mean of six task accuracies, imported from the detector's results",
    ),
    "psnr": ("PSNR", "higher", "reconstruction against the original"),
    "ssim": ("SSIM", "higher", "reconstruction against the original"),
    "lpips": ("LPIPS", "lower", "perceptual distance of reconstruction and original"),
    "l1": ("L1", "lower", "mean absolute difference of reconstruction and original, values in [−1, 1]"),
    "mse": ("MSE", "lower", "mean squared difference of reconstruction and original, values in [−1, 1]"),
    "codebook_use": ("codebook use", "higher", "share of the codebook that occurs in the tokens"),
    "clip_iqa": ("CLIP-IQA", "higher", "no-reference quality from CLIP prompts"),
}
_SCALE = re.compile(r"(train|validation)/(\w+)_by_scale/(\d+)")
_DISTANCE = re.compile(r"(metrics|evaluation|stopped_early)/(fid|kid|fd|kd|c?mmd)(_.+)?")
_BLOCK = re.compile(r"norms/block_(\d+)/(mean|max)")


def describe(name: str) -> Metric:
    """Everything the report knows about a metric; unknown names come back as they are, with no direction."""
    if name in _KNOWN:
        title, better, needs, reduction, text = _KNOWN[name]
        return Metric(name, title, better, needs, reduction, text, _UNITS.get(name, ""))
    for prefix, suffix in (
        ("metrics/", ONLINE),
        ("evaluation/", ""),
        ("stopped_early/", EARLY),
        ("validation/", ""),
        ("train/", ONLINE),
    ):
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and (
            prefix in ("metrics/", "evaluation/", "stopped_early/") or short in _PICTURES
        ):
            return _picture_metric(name, short, suffix, "tail" if prefix == "train/" else "last")
    if match := _SCALE.fullmatch(name):
        part, kind, scale = match.groups()
        direction: dict[str, Better] = {"loss": "lower", "accuracy": "higher", "codebook_use": "higher"}
        reduction = "tail" if part == "train" else "last"
        title = f"{part} {kind.replace('_', ' ')}, scale {scale}"
        return Metric(
            name, title, direction.get(kind), "tokens", reduction, "mean over the tokens of one scale"
        )
    if match := _BLOCK.fullmatch(name):
        return Metric(name, f"block {match[1]}, {match[2]} activation norm", description="over tokens")
    return _unknown(name)


def _picture_metric(name: str, short: str, suffix: str, reduction: Reduction) -> Metric:
    if short in _PICTURES:
        title, better, text = _PICTURES[short]
        return Metric(name, title + suffix, better, "pictures", reduction, text, _UNITS.get(short, ""))
    if short.startswith("clip_score_"):
        backbone = short.removeprefix("clip_score_")
        text = f"raw cosine of picture and caption, backbone {backbone}; other backbones and scalings do not compare"
        return Metric(name, f"CLIPScore ({backbone}){suffix}", "higher", "pictures", reduction, text)
    return Metric(name, short + suffix, needs="pictures")


def _unknown(name: str) -> Metric:
    """A name of another version: losses still need one token space, and noisy training curves are still averaged."""
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
