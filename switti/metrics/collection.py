"""The chosen metrics behind one small interface, for online measurement and for `experiments.evaluate`.

Every process updates with its own share of pictures; `compute` exchanges sums, features or embeddings, never pictures.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from switti.losses.perceptual import AlexNetFeatures
from switti.metrics.clip_score import clip_score_name, load_open_clip
from switti.metrics.config import MetricsConfig
from switti.metrics.fid import FrechetDistance, InceptionFeatures, KernelDistance
from switti.metrics.mini_clip import MiniClip, load_heads
from switti.metrics.pick_score import load_pick_score
from switti.metrics.scores import MatchedAndShuffledCosine, MeanCosine

CHUNK = 64  # images that go through a feature network at a time


def to_bytes(images_B3HW: Tensor) -> Tensor:
    """Float [0, 1] → uint8, rounded and clamped: what a saved picture would hold. uint8 stays."""
    if images_B3HW.dtype == torch.uint8:
        return images_B3HW
    return (images_B3HW.float().clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class SetDistances:
    """Distances that share one feature network."""

    network: nn.Module
    width: int
    metrics: dict[str, Metric]

    def update(self, images_B3HW: Tensor, real: bool) -> None:
        for part in images_B3HW.split(CHUNK):
            features = self.network(part)
            for metric in self.metrics.values():
                metric.update(features, real=real)

    def update_with_nothing(self, device: torch.device) -> None:
        """Lets a process without pictures take part in the exchange with states of the right shape."""
        nothing = torch.zeros(0, self.width, device=device)
        for metric in self.metrics.values():
            metric.update(nothing, real=True)
            metric.update(nothing, real=False)


class MetricSet:
    """update_real with real pictures (once: they stay over reset), update with generated ones, then compute.

    Pictures are float in [0, 1] or uint8, [B, 3, H, W], of any size.
    """

    def __init__(
        self,
        distances: list[SetDistances],
        scores: dict[str, MeanCosine | MatchedAndShuffledCosine],
        device: torch.device | str = "cpu",
    ) -> None:
        self.distances = distances
        self.scores = scores
        self.device = torch.device(device)
        for metric in self._all():
            metric.to(self.device)

    def _all(self) -> list[Metric]:
        return [metric for group in self.distances for metric in group.metrics.values()] + list(
            self.scores.values()
        )

    @torch.no_grad()
    def update(self, images_B3HW: Tensor, captions: list[str]) -> None:
        """Adds generated pictures with the caption of each."""
        images = to_bytes(images_B3HW.to(self.device))
        for group in self.distances:
            group.update(images, real=False)
        for score in self.scores.values():
            score.update(images, captions)

    @torch.no_grad()
    def update_real(self, images_B3HW: Tensor) -> None:
        """Adds real pictures, the other side of the set distances."""
        images = to_bytes(images_B3HW.to(self.device))
        for group in self.distances:
            group.update(images, real=True)

    def compute(self) -> dict[str, float]:
        """Values by name, over all processes (which must all call this). What is undefined, such as the distance to
        an empty set, is left out."""
        values: dict[str, float] = {}
        for group in self.distances:
            group.update_with_nothing(self.device)
            values |= {name: float(metric.compute()) for name, metric in group.metrics.items()}
        for name, score in self.scores.items():
            score.update(torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=self.device), [])
            result = score.compute()
            if isinstance(result, tuple):
                values |= {name: float(result[0]), f"{name}_shuffled": float(result[1])}
            else:
                values[name] = float(result)
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def reset(self) -> None:
        """Forgets the generated pictures and keeps the statistics of the real ones."""
        for metric in self._all():
            metric.reset()


def build_metrics(config: MetricsConfig, device: torch.device | str = "cpu") -> MetricSet:
    """The metrics that `config.names` asks for, with their networks on `device`.

    Raises UserError if a network is missing: nothing is replaced silently.
    """
    config.validate("metrics")
    distances: list[SetDistances] = []
    alexnet: dict[str, Metric] = {}
    if "fid_alexnet" in config.names:
        alexnet["fid_alexnet"] = FrechetDistance(AlexNetFeatures.num_features)
    if "kid_alexnet" in config.names:
        alexnet["kid_alexnet"] = KernelDistance()
    if alexnet:
        distances.append(SetDistances(AlexNetFeatures().to(device), AlexNetFeatures.num_features, alexnet))
    if "fid_inception" in config.names and config.inception is not None:
        width = InceptionFeatures.num_features
        network = InceptionFeatures(config.inception).to(device)
        distances.append(SetDistances(network, width, {"fid_inception": FrechetDistance(width)}))
    scores: dict[str, MeanCosine | MatchedAndShuffledCosine] = {}
    if "mini_clip_score" in config.names:
        scores["mini_clip_score"] = MatchedAndShuffledCosine(MiniClip(load_heads(config.mini_clip), device))
    if "clip_score" in config.names:
        clip = load_open_clip(config.clip_model, config.clip_weights, device)
        scores[clip_score_name(config.clip_model)] = MeanCosine(clip)
    if "pick_score" in config.names:
        scores["pick_score_v1"] = MeanCosine(load_pick_score(config.pick_score, device))
    return MetricSet(distances, scores, device)
