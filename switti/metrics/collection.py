"""Set of image metrics behind one small interface, for online measurement and for `experiments.evaluate`.

Each process updates with its own share of images; `compute` exchanges sums, features or embeddings, never images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from switti.errors import UserError
from switti.import_path import build_object, load_object
from switti.metrics.catalogue import IMAGE_METRICS, MetricInfo, find_info, info_of
from switti.metrics.config import MetricsConfig
from switti.metrics.fid import SetDistance
from switti.metrics.retrieval import CaptionRetrieval
from switti.metrics.scores import MatchedAndShuffledCosine, MeanScore

Score = MeanScore | MatchedAndShuffledCosine | CaptionRetrieval
CHUNK = 64  # images that go through a feature network at a time


def to_bytes(images_B3HW: Tensor) -> Tensor:
    """Float [0, 1] → uint8, rounded and clamped as in a saved image; uint8 is returned as it is."""
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

    def update_empty(self, device: torch.device) -> None:
        """Lets a process without images take part in the exchange with states of the right shape."""
        empty = torch.zeros(0, self.width, device=device)
        for metric in self.metrics.values():
            metric.update(empty, real=True)
            metric.update(empty, real=False)


class MetricSet:
    """update_real with real images (once: they stay over reset), update with generated ones, then compute.

    Images are float in [0, 1] or uint8, [B, 3, H, W], of any size. extra: metrics of the user's own, by label.
    """

    def __init__(
        self,
        distances: list[SetDistances],
        scores: dict[str, Score],
        device: torch.device | str = "cpu",
        extra: Mapping[str, Metric] | None = None,
    ) -> None:
        self.distances = distances
        self.scores = scores
        self.extra = dict(extra or {})
        self.device = torch.device(device)
        for metric in self._all():
            metric.to(self.device)

    def _all(self) -> list[Metric]:
        grouped = [metric for group in self.distances for metric in group.metrics.values()]
        return [*grouped, *self.scores.values(), *self.extra.values()]

    def set_candidates(self, captions: list[str]) -> None:
        """The captions of the split that images are generated from, for metrics that choose among them.

        Without, the own caption competes with nothing and these metrics are skipped.
        """
        for score in self.scores.values():
            if isinstance(score, CaptionRetrieval):
                score.set_candidates(captions)

    @torch.no_grad()
    def update(self, images_B3HW: Tensor, captions: list[str]) -> None:
        """Adds generated images with the caption of each."""
        images = to_bytes(images_B3HW.to(self.device))
        for group in self.distances:
            group.update(images, real=False)
        for score in self.scores.values():
            score.update(images, captions)
        for metric in self.extra.values():
            metric.update(images, captions)

    @torch.no_grad()
    def update_real(self, images_B3HW: Tensor) -> None:
        """Adds real images, the other side of the set distances."""
        images = to_bytes(images_B3HW.to(self.device))
        for group in self.distances:
            group.update(images, real=True)

    def compute(self) -> dict[str, float]:
        """Values by label, over all processes (which must all call this).

        Undefined values, such as the distance to an empty set, are skipped.
        """
        values: dict[str, float] = {}
        for group in self.distances:
            group.update_empty(self.device)
            values |= {name: float(metric.compute()) for name, metric in group.metrics.items()}
        for name, score in self.scores.items():
            score.update(torch.zeros(0, 3, 1, 1, dtype=torch.uint8, device=self.device), [])
            result = score.compute()
            if isinstance(result, dict):
                values |= {label: float(value) for label, value in result.items()}
            elif isinstance(result, tuple):
                values |= {name: float(result[0]), f"{name}_shuffled": float(result[1])}
            else:
                values[name] = float(result)
        values |= {label: _to_number(label, metric) for label, metric in self.extra.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def reset(self) -> None:
        """Forgets the generated images and keeps the statistics of the real ones."""
        for metric in self._all():
            metric.reset()


def _to_number(label: str, metric: Metric) -> float:
    try:
        return float(metric.compute())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"metrics.extra: compute() of {label} does not return one number ({error})"
        ) from error


def extra_infos(config: MetricsConfig) -> dict[str, MetricInfo]:
    """Facts about the metrics of `config.extra`, by label. Imports their modules; UserError if one is not a metric."""
    infos: dict[str, MetricInfo] = {}
    for path in config.extra:
        named = load_object("metrics.extra", path)
        if not (isinstance(named, type) and issubclass(named, Metric)):
            raise UserError(f"metrics.extra={path} is not a subclass of torchmetrics.Metric")
        info = info_of(named)
        if find_info(info.name) is not None or info.name in infos:
            raise UserError(f"metrics.extra={path}: there is a metric {info.name} already; rename the class")
        infos[info.name] = info
    return infos


def build_metrics(config: MetricsConfig, device: torch.device | str = "cpu") -> MetricSet:
    """The metrics that `config.names` and `config.extra` ask for, with their networks on `device`.

    Raises UserError if a network is missing: nothing is replaced silently.
    """
    config.validate("metrics")
    # By name, so that metrics on the same features share one network.
    networks: dict[str, Any] = {}
    groups: dict[str, SetDistances] = {}
    scores: dict[str, Score] = {}
    for info in IMAGE_METRICS.values():
        if info.name not in config.names:
            continue
        label, metric = load_object("metrics.names", info.build)(config, device, networks)
        if isinstance(metric, SetDistance):
            group = groups.setdefault(info.network, SetDistances(metric.network, metric.width, {}))
            group.metrics[label] = metric.metric
        else:
            scores[label] = metric
    labels = extra_infos(config)
    extra = {
        label: build_object("metrics.extra", path, Metric, config)
        for label, path in zip(labels, config.extra, strict=True)
    }
    return MetricSet(list(groups.values()), scores, device, extra)
