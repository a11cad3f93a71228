"""Settings of the image metrics. Imports no torch: configs are composed before torch is loaded."""

import re
from dataclasses import dataclass, field

from switti.config_values import AT_LEAST_1, check
from switti.errors import UserError
from switti.files import kind_of
from switti.import_path import FORM, check_paths, is_import_path
from switti.metrics.catalogue import BUILT_IN
from switti.suggestions import did_you_mean, shortened

# Fewer images than Inception has features leave a Fréchet distance's covariance singular.
ENOUGH_IMAGES = 2048

EMBEDDED = "embedded"
# Settings without a default that some metrics cannot do without, and what they name.
NEEDED = {
    "inception": "the file of Inception weights",
    "image_reward": "the folder with ImageReward.pt and med_config.json",
    "hps_v2_0": "the file HPS_v2_compressed.pt",
    "hps_v2_1": "the file HPS_v2.1_compressed.pt",
    "aesthetic": "the file of LAION's aesthetic predictor v2",
}
_CAPTIONS = re.compile(r"train|validation(/[a-z][a-z0-9_]{0,39})?")


@dataclass
class MetricsConfig:
    """Which metrics are measured on generated images, on how many, and with which networks."""

    names: list[str] = field(default_factory=lambda: ["fid_alexnet", "kid_alexnet", "mini_clip_score"])
    """Metrics out of fid_alexnet, kid_alexnet, mini_clip_score, mini_clip_top1 (is the own caption the best of 32),
    clip_score, pick_score, image_reward, hps_v2_0, hps_v2_1, aesthetic, fid_inception, and fid_ and kid_ with
    inception_pytorch_fid (the paper's convention), inception_torch_fidelity or inception_clean. The first four need no
    download; the distances on AlexNet features cannot be compared with Inception FID."""
    extra: list[str] = field(default_factory=list)
    """Metrics of your own, each `package.module:Name` of a torchmetrics.Metric class that is built without arguments
    and updated with images and captions (docs/extending.md)."""
    captions: str = "validation"
    """Split whose captions are generated from: train measures pairs that were seen, validation new ones; of data with
    several validation splits also one of them, such as validation/pairs."""
    prompts: int = 64
    """Number of captions, spread evenly over the split; the generated images are compared with the real images of the
    same captions. At least 2."""
    batch: int = 16
    """Images that a process generates and scores at once."""
    inception: str | None = None
    """File of Inception weights for the distances on its features: torch-fidelity's
    weights-inception-2015-12-05-6726825d.pth or pytorch-fid's pt_inception-2015-12-05-6726825d.pth. fid_inception alone
    resizes as torchmetrics does, to 299 px with antialiasing, and is not comparable with published numbers."""
    clip_model: str = "ViT-H-14"
    """Architecture of clip_score by its open_clip name; the paper has ViT-H-14."""
    clip_weights: str = "laion2b_s32b_b79k"
    """Weights of clip_score: a file, or a pretrained tag known to open_clip."""
    pick_score: str = "yuvalkirstain/PickScore_v1"
    """Hub id or local folder of PickScore v1 in transformers format."""
    image_reward: str | None = None
    """Folder with ImageReward.pt and med_config.json of the hub's zai-org/ImageReward, for image_reward."""
    image_reward_tokenizer: str = "google-bert/bert-base-uncased"
    """Hub id or local folder of BERT's tokenizer, for image_reward."""
    hps_v2_0: str | None = None
    """File HPS_v2_compressed.pt of the hub's xswu/HPSv2, for hps_v2_0."""
    hps_v2_1: str | None = None
    """File HPS_v2.1_compressed.pt of the hub's xswu/HPSv2, for hps_v2_1."""
    hps_model: str = "ViT-H-14"
    """Architecture of hps_v2_0 and hps_v2_1 by its open_clip name."""
    aesthetic: str | None = None
    """File sac+logos+ava1-l14-linearMSE.pth of LAION's aesthetic predictor v2, for aesthetic."""
    aesthetic_model: str = "ViT-L-14"
    """Architecture of the image embedding of aesthetic by its open_clip name."""
    aesthetic_clip: str = "openai"
    """Weights of that embedding: a file, or a pretrained tag known to open_clip."""
    mini_clip: str = EMBEDDED
    """Dual encoder of mini_clip_score and mini_clip_top1: `embedded`, or a folder written by
    experiments.tools.train_mini_clip."""

    def validate(self, path: str) -> None:
        for name in self.names:
            if name not in BUILT_IN:
                own = f"; {FORM} goes into {path}.extra" if is_import_path(name) else ""
                hint = own or did_you_mean(name, BUILT_IN)
                raise UserError(
                    f"{path}.names: no metric {shortened(name)!r}; there are {', '.join(BUILT_IN)}{hint}"
                )
        if len(set(self.names)) != len(self.names):
            raise UserError(f"{path}.names={self.names} names a metric twice")
        check_paths(f"{path}.extra", self.extra, f"; built-in metrics go into {path}.names")
        if not _CAPTIONS.fullmatch(self.captions):
            raise UserError(
                f"{path}.captions={shortened(self.captions)} must be train, validation, or validation/SPLIT"
            )
        several = (lambda value: value >= 2, "must be at least 2 (a covariance needs two images)")
        check(self, path, several, "prompts")
        check(self, path, AT_LEAST_1, "batch")
        for name in self.names:
            setting = "inception" if "_inception" in name else name
            if setting in NEEDED and getattr(self, setting) is None:
                raise UserError(f"{path}.names has {name}: set {path}.{setting} to {NEEDED[setting]}")
        for name in (
            "clip_model",
            "clip_weights",
            "pick_score",
            "image_reward_tokenizer",
            "hps_model",
            "aesthetic_model",
            "aesthetic_clip",
            "mini_clip",
        ):
            if not getattr(self, name):
                raise UserError(f"{path}.{name} must not be empty")
        wanted = self.mini_clip != EMBEDDED and {"mini_clip_score", "mini_clip_top1"} & {*self.names}
        if wanted and kind_of(self.mini_clip) != "folder":
            raise UserError(f"{path}.mini_clip={self.mini_clip}: no such folder; give one or {EMBEDDED!r}")
