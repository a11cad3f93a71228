"""Settings of the picture metrics. Imports no torch: configs are composed before torch is loaded."""

from dataclasses import dataclass, field
from typing import Literal

from switti.errors import UserError
from switti.files import kind_of

# Fewer images than Inception has features leave a Fréchet distance's covariance singular.
ENOUGH_IMAGES = 2048

METRICS = ("fid_alexnet", "kid_alexnet", "mini_clip_score", "fid_inception", "clip_score", "pick_score")
EMBEDDED = "embedded"


@dataclass
class MetricsConfig:
    """Which metrics are measured on generated pictures, and with which networks.

    names: out of METRICS. The first three need no download: Fréchet and kernel distance on AlexNet features (never
    comparable with Inception FID), and the similarity of the small embedded dual encoder. The last three are the
    paper's and read their networks from the settings below.
    captions: the split whose captions are generated from. train asks how well concepts that were seen are drawn,
      validation how well new ones are.
    prompts: number of captions, spread evenly over that split; their real pictures are compared with.
    batch: pictures generated and scored at once per process.
    inception: file of torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth). fid_inception
      follows torchmetrics' convention (antialiased resize to 299 px) and is not the paper's protocol: do not compare it
      with published numbers.
    clip_model, clip_weights: open_clip architecture, and a weights file or a pretrained tag known to open_clip.
    pick_score: hub id or local folder of PickScore v1 in transformers format.
    mini_clip: "embedded", or a folder written by `python -m experiments.tools.train_mini_clip`.
    """

    names: list[str] = field(default_factory=lambda: ["fid_alexnet", "kid_alexnet", "mini_clip_score"])
    captions: Literal["train", "validation"] = "validation"
    prompts: int = 64
    batch: int = 16
    inception: str | None = None
    clip_model: str = "ViT-H-14"
    clip_weights: str = "laion2b_s32b_b79k"
    pick_score: str = "yuvalkirstain/PickScore_v1"
    mini_clip: str = EMBEDDED

    def validate(self, path: str) -> None:
        for name in self.names:
            if name not in METRICS:
                raise UserError(f"{path}.names: no metric {name!r}; there are {', '.join(METRICS)}")
        if len(set(self.names)) != len(self.names):
            raise UserError(f"{path}.names={self.names} names a metric twice")
        if self.prompts < 2:
            raise UserError(
                f"{path}.prompts={self.prompts} must be at least 2 (a covariance needs two pictures)"
            )
        if self.batch < 1:
            raise UserError(f"{path}.batch={self.batch} must be at least 1")
        if "fid_inception" in self.names and self.inception is None:
            raise UserError(
                f"{path}.names has fid_inception: set {path}.inception to the file of Inception weights"
            )
        for name in ("clip_model", "clip_weights", "pick_score", "mini_clip"):
            if not getattr(self, name):
                raise UserError(f"{path}.{name} must not be empty")
        if (
            self.mini_clip != EMBEDDED
            and "mini_clip_score" in self.names
            and kind_of(self.mini_clip) != "folder"
        ):
            raise UserError(f"{path}.mini_clip={self.mini_clip}: no such folder; give one or {EMBEDDED!r}")
