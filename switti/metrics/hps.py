"""HPSv2 (arXiv 2306.09341): raw cosine under a CLIP ViT-H/14 tuned on people's preferences; tables show it times 100.

Versions 2.0 and 2.1 are different weights whose values do not compare. Images keep their aspect: the longer side
becomes 224 px, the rest is padded.
"""

import torch
from torch import nn

from switti.metrics.clip_score import load_open_clip
from switti.metrics.config import MetricsConfig
from switti.metrics.scores import MeanCosine

MODEL = "ViT-H-14"


def build_hps_v2_0(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, MeanCosine]:
    """As `metrics.names` builds it."""
    return "hps_v2_0", _build("hps_v2_0", config.hps_v2_0, config, device)


def build_hps_v2_1(
    config: MetricsConfig, device: torch.device | str, networks: dict[str, nn.Module]
) -> tuple[str, MeanCosine]:
    """As `metrics.names` builds it."""
    return "hps_v2_1", _build("hps_v2_1", config.hps_v2_1, config, device)


def _build(
    setting: str, weights: str | None, config: MetricsConfig, device: torch.device | str
) -> MeanCosine:
    return MeanCosine(
        load_open_clip(config.hps_model, str(weights), device, f"metrics.{setting}", resize="longest")
    )
