"""Registry of the image metrics: title, direction, unit, meaning and network of each, and the function that builds it.

A built-in metric is one entry of `IMAGE_METRICS` and the function that its `build` names; settings, measurement and
reports follow from the entry. A metric of a user's own carries the same facts as attributes of its class
(`metrics.extra`). Imports no torch: reports read the facts alone.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["lower", "higher"] | None

_LONGEST = {"title": 80, "unit": 20, "meaning": 400}  # characters


@dataclass(frozen=True)
class MetricInfo:
    """Facts about a metric of images.

    name: the setting in `metrics.names`. label: of its values in metrics.csv and reports, if it is not the name.
    better: the direction of improvement; None where there is none. meaning: one line, convention included.
    network: what it is measured with. build: import path of a function `(settings, device, networks)` that returns
    (label, metric); "" for a metric that is measured elsewhere or together with another.
    """

    name: str
    title: str
    better: Better
    meaning: str
    unit: str = ""
    network: str = ""
    label: str = ""
    build: str = ""


# Changes with the weights that ship: values of another version do not compare.
MINI_CLIP_VERSION = 2
_MINI = (
    f"mini-CLIP version {MINI_CLIP_VERSION}, a small dual encoder (frozen MiniLM text encoder and frozen AlexNet with "
    "two learned heads) trained on emoji in seven styles"
)

_CONVENTIONS = {
    "pytorch_fid": "the paper's chain: bicubic to 512 px, Lanczos to 256 px, then pytorch-fid's resize to 299 px",
    "torch_fidelity": "torch-fidelity's resize to 299 px as in TensorFlow 1, from the image's own size",
    "clean": "clean-fid's antialiased bicubic resize to 299 px, from the image's own size",
}


def _under_conventions() -> Iterator[MetricInfo]:
    """Distances on Inception features, each under every convention of `switti.metrics.inception`."""
    for convention, words in _CONVENTIONS.items():
        for kind, what in (("fid", "Fréchet"), ("kid", "unbiased kernel")):
            yield MetricInfo(
                f"{kind}_inception_{convention}",
                f"{kind.upper()} (Inception, {convention})",
                "lower",
                f"{what} distance of Inception-v3 features, 2 048 numbers; {words}",
                network=f"inception_{convention}",
                build=f"switti.metrics.fid:build_{kind}_{convention}",
            )


IMAGE_METRICS: dict[str, MetricInfo] = {
    info.name: info
    for info in (
        MetricInfo(
            "fid_alexnet",
            "FID (AlexNet)",
            "lower",
            "Fréchet distance of pooled AlexNet features (256 numbers, 128 px input). Never comparable with Inception "
            "FID",
            network="alexnet",
            build="switti.metrics.fid:build_fid_alexnet",
        ),
        MetricInfo(
            "kid_alexnet",
            "KID (AlexNet)",
            "lower",
            "kernel distance (unbiased, cubic polynomial kernel) of the same AlexNet features; sounder than FID for "
            "few images; may be slightly negative",
            network="alexnet",
            build="switti.metrics.fid:build_kid_alexnet",
        ),
        MetricInfo(
            "fid_inception",
            "FID (Inception)",
            "lower",
            "Fréchet distance of Inception-v3 features, 2 048 numbers",
            network="inception",
            build="switti.metrics.fid:build_fid_inception",
        ),
        *_under_conventions(),
        MetricInfo(
            "mini_clip_score",
            "mini CLIP score (own caption)",
            "higher",
            f"cosine of image and own caption: {_MINI}. Comparable only with itself, never with a CLIPScore",
            network="mini_clip",
            build="switti.metrics.mini_clip:build_mini_clip_score",
        ),
        MetricInfo(
            "mini_clip_score_shuffled",
            "mini CLIP score (another caption)",
            None,
            "the same score with captions dealt to the wrong images: the level that knows nothing of the caption. "
            "Only the gap to the own caption's score speaks of following the text",
            network="mini_clip",
        ),
        MetricInfo(
            "mini_clip_top1",
            "own caption is the best of 32",
            "higher",
            "share of images to which their own caption fits better than 31 others of the split, drawn by a fixed seed "
            f"(chance 1/32): {_MINI}. Its README gives the share on real images, the ceiling",
            network="mini_clip",
            build="switti.metrics.mini_clip:build_mini_clip_top1",
        ),
        MetricInfo(
            "mini_clip_top1_all",
            "own caption is the best of all",
            "higher",
            "the same among all captions of the split (at most 1 024, evenly spread); comparable on one split only",
            network="mini_clip",
        ),
        MetricInfo(
            "mini_clip_style_accuracy",
            "style accuracy",
            "higher",
            "share of images to which their caption fits better than its words with each other style of the split: "
            f"{_MINI}",
            network="mini_clip",
        ),
        MetricInfo(
            "clip_score",
            "CLIPScore",
            "higher",
            "raw cosine of image and caption; each value is labelled with its backbone",
            network="open_clip",
            build="switti.metrics.clip_score:build_clip_score",
        ),
        MetricInfo(
            "pick_score",
            "PickScore v1",
            "higher",
            "raw cosine under PickScore v1 (the paper's convention)",
            network="pick_score",
            label="pick_score_v1",
            build="switti.metrics.pick_score:build_pick_score",
        ),
        MetricInfo(
            "image_reward",
            "ImageReward",
            "higher",
            "(MLP(BLIP [CLS]) − 0.16717) / 1.03334, prompts cut at 35 tokens",
            network="image_reward",
            build="switti.metrics.image_reward:build_image_reward",
        ),
        MetricInfo(
            "hps_v2_0",
            "HPSv2.0",
            "higher",
            "raw cosine under HPSv2.0's CLIP ViT-H/14, longer side 224 px and padded; tables show it times 100",
            network="hps_v2_0",
            build="switti.metrics.hps:build_hps_v2_0",
        ),
        MetricInfo(
            "hps_v2_1",
            "HPSv2.1",
            "higher",
            "raw cosine under HPSv2.1's CLIP ViT-H/14, longer side 224 px and padded; not comparable with HPSv2.0",
            network="hps_v2_1",
            build="switti.metrics.hps:build_hps_v2_1",
        ),
        MetricInfo(
            "aesthetic",
            "aesthetic score (LAION v2)",
            "higher",
            "LAION's predictor v2 on the image embedding of OpenAI's CLIP ViT-L/14, about 1 to 10",
            network="aesthetic",
            label="aesthetic_laion_v2",
            build="switti.metrics.aesthetic:build_aesthetic",
        ),
        # Imported from other programs' results.
        MetricInfo(
            "fid",
            "FID (Inception)",
            "lower",
            "Fréchet distance of Inception-v3 features, 2 048 numbers; not the published protocol",
            network="inception",
        ),
        MetricInfo(
            "geneval",
            "GenEval",
            "higher",
            "unweighted mean of six task accuracies, imported from the detector's results",
        ),
        # Of reconstructions.
        MetricInfo("psnr", "PSNR", "higher", "reconstruction against the original", unit="dB"),
        MetricInfo("ssim", "SSIM", "higher", "reconstruction against the original"),
        MetricInfo("lpips", "LPIPS", "lower", "perceptual distance of reconstruction and original"),
        MetricInfo(
            "l1", "L1", "lower", "mean absolute difference of reconstruction and original, values in [−1, 1]"
        ),
        MetricInfo(
            "mse", "MSE", "lower", "mean squared difference of reconstruction and original, values in [−1, 1]"
        ),
        MetricInfo(
            "codebook_use", "codebook use", "higher", "share of the codebook that occurs in the tokens"
        ),
        MetricInfo("clip_iqa", "CLIP-IQA", "higher", "no-reference quality from CLIP prompts"),
    )
}
_LABELLED = {info.label or info.name: info for info in IMAGE_METRICS.values()}
BUILT_IN = tuple(name for name, info in IMAGE_METRICS.items() if info.build)


def find_info(label: str) -> MetricInfo | None:
    """Facts about the values of a label such as "fid_alexnet" or "clip_score_vit_h_14"; None if it is not known."""
    if label in _LABELLED:
        return _LABELLED[label]
    if label.startswith("clip_score_"):
        backbone = label.removeprefix("clip_score_")
        text = f"raw cosine of image and caption, backbone {backbone}; other backbones and scalings do not compare"
        return MetricInfo(label, f"CLIPScore ({backbone})", "higher", text)
    return None


def info_of(metric: type) -> MetricInfo:
    """Facts about a metric of a user's own, from the attributes of its class.

    The label is the class's name in snake case. title: of rows and plots (default: the label). higher_is_better: as in
    torchmetrics (None: no direction). unit: "" for a plain number. The meaning is the docstring's first line.
    """
    label = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", metric.__name__).lower()
    higher = getattr(metric, "higher_is_better", None)
    better: Better = None if higher is None else "higher" if higher else "lower"
    meaning = (vars(metric).get("__doc__") or "").strip().partition("\n")[0]
    texts = {
        "title": getattr(metric, "title", label),
        "unit": getattr(metric, "unit", ""),
        "meaning": meaning,
    }
    short = {name: str(text)[: _LONGEST[name]] for name, text in texts.items()}
    return MetricInfo(label, short["title"], better, short["meaning"], short["unit"])


def to_record(infos: Mapping[str, MetricInfo]) -> dict[str, dict[str, Any]]:
    """Facts as a run folder's record.json and evaluation.json hold them, by label."""
    return {
        label: {"title": info.title, "better": info.better, "meaning": info.meaning, "unit": info.unit}
        for label, info in infos.items()
    }


def from_record(content: Any) -> dict[str, MetricInfo]:
    """The inverse, for a file from anywhere: entries that are not such facts are ignored."""
    infos: dict[str, MetricInfo] = {}
    for label, facts in content.items() if isinstance(content, dict) else ():
        if not isinstance(facts, dict) or facts.get("better") not in ("lower", "higher", None):
            continue
        texts = {name: facts.get(name, "") for name in _LONGEST}
        if all(isinstance(text, str) and len(text) <= _LONGEST[name] for name, text in texts.items()):
            infos[label] = MetricInfo(
                label, texts["title"] or label, facts.get("better"), texts["meaning"], texts["unit"]
            )
    return infos
